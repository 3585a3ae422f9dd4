"""How wide a matrix's values scatter, by row and by column: a factor for each, in eighths of an octave."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from commcomp.checkpoint.codec.blocks import join_blocks, pack_int16, split_blocks, unpack_int16
from commcomp.checkpoint.codec.keys import OCTAVE, key_of, value_of
from commcomp.checkpoint.codec.native import Array

_UNIT = OCTAVE // 8
_ONE = 127 << 23
_FEWEST = 32
"""Rows and columns of shorter matrices share one factor."""


@dataclass(frozen=True)
class Spread:
    """The scatter at (i, j) is rows[i] times columns[j]; int32 [n] and [m] in eighths of an octave, 0 for 1."""

    rows: Array
    columns: Array

    def times(self, reference: Array | float, rows: slice) -> Array:
        """reference * rows * columns for some rows, fp32 [rows, m]; two roundings."""
        row, column = (value_of(_ONE + keys.astype(np.int64) * _UNIT) for keys in (self.rows[rows], self.columns))
        if isinstance(reference, float):
            out: Array = np.float32(reference) * row[:, None] * column[None, :]
            return out
        with np.errstate(all="ignore"):  # a reference may be Inf, or as large as there is
            out = reference * row[:, None]
            out *= column[None, :]
        return out

    def pack(self) -> bytes:
        """As bytes."""
        return join_blocks([pack_int16(self.rows), pack_int16(self.columns)])


def unpack_spread(data: bytes, shape: tuple[int, int]) -> Spread:
    """Back. ValueError where `data` is nothing that `pack` made for a matrix of this shape."""
    rows, columns = split_blocks(data, 2)
    return Spread(unpack_int16(rows, shape[0]), unpack_int16(columns, shape[1]))


def fit_spread(ratios: Array) -> Spread:
    """`ratios`, fp32 [n, m], at least 0: |error| / reference of every value; overwritten. NaN counts as 0."""
    rows, columns = ratios.shape
    np.minimum(ratios, np.float32(1e18), out=ratios)
    row_means, column_means = means(ratios)
    if np.isnan(row_means).any():
        row_means, column_means = means(np.nan_to_num(ratios, copy=False))
    overall = max(float(row_means.mean(dtype=np.float64)), 1e-30)
    by_row, by_column = np.full(rows, overall), np.full(columns, 1.0)
    if min(rows, columns) >= _FEWEST:
        by_row = np.maximum(row_means, 2.0**-20 * overall)
        by_column = np.maximum(column_means / overall, 2.0**-20)
    return Spread(_eighths(by_row * np.sqrt(np.pi / 2)), _eighths(by_column))


def means(matrix: Array) -> tuple[Array, Array]:
    """Of the rows and of the columns of an fp32 matrix; products with a vector of ones are several times faster."""
    rows, columns = matrix.shape
    by_row = matrix @ np.full(columns, 1 / columns, np.float32)
    return by_row, np.full(rows, 1 / rows, np.float32) @ matrix


def _eighths(values: Array) -> Array:
    keys = key_of(np.maximum(values, 1e-37).astype(np.float32)).astype(np.int64)
    return ((keys - _ONE + _UNIT // 2) // _UNIT).astype(np.int32)
