"""`commcomp.fsdp.register_comm_hook`: FSDP2 and HSDP."""

from commcomp.hooks.fsdp import register_comm_hook

__all__ = ["register_comm_hook"]
