"""State dicts and single tensors out of open snapshot files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from torch import Tensor

from commcomp.checkpoint.chain import SnapshotChain
from commcomp.checkpoint.container_reader import SnapshotReader
from commcomp.checkpoint.decode_plan import Piece
from commcomp.checkpoint.decoder import decode, whole
from commcomp.checkpoint.errors import DamagedFileError, MissingSnapshotError, shown
from commcomp.checkpoint.host_copy import as_array, as_tensor
from commcomp.checkpoint.state_tree import LEFT_OUT, TensorPlace, join


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor. `bound`: its declared error bound, None if it is exact; `stored_bytes` without directory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    method: str
    raw_bytes: int
    stored_bytes: int
    bound: dict[str, Any] | None


@dataclass(frozen=True)
class SnapshotInfo:
    """A snapshot as its file describes it."""

    step: int
    mode: str
    parent: int | None  # step of the snapshot it was coded against
    state_hash: str
    metadata: dict[str, Any]
    file_bytes: int
    tensors: tuple[TensorInfo, ...]

    @property
    def raw_bytes(self) -> int:
        return sum(tensor.raw_bytes for tensor in self.tensors)

    @property
    def ratio(self) -> float:
        """Bytes of all tensors over bytes of the file."""
        return self.raw_bytes / self.file_bytes


def describe(reader: SnapshotReader) -> SnapshotInfo:
    header = reader.header
    tensors = tuple(
        TensorInfo(
            name,
            tensor.header.dtype,
            tensor.header.shape,
            tensor.header.method,
            tensor.header.num_bytes,
            tensor.stored_bytes,
            None if tensor.header.bound is None else dict(tensor.header.bound),
        )
        for name, tensor in reader.tensors.items()
    )
    parent = reader.parent and reader.parent.step
    return SnapshotInfo(
        header.step, header.mode, parent, reader.state_hash, header.metadata, reader.file_bytes, tensors
    )


def load_state(chain: SnapshotChain, patterns: Sequence[str] | None, threads: int, verify: bool) -> Any:
    """The state dict, with the tensors whose names match a pattern. Raises MissingSnapshotError if none does."""
    reader = chain[0]
    skeleton = reader.tree_info.skeleton
    names = list(reader.tensors)
    if patterns is not None:
        names = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if not names:
            some = ", ".join(shown(name, 80) for name in list(reader.tensors)[:5])
            raise MissingSnapshotError(f"{reader.path} has no tensor like {' or '.join(patterns)}; it has {some} ...")
    pieces = decode(chain, whole(reader, names), threads=threads, verify=verify)
    made: dict[TensorPlace, Any] = {}

    def make(place: TensorPlace) -> Any:
        if place.name not in pieces:
            return LEFT_OUT
        if place not in made:
            made[place] = _value(reader, place, pieces[place.name])
        return made[place]

    return join(skeleton, make)


def _value(reader: SnapshotReader, place: TensorPlace, piece: Piece) -> Tensor | np.ndarray:
    header = reader.tensors[place.name].header
    if not place.is_array:
        return as_tensor(header, piece.data)
    try:
        return as_array(header, piece.data)
    except ValueError as error:
        raise DamagedFileError(reader.path, str(error), tensor=place.name) from error


def load_values(
    chain: SnapshotChain, name: str, start: int | None, stop: int | None, threads: int, verify: bool
) -> Tensor:
    """A tensor in its shape, or its values [start, stop) in row-major order, as slices count, in one dim."""
    reader = chain[0]
    if name not in reader.tensors:
        some = ", ".join(shown(other, 80) for other in list(reader.tensors)[:5])
        raise MissingSnapshotError(f"{reader.path} has no tensor {shown(name)}; it has {some} ...")
    header = reader.tensors[name].header
    first, end, _ = slice(start, stop).indices(header.num_values)
    end = max(first, end)
    piece = decode(chain, {name: (first, end)}, threads=threads, verify=verify)[name]
    if start is None and stop is None:
        return as_tensor(header, piece.data)
    return as_tensor(header, piece.values(first, end).copy(), (end - first,))
