"""Where the matrices lie in ZeRO's flat buffers: a coder makes more of rows and columns than of one long row.

Only sizes depend on it: a buffer that is cut at the wrong places is coded a little worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from commcomp.checkpoint.packed_torch_storages import Cut

_LEAST_ROWS = 4


@dataclass(frozen=True)
class Fragment:
    """A part of a parameter in a buffer: `offset` values of the parameter stand before it, elsewhere."""

    start: int
    values: int
    offset: int
    columns: int


@dataclass(frozen=True)
class Buffer:
    """`values`: at the most; the padding at the end is sometimes left out."""

    values: int
    fragments: tuple[Fragment, ...]

    def cut(self, values: int) -> list[Cut]:
        """Matrices and what lies between them."""
        cuts: list[Cut] = []
        at = 0
        for fragment in self.fragments:
            lead = -fragment.offset % fragment.columns
            rows = (fragment.values - lead) // fragment.columns
            start = fragment.start + lead
            if fragment.columns == 1 or rows < _LEAST_ROWS or start < at:
                continue
            if start > at:
                cuts.append((start - at, 1))
            cuts.append((rows * fragment.columns, fragment.columns))
            at = start + rows * fragment.columns
        if values > at:
            cuts.append((values - at, 1))
        return cuts


class FlatBuffers:
    """The flat buffers of an engine's optimizer on this rank; none where it has no such, or not as known here."""

    def __init__(self, engine: Any) -> None:
        optimizer = getattr(engine, "optimizer", None)
        try:
            self._buffers = [*_partitions(engine, optimizer), *_sub_groups(optimizer)]
        except (AttributeError, IndexError, KeyError, TypeError):
            self._buffers = []

    def cut(self, values: int) -> list[Cut]:
        """How a flat tensor of so many values is cut; empty where it is none of these buffers."""
        for buffer in self._buffers:
            last = buffer.fragments[-1]
            if last.start + last.values <= values <= buffer.values:
                return buffer.cut(values)
        return []


def _partitions(engine: Any, optimizer: Any) -> Iterator[Buffer]:
    """Of ZeRO-1, ZeRO-2 and BF16_Optimizer: where each parameter's fragment lies, by its name."""
    mappings = getattr(optimizer, "_param_slice_mappings", None)
    if not mappings:
        return
    shapes = {name: tuple(parameter.shape) for name, parameter in engine.module.named_parameters()}
    groups = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    for mapping, group in zip(mappings, groups):
        total = group.numel()
        fragments = []
        for name, address in sorted(mapping.items(), key=lambda item: item[1].start):
            values = math.prod(shapes[name])
            is_tail = address.start == 0 and address.numel < values
            offset = values - address.numel if is_tail else 0
            fragments.append(Fragment(address.start, address.numel, offset, _columns(shapes[name])))
        if fragments:
            yield Buffer(total, tuple(fragments))


def _sub_groups(optimizer: Any) -> Iterator[Buffer]:
    """Of ZeRO-3: equal parts of every parameter one after another, this rank's."""
    groups = getattr(optimizer, "fp16_groups", [])
    for group in groups:
        if not all(hasattr(parameter, "ds_tensor") for parameter in group):
            continue
        rank = optimizer.dp_process_group.rank()
        start, fragments = 0, []
        for parameter in group:
            values = parameter.partition_numel()
            fragments.append(Fragment(start, values, rank * values, _columns(tuple(parameter.ds_shape))))
            start += values
        if fragments:
            yield Buffer(start, tuple(fragments))


def _columns(shape: tuple[int, ...]) -> int:
    return max(1, math.prod(shape[1:])) if len(shape) > 1 else 1
