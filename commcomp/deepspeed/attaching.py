"""Putting commcomp into an engine: by `initialize` in place of DeepSpeed's, `attach`, or `install` for all engines."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed

from commcomp.config import Dense
from commcomp.deepspeed import engine_parts
from commcomp.deepspeed.checkpoints import attach_checkpoints
from commcomp.deepspeed.gradients import attach_gradients
from commcomp.deepspeed.moe import attach_moe
from commcomp.deepspeed.settings import BLOCK, Block, read_block
from commcomp.gradient_sync import GradientSync

_ATTRIBUTE = "commcomp"
_plain_initialize = deepspeed.initialize


@dataclass
class Attached:
    """What serves an engine; `engine.commcomp`. None where the block leaves that part out."""

    block: Block
    gradients: GradientSync | None = None
    tokens: Any = None
    checkpoints: Any = None

    def stats(self) -> dict[str, Any]:
        """By part, what each one's `stats()` says."""
        parts = {"gradient": self.gradients, "moe": self.tokens, "checkpoint": self.checkpoints}
        return {name: part.stats() for name, part in parts.items() if part is not None}


def initialize(*arguments: Any, **keywords: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize`, with the configuration's "commcomp" block put into the engine.

    Takes and returns what that does: (engine, optimizer, dataloader, scheduler).

    Raises:
        ValueError: the block is missing or wrong, or asks for what this engine cannot do; on every rank.
    """
    return _initialize(arguments, keywords, required=True)


def attach(engine: Any, block: Block | Mapping[str, Any] | None = None) -> Attached:
    """Put commcomp into an engine that `deepspeed.initialize` has made, before its first step; it is `engine.commcomp`.

    `block`: what the "commcomp" block of the configuration holds; by default the one that the engine was given.

    Raises ValueError as `initialize`; also where the engine has been attached to already.
    """
    if getattr(engine, _ATTRIBUTE, None) is not None:
        raise ValueError("this engine has commcomp in it already (engine.commcomp); one attach is enough")
    if block is None:
        found = read_block(engine.config)
        if found is None:
            raise ValueError(f"the engine's configuration has no enabled block {BLOCK!r}; give attach(engine, {{...}})")
        block = found
    elif not isinstance(block, Block):
        block = Block.from_dict(block)
    attached = Attached(block)
    if block.moe is not None:
        attached.tokens = attach_moe(engine.module, block.moe, strict=block.strict)
    if block.gradient is not None:
        attached.gradients = attach_gradients(engine, block.gradient)
    if block.checkpoint is not None:
        attached.checkpoints = attach_checkpoints(
            engine, block.checkpoint, strict=block.strict, residual_state=attached.gradients
        )
    setattr(engine, _ATTRIBUTE, attached)
    _say(engine, attached)
    return attached


def install() -> None:
    """Have `deepspeed.initialize` itself put commcomp into engines whose configuration has the block, and no others.

    For scripts and frameworks that call it themselves: before they do, and before `from deepspeed import initialize`.
    """
    deepspeed.initialize = _serve_all


@functools.wraps(_plain_initialize)
def _serve_all(*arguments: Any, **keywords: Any) -> tuple[Any, Any, Any, Any]:
    return _initialize(arguments, keywords, required=False)


def _initialize(arguments: Any, keywords: Any, *, required: bool) -> tuple[Any, Any, Any, Any]:
    made = _plain_initialize(*arguments, **keywords)
    engine = made[0]
    block = read_block(engine.config)
    if block is None:
        if required and BLOCK not in engine.config:
            raise ValueError(
                f"the DeepSpeed configuration has no block {BLOCK!r}: give it one, or call deepspeed.initialize"
            )
        return made
    attach(engine, block)
    return made


def _say(engine: Any, attached: Attached) -> None:
    """One line of rank 0's: what is active, and over how much of the model."""
    parts = []
    if (state := attached.gradients) is not None:
        values = {name: value.numel() for name, value in state.parameters.items()}
        compressed = sum(values[name] for name, method in state.effective.items() if not isinstance(method, Dense))
        kinds = sorted({method.method for method in state.effective.values()})
        parts.append(f"gradients by {', '.join(kinds)}, {compressed / sum(values.values()):.1%} of values compressed")
    parts += ["MoE tokens"] if attached.tokens is not None else []
    parts += ["checkpoints"] if attached.checkpoints is not None else []
    engine_parts.say(f"commcomp is active: {'; '.join(parts)}")
