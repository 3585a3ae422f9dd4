"""A low-rank matrix as two factors of small integers: what m, and the change of w, look like from afar.

Momentum is a mean of few gradients, and gradients are of low rank (PowerSGD, Vogels et al. 2019). The factors are found
by a randomised range finder with one power iteration (Halko, Martinsson and Tropp 2011, algorithms 4.1 and 5.1), and
rounded to multiples of one step, which spends bits on the strong components. Their product is a sum of few products of
small integers, exact in fp32 whatever the order of summation, so every machine decodes the same bits.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

from commcomp.checkpoint.codec.native import Array, decode_symbols, encode_symbols

MOST_COMPONENTS = 64
_LARGEST = 127
"""Of the integers: 64 products of two such are below 2^24."""
_LEAST_SIDE = 24
"""Matrices with a shorter side are not factored."""


@dataclass(frozen=True)
class Aim:
    """How well factors are to fit: with `most_components` or fewer, and their rounding may add `noise` times what they
    leave over. `tolerated`: mean square of what may be left of a value at no cost, since a lattice will not show it."""

    most_components: int
    tolerated: float = 0.0
    noise: float = 0.03

    def bits_an_entry(self) -> float:
        """What an entry of a factor takes, about; decides the number of components."""
        return 2.0 - 0.5 * math.log2(self.noise)


WITHOUT_FACTORS = Aim(0)


@dataclass(frozen=True)
class Factors:
    """`left` [n, r] and `right` [m, r], int8; the matrix is unit * left right^T."""

    left: Array
    right: Array
    unit: float

    def integers(self, rows: slice) -> Array:
        """left[rows] right^T, exact, as fp32 [rows, m]."""
        product: Array = self.left[rows].astype(np.float32) @ self.right.T.astype(np.float32)
        return product

    def product(self, rows: slice) -> Array:
        """The matrix, fp32 [rows, m]; one rounding."""
        out = self.integers(rows)
        out *= np.float32(self.unit)
        return out

    def pack(self) -> bytes:
        """As bytes: number of components, unit, entropy-coded integers, each component with statistics of its own."""
        num = self.left.shape[1]
        head = struct.pack("<Bf", num, self.unit)
        if num == 0:
            return head
        symbols = np.concatenate([self.left, self.right]).T.astype(np.int16) + 128
        contexts = np.repeat(np.arange(num, dtype=np.uint8), symbols.shape[1])
        return head + encode_symbols(np.ascontiguousarray(symbols, dtype=np.uint8).ravel(), contexts, num)


def unpack_factors(data: bytes, shape: tuple[int, int]) -> Factors:
    """Back. ValueError where `data` is nothing that `pack` made for a matrix of this shape."""
    if len(data) < 5:
        raise ValueError("factors are shorter than their head")
    num, unit = struct.unpack_from("<Bf", data)
    if num > MOST_COMPONENTS or not np.isfinite(unit):
        raise ValueError(f"factors have {num} components and the unit {unit}")
    if num == 0:
        if len(data) > 5:
            raise ValueError("factors without components have bytes")
        return Factors(np.zeros((shape[0], 0), np.int8), np.zeros((shape[1], 0), np.int8), unit)
    length = sum(shape)
    contexts = np.repeat(np.arange(num, dtype=np.uint8), length)
    symbols = decode_symbols(data[5:], num * length, contexts, num).reshape(num, length).astype(np.int16) - 128
    both = np.ascontiguousarray(symbols.T.astype(np.int8))
    return Factors(both[: shape[0]], both[shape[0] :], unit)


def no_factors(shape: tuple[int, int]) -> Factors:
    """Of the zero matrix."""
    return Factors(np.zeros((shape[0], 0), np.int8), np.zeros((shape[1], 0), np.int8), 0.0)


def fit_factors(matrix: Array, aim: Aim) -> Factors:
    """The factors with which `matrix` (fp32 [n, m]) is coded in the fewest bits.

    Inf and NaN count as 0.
    """
    rows, columns = matrix.shape
    most = min(aim.most_components, MOST_COMPONENTS, min(rows, columns) // 4)
    if not most or min(rows, columns) < _LEAST_SIDE:
        return no_factors((rows, columns))
    norm = float(np.sqrt(np.vdot(matrix, matrix)))
    if not np.isfinite(norm):
        matrix = np.nan_to_num(matrix, nan=0.0, posinf=0.0, neginf=0.0)
        norm = float(np.sqrt(np.vdot(matrix, matrix)))
    if not np.isfinite(norm) or norm == 0.0:
        return no_factors((rows, columns))
    # Along the shorter side, where orthonormal columns cost least.
    left, right = _range_finder(matrix, most) if rows <= columns else _range_finder(matrix.T, most)[::-1]
    left_norms, right_norms = (np.sqrt(np.einsum("nr,nr->r", factor, factor)) for factor in (left, right))
    strengths = left_norms.astype(np.float64) * right_norms
    order = np.argsort(-strengths)
    strengths = strengths[order]
    left_over = np.maximum(norm**2 - np.concatenate([[0.0], np.cumsum(strengths**2)]), 1e-12 * norm**2)
    left_over += aim.tolerated * rows * columns
    bits = 0.5 * rows * columns * np.log2(left_over) + aim.bits_an_entry() * (rows + columns) * np.arange(most + 1)
    num = int(bits.argmin())
    if num == 0:
        return no_factors((rows, columns))
    kept = order[:num]
    # Both factors carry the root of a component's strength, so that entries of both are about equally large.
    balance = np.sqrt(right_norms[kept] / left_norms[kept] * np.float32(np.sqrt(rows / columns)))
    left, right = left[:, kept] * balance, right[:, kept] / balance
    noise = aim.noise * left_over[num] / (rows * columns)
    per_step = (np.vdot(left, left) / rows + np.vdot(right, right) / columns) / 12
    step = max(float(np.sqrt(noise / per_step)), float(max(abs(left).max(), abs(right).max())) / _LARGEST)
    whole_left, whole_right = (np.rint(factor / step).astype(np.int8) for factor in (left, right))
    return Factors(whole_left, whole_right, float(np.float32(_unit(matrix, whole_left, whole_right, step))))


def _unit(matrix: Array, left: Array, right: Array, step: float) -> float:
    """step^2 but for what rounding has taken away: the least-squares factor on a few rows."""
    rows = slice(0, 256)
    product = left[rows].astype(np.float32) @ right.T.astype(np.float32)
    energy = float(np.vdot(product, product))
    best = float(np.vdot(product, matrix[rows])) / energy if energy else step**2
    return best if 0.5 * step**2 < best < 2 * step**2 else step**2


def _range_finder(matrix: Array, num: int) -> tuple[Array, Array]:
    """Two factors of about the leading components, [n, num] with orthonormal columns and [m, num] with orthogonal."""
    probe = np.random.default_rng(0).standard_normal((matrix.shape[1], num), dtype=np.float32)
    image = matrix @ probe
    image /= np.abs(image).max()  # what follows has the third power of the scale
    basis = np.linalg.qr(matrix @ (matrix.T @ image))[0]
    right = matrix.T @ basis
    rotation = np.linalg.eigh((right.T @ right).astype(np.float64))[1].astype(np.float32)
    return basis @ rotation, right @ rotation
