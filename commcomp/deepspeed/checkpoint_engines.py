"""Which of DeepSpeed's checkpoint engines can be taken over: by what they can do, not by DeepSpeed's version."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from commcomp.checkpoint.codec.native import coders
from commcomp.checkpoint.errors import SnapshotError
from commcomp.checkpoint.hashing import require_xxhash


def require_codec() -> None:
    """Raise ImportError or RuntimeError, with the remedy, where checkpoints cannot be coded here."""
    require_xxhash()
    coders()
    if sys.byteorder != "little":
        raise SnapshotError("packed checkpoints hold little-endian values; this machine is big-endian")


def require_engine(engine: Any) -> None:
    """Raise ValueError, with the remedy, where the engine's checkpoints cannot be taken over."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    inner = getattr(engine, "checkpoint_engine", None)
    if inner is None:
        kind = type(engine).__name__
        raise ValueError(f"{kind} has no checkpoint_engine; expected what deepspeed.initialize returns")
    kind = f"{type(inner).__module__}.{type(inner).__qualname__}"
    is_decoupled = getattr(inner, "is_decoupled", None)
    if is_decoupled is not None and is_decoupled():
        raise ValueError(
            f"the engine's checkpoint engine {kind} writes in the background, where files cannot be packed: remove "
            "'writer' from ds_config's 'checkpoint' (or 'datastates_ckpt', 'nebula'), or commcomp's checkpoint block"
        )
    if not isinstance(inner, TorchCheckpointEngine) or type(inner).save is not TorchCheckpointEngine.save:
        raise ValueError(
            f"the engine's checkpoint engine {kind} has a way of writing of its own; commcomp takes over the one that "
            "calls torch.save: remove 'writer' from ds_config's 'checkpoint', or commcomp's checkpoint block"
        )
    expected = {
        "save_checkpoint": ("save_dir", "tag", "save_latest"),
        "load_checkpoint": ("load_dir", "tag", "load_optimizer_states", "load_module_only"),
    }
    for method, names in expected.items():
        known = inspect.signature(getattr(engine, method)).parameters
        if missing := [name for name in names if name not in known]:
            raise ValueError(
                f"{type(engine).__name__}.{method} has no argument {missing[0]!r} in this version of DeepSpeed; "
                "remove commcomp's checkpoint block, or install a version that has it"
            )
