"""commcomp: fewer bytes on the network and on disk for distributed training with PyTorch."""

import importlib
from types import ModuleType

from commcomp import config
from commcomp.config import Dense, GradientConfig, LowRank, Quantized, Rule, Sparse
from commcomp.gradient_sync import GradientSync
from commcomp.hooks.ddp import comm_hook
from commcomp.version import __version__

__all__ = [
    "Dense",
    "GradientConfig",
    "GradientSync",
    "LowRank",
    "Quantized",
    "Rule",
    "Sparse",
    "__version__",
    "comm_hook",
    "config",
]


def __getattr__(name: str) -> ModuleType:
    if name in ("fsdp", "deepspeed"):  # lean on more than the rest, so they are loaded by those who use them
        return importlib.import_module(f"commcomp.{name}")
    raise AttributeError(f"module 'commcomp' has no attribute {name!r}")
