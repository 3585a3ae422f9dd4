"""How one gradient bucket is cut: batches of equal-shape matrices to factor, and spans to send dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from commcomp.compressors.low_rank import folded_shape
from commcomp.compressors.wire import Section
from commcomp.config import Dense, LowRank, Method


@dataclass(frozen=True)
class Entry:
    """One parameter's gradient inside the flat bucket: `offset` in elements, contiguous, `shape` as the parameter's."""

    name: str
    offset: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class MatrixBatch:
    """k matrices n x m of one bucket that lie `stride` elements apart, so one strided view holds them all."""

    names: tuple[str, ...]
    rows: int
    columns: int
    rank: int
    method: LowRank
    offset: int
    stride: int

    def view(self, flat: Tensor) -> Tensor:
        """[k, n, m] view into the flat bucket; no copy."""
        shape = (len(self.names), self.rows, self.columns)
        return flat.as_strided(shape, (self.stride, self.columns, 1), flat.storage_offset() + self.offset)

    def section(self, length: int) -> Section:
        """The wire section of one factor whose columns have `length` values."""
        return Section(len(self.names) * self.rank, length, self.method.factor_dtype)


@dataclass(frozen=True)
class DenseSpans:
    """Parameters of one bucket that travel whole, in one number format."""

    dtype: str
    entries: tuple[Entry, ...]

    @property
    def section(self) -> Section:
        return Section(1, sum(entry.numel for entry in self.entries), self.dtype)

    def gather(self, flat: Tensor) -> Tensor:
        """Copy out as fp32 [1, total]."""
        return torch.cat(self._slices(flat)).float().unsqueeze(0)

    def scatter(self, flat: Tensor, values: Tensor) -> None:
        """Copy [1, total] back to where it came from."""
        parts = values[0].split([entry.numel for entry in self.entries])
        torch._foreach_copy_(self._slices(flat), list(parts))

    def _slices(self, flat: Tensor) -> list[Tensor]:
        return [flat[entry.offset : entry.offset + entry.numel] for entry in self.entries]


@dataclass
class BucketLayout:
    """What happens to each parameter of one bucket."""

    batches: list[MatrixBatch] = field(default_factory=list)
    dense: list[DenseSpans] = field(default_factory=list)


_NARROW = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def wire_dtype(requested: str, gradient_dtype: torch.dtype) -> str:
    """`requested`, unless the gradient itself is 16 bits wide: then its own format, so nothing is widened."""
    return _NARROW.get(gradient_dtype, requested)


def cut_bucket(entries: Sequence[Entry], methods: Mapping[str, Method], gradient_dtype: torch.dtype) -> BucketLayout:
    """Cut a bucket by the methods of its parameters; order and batching are equal on every rank."""
    layout = BucketLayout()
    matrices: dict[tuple[int, int, LowRank], list[Entry]] = {}
    dense: dict[str, list[Entry]] = {}
    for entry in entries:
        method = methods[entry.name]
        if isinstance(method, LowRank) and factor_rank(method, entry.shape, gradient_dtype):
            rows, columns = folded_shape(entry.shape) or (0, 0)
            matrices.setdefault((rows, columns, method), []).append(entry)
        else:
            dense.setdefault(dense_section(method, 0, gradient_dtype).dtype, []).append(entry)
    for (rows, columns, method), group in matrices.items():
        rank = factor_rank(method, (rows, columns), gradient_dtype)
        for run in _equally_spaced(group):
            stride = run[1].offset - run[0].offset if len(run) > 1 else rows * columns
            names = tuple(entry.name for entry in run)
            layout.batches.append(MatrixBatch(names, rows, columns, rank, method, run[0].offset, stride))
    layout.dense = [DenseSpans(dtype, tuple(group)) for dtype, group in dense.items()]
    return layout


def factor_rank(method: Method, shape: tuple[int, ...], gradient_dtype: torch.dtype) -> int:
    """The rank used for a parameter of this shape; 0 if it travels dense, by its rule or as factors would not pay."""
    folded = folded_shape(shape)
    if not isinstance(method, LowRank) or folded is None or 0 in folded:
        return 0
    rows, columns = folded
    rank = min(method.rank, rows, columns)
    dense = dense_section(method, rows * columns, gradient_dtype).encoded_bytes()
    return rank if dense > method.min_ratio * factor_bytes(method, folded, rank) else 0


def factor_bytes(method: LowRank, folded: tuple[int, int], rank: int) -> int:
    """Encoded bytes of both factors of a matrix of shape `folded`."""
    return sum(Section(rank, length, method.factor_dtype).encoded_bytes() for length in folded)


def dense_section(method: Method, numel: int, gradient_dtype: torch.dtype) -> Section:
    """How `numel` values travel that are sent whole under `method`."""
    requested = method.dtype if isinstance(method, Dense) else method.dense_dtype
    return Section(1, numel, wire_dtype(requested, gradient_dtype))


def _equally_spaced(group: list[Entry]) -> list[list[Entry]]:
    """Split entries (in offset order) into maximal runs with one distance between neighbours."""
    runs: list[list[Entry]] = []
    for entry in sorted(group, key=lambda entry: entry.offset):
        run = runs[-1] if runs else []
        if len(run) == 1 or (len(run) > 1 and entry.offset - run[-1].offset == run[1].offset - run[0].offset):
            run.append(entry)
        else:
            runs.append([entry])
    return runs
