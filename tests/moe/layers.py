"""What tests of tokens share: rows that form clusters, compressors that know their experts, and a reference layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from commcomp.moe import LSH, TokenCompressor
from commcomp.moe.learnt import Learnt


def clustered(shape: tuple[int, ...], *, seed: int, points: int = 8, noise: float = 0.1) -> Tensor:
    """Rows around a few points, [*shape]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(points, shape[-1], generator=generator)
    chosen = torch.randint(0, points, shape[:-1], generator=generator)
    return centres[chosen] + noise * torch.randn(shape, generator=generator)


def ready(compressor: TokenCompressor, experts: int, width: int) -> TokenCompressor:
    """As after training for a while: it knows what experts' rows are like, and changes nothing for the next passes."""
    compressor.set_extra_state(Learnt(passes=65, centres=torch.zeros(experts, width)).to_text())
    return compressor


def lsh(**settings: Any) -> LSH:
    """Without a rate to keep."""
    return LSH(**{"rate": None, "farthest": 0.7, **settings})


PUBLISHED = lsh(search="hash", hashes=2, coords=8, centroid="mean", compensate="both", farthest=None)


class RowByRow(nn.Module):
    """An expert whose answer for a row is the same to the bit whatever other rows there are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, rows: Tensor) -> Tensor:
        return torch.sin(rows * self.weight) + rows.flip(-1).square()
