"""`commcomp.fsdp.register_comm_hook`: FSDP2 and HSDP (needs torch 2.9 or later; `import commcomp` does not)."""

from commcomp.hooks.fsdp import register_comm_hook

__all__ = ["register_comm_hook"]
