"""commcomp inside DeepSpeed: gradients, MoE tokens and checkpoints by a "commcomp" block in its configuration."""

from commcomp.deepspeed.attaching import Attached, attach, initialize, install
from commcomp.deepspeed.engine_parts import NotSupported
from commcomp.deepspeed.settings import Block

__all__ = ["Attached", "Block", "NotSupported", "attach", "initialize", "install"]
