"""Cross-polytope hashing of rows: similar rows get equal keys.

A row is turned by random signs and a Walsh-Hadamard matrix, twice, and cut to a few coordinates; its hash is which of
them is largest in magnitude, and that one's sign (Andoni et al. 2015, arXiv:1509.02897, section 5; for MoE tokens
LSH-MoE, arXiv:2411.08446). Several hashes are concatenated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from commcomp.compressors import quantize

_EXPERT_SHIFT = 50
_HASH_BITS = (1 << _EXPERT_SHIFT) - 1
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)
MOST_EXPERTS = 1 << (63 - _EXPERT_SHIFT)


class TokenHash:
    """`hashes` hashes of `coords` coordinates each, fixed by `seed`, of rows of `length` values."""

    def __init__(self, length: int, hashes: int, coords: int, seed: int) -> None:
        self.hashes, self.coords = hashes, coords
        # What is kept of both rotations is one thin matrix: a product with it costs less than the rotations do.
        self._projection = _projection(length, hashes * coords, seed)

    def turned(self, rows: Tensor) -> Tensor:
        """[n, length] to [n, hashes * coords], the same dtype, scaled so that squared lengths are kept in the mean."""
        return rows @ self.projection_on(rows.device).to(rows.dtype)

    def keys(self, rows: Tensor, experts: Tensor) -> Tensor:
        """int64 [n]: equal for rows of one expert with equal hashes.

        `rows`: [n, length]; `experts`: int64 [n], below `MOST_EXPERTS`. Keys rise with the expert. Which key a row
        that is not finite gets is not said.
        """
        turned = self.turned(rows).unflatten(1, (self.hashes, self.coords))
        largest = turned.abs().argmax(-1, keepdim=True)
        digits = (2 * largest + (turned.gather(-1, largest) < 0)).squeeze(-1)
        mixed = torch.zeros_like(experts)
        for digit in digits.unbind(1):
            mixed = (mixed + digit + 1) * _MULTIPLIER
        return (experts << _EXPERT_SHIFT) | ((mixed >> (64 - _EXPERT_SHIFT)) & _HASH_BITS)

    def projection_on(self, device: torch.device) -> Tensor:
        """fp32 [length, hashes * coords]: what turns a row."""
        if self._projection.device != device:
            self._projection = self._projection.to(device)
        return self._projection


def most_coords(length: int, hashes: int) -> int:
    """The most coordinates that each of `hashes` hashes of rows of `length` values can have."""
    return _padded(length) // hashes


def _padded(length: int) -> int:
    return 1 << max(1, math.ceil(math.log2(length)))


def _projection(length: int, columns: int, seed: int) -> Tensor:
    size = _padded(length)
    if columns > size:
        raise ValueError(f"{columns} coordinates of rows of {length} values; expected at most {size}")
    # Turned from the side of the coordinates, so that only those that are kept are worked out.
    kept = torch.eye(columns, size)
    for index in (2 * seed + 1, 2 * seed):
        kept = quantize.rotate_back(kept, quantize.random_signs(size, index))
    return kept[:, :length].T.mul((size / columns) ** 0.5).contiguous()
