"""The "commcomp" block of a DeepSpeed configuration. DeepSpeed itself does not look at it, nor at a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from commcomp.config import GradientConfig, reject_unknown, require_mapping
from commcomp.deepspeed.checkpoints import CheckpointConfig
from commcomp.moe.settings import MoEConfig

BLOCK = "commcomp"
_KEYS = {"enabled", "strict", "gradient", "moe", "checkpoint"}


@dataclass(frozen=True, kw_only=True)
class Block:
    """What is asked for; None leaves that part to DeepSpeed."""

    enabled: bool = True
    strict: bool = True
    gradient: GradientConfig | None = None
    moe: MoEConfig | None = None
    checkpoint: CheckpointConfig | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Block:
        """Read the block strictly. Raises ValueError naming the key, its place, and the nearest known one."""
        require_mapping(data, BLOCK)
        reject_unknown(data, _KEYS, BLOCK)
        for key in ("enabled", "strict"):
            if not isinstance(data.get(key, True), bool):
                raise ValueError(f"{BLOCK}.{key} is {data[key]!r}; expected true or false")
        if not any(data.get(key) is not None for key in ("gradient", "moe", "checkpoint")):
            raise ValueError(f"{BLOCK} asks for nothing: give it a 'gradient', 'moe' or 'checkpoint' block")
        strict, gradient = data.get("strict", True), data.get("gradient")
        if gradient is not None:
            require_mapping(gradient, f"{BLOCK}.gradient")
            gradient = GradientConfig.from_dict({"strict": strict, **gradient})
        moe, checkpoint = data.get("moe"), data.get("checkpoint")
        return cls(
            enabled=data.get("enabled", True),
            strict=strict,
            gradient=gradient,
            moe=None if moe is None else MoEConfig.from_dict(moe),
            checkpoint=None if checkpoint is None else CheckpointConfig.from_dict(checkpoint),
        )


def read_block(config: Mapping[str, Any]) -> Block | None:
    """The block of a whole DeepSpeed configuration, None if there is none or it is not enabled.

    Raises ValueError for a wrong key in it, or a key beside it that looks like its name misspelt.
    """
    if BLOCK not in config:
        close = difflib.get_close_matches(BLOCK, [key.lower() for key in map(str, config)], n=1, cutoff=0.75)
        if close:
            raise ValueError(f"the DeepSpeed configuration has a key {close[0]!r}; did you mean {BLOCK!r}?")
        return None
    block = Block.from_dict(config[BLOCK])
    return block if block.enabled else None
