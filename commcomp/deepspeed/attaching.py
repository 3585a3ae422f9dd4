"""Putting commcomp into an engine: by `initialize` in place of DeepSpeed's, `attach`, or `install` for all engines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import deepspeed
import torch.distributed as dist

from commcomp.config import Dense
from commcomp.deepspeed import engine_parts
from commcomp.deepspeed.agreement import gather
from commcomp.deepspeed.checkpoints import attach_checkpoints
from commcomp.deepspeed.gradients import attach_gradients
from commcomp.deepspeed.moe import attach_moe
from commcomp.deepspeed.settings import BLOCK, PARTS, Block, read_block
from commcomp.gradient_sync import GradientSync

_ATTRIBUTE = "commcomp"
_Read = TypeVar("_Read", Block, "Block | None")
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
    return _attach(engine, _alike_on_all_ranks(lambda: _block_given(engine, block)))


def _block_given(engine: Any, block: Block | Mapping[str, Any] | None) -> Block:
    if block is None:
        found = read_block(engine.config)
    else:
        found = block if isinstance(block, Block) else Block.from_dict(block)
    if found is None or not found.enabled:
        raise ValueError(f"no enabled block {BLOCK!r} in the engine's configuration, or given as attach(engine, {{}})")
    return found


def _attach(engine: Any, block: Block) -> Attached:
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
    block = _alike_on_all_ranks(lambda: _block_configured(engine, required=required))
    if block is not None:
        _attach(engine, block)
    return made


def _block_configured(engine: Any, *, required: bool) -> Block | None:
    if required and BLOCK not in engine.config and read_block(engine.config) is None:
        raise ValueError(
            f"the DeepSpeed configuration has no block {BLOCK!r}: give it one, or call deepspeed.initialize"
        )
    return read_block(engine.config)


def _alike_on_all_ranks(read: Callable[[], _Read]) -> _Read:
    """What `read` gives. ValueError on every rank where it raises on one, or only some have a block or a part of it.

    Nodes may have configuration files of their own; without this, one would wait for the others in a collective.
    """
    block, problem = None, None
    try:
        block = read()
    except ValueError as error:
        problem = error
    parts = [name for name in PARTS if getattr(block, name, None) is not None]
    every = gather((problem and str(problem), parts)) if dist.is_initialized() else []
    if problem is not None:
        raise problem
    for rank, (said, theirs) in enumerate(every):
        if said:
            raise ValueError(f"rank {rank} cannot read its block {BLOCK!r}: {said}")
        if theirs != parts:
            raise ValueError(
                f"the block {BLOCK!r} asks for {theirs or 'nothing'} on rank {rank} and {parts or 'nothing'} on rank "
                f"{dist.get_rank()}; give all ranks the same configuration"
            )
    return block  # type: ignore[return-value]


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
