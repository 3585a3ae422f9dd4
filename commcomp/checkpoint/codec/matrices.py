"""Tensors as matrices of fp32 numbers, and the rows that a chunk holds."""

from __future__ import annotations

import math

import numpy as np

from commcomp.checkpoint.codec.native import Array

FORMATS = {"float32": "fp32", "bfloat16": "bf16"}
"""The coder's name of each dtype that it takes."""

CHUNK_VALUES = 1 << 20


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The most nearly square matrix that a tensor is without moving a value; vectors are one column."""
    total = math.prod(shape)
    if len(shape) < 2 or total == 0:
        return total, 1
    rows = [math.prod(shape[:split]) for split in range(1, len(shape))]
    best = min(rows, key=lambda count: max(count, total // count))
    return best, total // best


def rows_per_chunk(columns: int) -> int:
    """How many whole rows a chunk holds."""
    return max(1, CHUNK_VALUES // columns)


def widen(data: Array, columns: int, count: int) -> Array:
    """Raw bytes (uint8) of `count` fp32 or bf16 values as fp32 [rows, columns]; a view for fp32."""
    width = len(data) // count if count else 4
    if width * count != len(data) or width not in (2, 4) or count % columns:
        raise ValueError(f"{len(data)} bytes are no {count} values of fp32 or bf16 in rows of {columns}")
    if width == 4:
        values = data.view(np.float32) if data.ctypes.data % 4 == 0 else data.copy().view(np.float32)
    else:
        halves = data.view(np.uint16) if data.ctypes.data % 2 == 0 else data.copy().view(np.uint16)
        values = (halves.astype(np.uint32) << 16).view(np.float32)
    return values.reshape(-1, columns)
