"""How one gradient bucket is cut: batches of equal-shape matrices to factor, and spans that travel value by value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from commcomp.compressors.low_rank import folded_shape
from commcomp.compressors.wire import Format, RowFormat, Section
from commcomp.compressors.wire_blocks import BlockFormat
from commcomp.compressors.wire_sparse import SparseFormat
from commcomp.config import Dense, LowRank, Method, Quantized, Sparse


@dataclass(frozen=True)
class Entry:
    """One parameter's gradient inside a bucket row: `offset` in elements, contiguous, `shape` as in the row."""

    name: str
    offset: int
    shape: tuple[int, ...]
    total_rows: int | None = None
    """Where a row holds a piece of the parameter: the first dimension of the whole one."""
    padding: tuple[int, ...] = ()
    """By row of the bucket: values at the end of the piece that fill it up and belong to nothing; () for none."""

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class MatrixBatch:
    """k matrices n x m of one bucket row that lie `stride` elements apart, so one strided view holds them all."""

    names: tuple[str, ...]
    rows: int
    total_rows: int
    """Of the whole matrices, if the bucket row holds `rows` of them."""
    columns: int
    rank: int
    method: LowRank
    offset: int
    stride: int

    def view(self, flat: Tensor) -> Tensor:
        """[k, n, m] view into the bucket row; no copy."""
        shape = (len(self.names), self.rows, self.columns)
        return flat.as_strided(shape, (self.stride, self.columns, 1), flat.storage_offset() + self.offset)

    def section(self, length: int) -> Section:
        """The wire section of one factor whose columns have `length` values."""
        return Section(len(self.names) * self.rank, length, RowFormat(self.method.factor_dtype))


@dataclass(frozen=True)
class Spans:
    """Parameters of one bucket that travel as one row of values in one format."""

    entries: tuple[Entry, ...]
    format: Format

    @property
    def section(self) -> Section:
        return Section(1, self.numel, self.format)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.entries)

    @property
    def numel(self) -> int:
        return sum(entry.numel for entry in self.entries)

    def gather(self, rows: Tensor) -> Tensor:
        """Copy out of a bucket, [..., S], as [..., numel]."""
        return torch.cat(self.slices(rows), dim=-1)

    def take(self, rows: Tensor, addend: Tensor | None = None) -> Tensor:
        """[..., numel], with `addend` added to it: in the bucket where the entries are neighbours, else a copy."""
        if all(left.offset + left.numel == right.offset for left, right in pairwise(self.entries)):
            values = rows[..., self.entries[0].offset : self.entries[0].offset + self.numel]
        elif addend is not None and rows.device.type == "cpu":  # in one go over memory
            values = torch.empty_like(addend, dtype=rows.dtype)
            for out, part, more in zip(self.split(values), self.slices(rows), self.split(addend), strict=True):
                torch.add(part, more, out=out)
            return values
        else:
            values = self.gather(rows)
        return values if addend is None else values.add_(addend)

    def scatter(self, rows: Tensor, values: Tensor) -> None:
        """Copy [..., numel] back to where it came from."""
        torch._foreach_copy_(self.slices(rows), list(self.split(values)))

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """[..., numel] as one view an entry."""
        return values.split([entry.numel for entry in self.entries], dim=-1)

    def slices(self, rows: Tensor) -> list[Tensor]:
        """One view of a bucket, [..., S], an entry."""
        return [rows[..., entry.offset : entry.offset + entry.numel] for entry in self.entries]


@dataclass
class BucketLayout:
    """What happens to each parameter of one bucket."""

    batches: list[MatrixBatch] = field(default_factory=list)
    coded: list[Spans] = field(default_factory=list)
    """What travels in a lossy format, its error kept in a residual."""
    dense: list[Spans] = field(default_factory=list)
    """What travels whole, in a float format."""


_NARROW = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def wire_dtype(requested: str, gradient_dtype: torch.dtype) -> str:
    """`requested`, unless the gradient itself is 16 bits wide: then its own format, so nothing is widened."""
    return _NARROW.get(gradient_dtype, requested)


def cut_bucket(entries: Sequence[Entry], methods: Mapping[str, Method]) -> BucketLayout:
    """Cut a bucket by the effective methods of its parameters; order and batching are equal on every rank."""
    layout = BucketLayout()
    matrices: dict[tuple[int, int, int, LowRank], list[Entry]] = {}
    rows: dict[Method, list[Entry]] = {}
    for entry in entries:
        method = methods[entry.name]
        if isinstance(method, LowRank):
            num_rows, columns = _folded(entry.shape)
            key = (num_rows, entry.total_rows or num_rows, columns, method)
            matrices.setdefault(key, []).append(entry)
        else:
            rows.setdefault(method, []).append(entry)
    for (num_rows, total_rows, columns, low_rank), group in matrices.items():
        for run in _equally_spaced(group):
            stride = run[1].offset - run[0].offset if len(run) > 1 else num_rows * columns
            names = tuple(entry.name for entry in run)
            place = (run[0].offset, stride)
            layout.batches.append(MatrixBatch(names, num_rows, total_rows, columns, low_rank.rank, low_rank, *place))
    for method, group in rows.items():
        spans = Spans(tuple(sorted(group, key=lambda entry: entry.offset)), row_format(method))
        (layout.dense if isinstance(method, Dense) else layout.coded).append(spans)
    return layout


def effective_method(method: Method, shape: tuple[int, ...], gradient_dtype: torch.dtype) -> Method:
    """What a parameter of this shape gets under `method`: itself, LowRank with its rank cut to the matrix, or Dense.

    Vectors travel dense, and whatever the method would not make smaller; a 16-bit gradient is never widened.
    """
    dense = Dense(wire_dtype(method.dtype if isinstance(method, Dense) else method.dense_dtype, gradient_dtype))
    if isinstance(method, Dense) or folded_shape(shape) is None or not torch.Size(shape).numel():
        return dense
    if isinstance(method, LowRank):
        method, least_ratio = replace(method, rank=min(method.rank, *_folded(shape))), method.min_ratio
    else:
        least_ratio = 1.0
    return method if encoded_bytes(dense, shape) > least_ratio * encoded_bytes(method, shape) else dense


def encoded_bytes(method: Method, shape: tuple[int, ...]) -> int:
    """Encoded bytes of one such parameter under its effective method (LowRank: of both factors)."""
    return sum(section.encoded_bytes() for section in sections(method, shape))


def sections(method: Method, shape: tuple[int, ...]) -> list[Section]:
    """What crosses for one such parameter under its effective method, if it were alone."""
    if isinstance(method, LowRank):
        return [Section(method.rank, length, RowFormat(method.factor_dtype)) for length in _folded(shape)]
    return [Section(1, torch.Size(shape).numel(), row_format(method))]


def row_format(method: Method) -> Format:
    """The format in which values travel one by one."""
    match method:
        case Dense():
            return RowFormat(method.dtype)
        case Quantized():
            return BlockFormat(method.bits, method.block, method.rounding == "stochastic", method.rotate)
        case Sparse():
            return SparseFormat(method.density, method.value_dtype)
    raise TypeError(f"{method} sends factors, not values")


def _folded(shape: tuple[int, ...]) -> tuple[int, int]:
    folded = folded_shape(shape)
    assert folded is not None
    return folded


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
