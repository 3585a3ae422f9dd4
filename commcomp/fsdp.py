"""FSDP2 and HSDP: `commcomp.fsdp.register_comm_hook` for gradients, `compress_all_gathers` for parameters."""

from commcomp.hooks.fsdp import register_comm_hook
from commcomp.hooks.fsdp_gather import GatherCompression, compress_all_gathers

__all__ = ["GatherCompression", "compress_all_gathers", "register_comm_hook"]
