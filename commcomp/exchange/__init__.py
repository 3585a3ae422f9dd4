"""How a compressed form crosses a process group: one file a pattern. Nothing here imports a hook or an adapter."""
