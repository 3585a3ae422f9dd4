"""A count sketch with three hashes that is decoded exactly by peeling, once the positions of the values are known.

"Lossless homomorphic compression" (arXiv:2402.07529), the value code of TAGC (arXiv:2504.05638): every value is added,
with a sign, into three cells of a table that is smaller than the gradient. Sketches of several ranks add up to the
sketch of their sum. Who knows the union of the ranks' positions knows how many values lie in each cell; a cell with
one gives that value, which is taken out of its other two cells, and so on. That ends with everything decoded as long as
values / cells stays below 0.818, the threshold of random 3-uniform hypergraphs.

The three cells of a position lie in three different thirds of the table. Positions are hashed one by one: hashing runs
of neighbours alike, as the published code does, makes many small hypergraphs of one, and small ones fail more often.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SAFE_LOAD = 0.65
"""Values per cell up to which peeling leaves nothing undecoded at the sizes in use."""

ROUNDS = 32
"""Peeling rounds. At a load of 0.65 the last value falls in about 15; the number is fixed, so no one asks a device."""

_HASHES = 3
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class SketchShape:
    """A sketch of `length` positions with at least `cells` cells; hashes are fixed by `seed`."""

    length: int
    cells: int
    seed: int = 0

    @property
    def third(self) -> int:
        """Cells in each third of the table."""
        return max(1, -(-self.cells // _HASHES))

    @property
    def numel(self) -> int:
        """Cells of the table, `cells` rounded up."""
        return _HASHES * self.third

    def places(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cells, int64 [3, u], and signs, fp32 [3, u], of `positions`, int64 [u]."""
        words = [_mixed(positions, self.seed * _HASHES + index) for index in range(_HASHES)]
        cells = [(word >> 1) % self.third + index * self.third for index, word in enumerate(words)]
        return torch.stack(cells), torch.stack([1.0 - 2.0 * (word & 1).float() for word in words])


def encode(values: Tensor, positions: Tensor, shape: SketchShape) -> Tensor:
    """The sketch, fp32 [numel], of `values`, fp32 [u], at `positions`, int64 [u]; places that hold `length` are unused.

    Sketches add: the sum of sketches is the sketch of the sum.
    """
    used = positions < shape.length
    cells, signs = shape.places(torch.where(used, positions, 0))
    table = values.new_zeros(shape.numel)
    return table.index_add_(0, cells.view(-1), (signs * torch.where(used, values, 0.0)).view(-1))


def decode(table: Tensor, positions: Tensor, shape: SketchShape) -> tuple[Tensor, Tensor]:
    """Values, fp32 [u], at `positions`, int64 [u], and whether each was decoded, bool [u]; undecoded values are 0.

    `positions` must hold every position that any rank put in, each once; further ones are harmless and decode to 0.
    Unused places hold `length`. `table` is left as it is.
    """
    used = positions < shape.length
    cells, signs = shape.places(torch.where(used, positions, 0))
    table = table.clone()
    waiting = used.clone()
    counts = torch.zeros(shape.numel, dtype=torch.int32, device=table.device)
    _add(counts, cells, used.int().expand(_HASHES, -1))
    values = torch.zeros_like(positions, dtype=table.dtype)
    for _ in range(ROUNDS):
        alone = (counts[cells] == 1) & waiting
        found = alone.any(dim=0)
        # The first of a position's cells in which it is alone; all are decided before any is taken out.
        chosen = alone.int().argmax(dim=0, keepdim=True)
        value = (table[cells.gather(0, chosen)] * signs.gather(0, chosen)).squeeze(0)
        value = torch.where(found, value, 0.0)
        values += value
        waiting &= ~found
        _add(table, cells, -signs * value)
        _add(counts, cells, -found.int().expand(_HASHES, -1))
    return values, ~waiting & used


def _add(table: Tensor, cells: Tensor, values: Tensor) -> None:
    table.index_add_(0, cells.reshape(-1), values.reshape(-1))


def _mixed(positions: Tensor, seed: int) -> Tensor:
    """Non-negative pseudo-random int64, a function of position and seed (SplitMix64's finaliser)."""
    word = (positions + 1) * _signed(_MIX[0]) + _signed((seed * _MIX[1]) & _WORD)
    for shift, factor in ((30, _MIX[1]), (27, _MIX[2])):
        word = (word ^ _shifted(word, shift)) * _signed(factor)
    return (word ^ _shifted(word, 31)) & 0x7FFFFFFFFFFFFFFF


def _shifted(word: Tensor, places: int) -> Tensor:
    """Logical shift to the right."""
    return (word >> places) & ((1 << (64 - places)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
