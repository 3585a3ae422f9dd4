"""Which values of which tensors must be decoded for some that are asked for."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from commcomp.checkpoint.coded import CURRENT
from commcomp.checkpoint.container import StoredTensor, check_input_size
from commcomp.checkpoint.container_reader import SnapshotReader
from commcomp.checkpoint.errors import DamagedFileError

Range = tuple[int, int]  # [start, stop) in values


@dataclass(frozen=True)
class Piece:
    """A range of a tensor's values: `data` are the raw bytes of the values from `start` on."""

    start: int
    item_bytes: int
    data: np.ndarray

    def values(self, start: int, stop: int) -> np.ndarray:
        return self.data[(start - self.start) * self.item_bytes : (stop - self.start) * self.item_bytes]


def plan(reader: SnapshotReader, wanted: dict[str, Range]) -> tuple[dict[str, Range], dict[str, Range]]:
    """Ranges to decode in this snapshot, cut at chunks and in decode order, and those to have of its parent.

    Every tensor is visited once, users before what they use, so files that nest inputs deep cost nothing more.
    """
    position, names = reader.position, reader.names
    needed, of_parent = dict(wanted), dict[str, Range]()
    queue = [-position[name] for name in wanted]
    heapq.heapify(queue)
    ordered: list[str] = []
    while queue:
        name = names[-heapq.heappop(queue)]
        if ordered and ordered[-1] == name:
            continue
        ordered.append(name)
        tensor = reader.tensors[name]
        needed[name] = cut = _at_chunks(tensor, needed[name])
        if cut[0] == cut[1]:
            continue
        for source in tensor.header.inputs:
            if source.snapshot == CURRENT:
                if source.tensor not in needed:
                    heapq.heappush(queue, -position[source.tensor])
                needed[source.tensor] = _hull(needed.get(source.tensor), cut)
            else:
                of_parent[source.tensor] = _hull(of_parent.get(source.tensor), cut)
    return {name: needed[name] for name in reversed(ordered)}, of_parent


def check_parent(reader: SnapshotReader, needed: dict[str, Range], parent: SnapshotReader) -> None:
    """Raise DamagedFileError if an input is not in the parent, or has another number of values there."""
    for name in needed:
        header = reader.tensors[name].header
        for source in header.inputs:
            if source.snapshot == CURRENT:
                continue
            try:
                if source.tensor not in parent.tensors:
                    raise ValueError(f"input {source.tensor[:200]!r} is not in the parent {parent.path}")
                check_input_size(header, source, parent.tensors[source.tensor].header)
            except ValueError as error:
                raise DamagedFileError(reader.path, str(error), tensor=name) from error


def _at_chunks(tensor: StoredTensor, values: Range) -> Range:
    start, stop = values
    if start >= stop:
        return start, start
    size = tensor.header.chunk_values
    return start // size * size, min(-(-stop // size) * size, tensor.header.num_values)


def _hull(one: Range | None, other: Range) -> Range:
    if one is None or one[0] == one[1]:
        return other
    return min(one[0], other[0]), max(one[1], other[1])
