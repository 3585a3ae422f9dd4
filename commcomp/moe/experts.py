"""A gate and feed-forward experts, for `MoELayer`."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """Where n tokens go, each to `top_k` experts."""

    experts: Tensor
    """int64 [n, top_k]."""
    weights: Tensor
    """[n, top_k]: what each expert's answer counts; they add to 1."""
    balance_loss: Tensor
    """Scalar; 1 where all experts get as many tokens."""


class Gate(nn.Module):
    """Softmax over a linear map; the `top_k` likeliest experts of a token, with their shares made to add to 1."""

    def __init__(self, width: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Routing:
        """`tokens`: [n, width]."""
        shares = F.linear(tokens.float(), self.weight.float()).softmax(-1)
        weights, experts = shares.topk(self.top_k, dim=-1)
        # Switch Transformer (arXiv:2101.03961), equations 4 to 6, over all choices of a token.
        chosen = torch.zeros_like(shares).scatter_(1, experts, 1.0).mean(0) / self.top_k
        balance = len(self.weight) * (chosen * shares.mean(0)).sum()
        return Routing(experts, weights / weights.sum(-1, keepdim=True), balance)


class FeedForward(nn.Module):
    """Two matrices with GELU between them; `seed` decides the weights."""

    def __init__(self, width: int, hidden: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.up = nn.Parameter(torch.empty(width, hidden).normal_(std=0.02, generator=generator))
        self.down = nn.Parameter(torch.empty(hidden, width).normal_(std=0.02, generator=generator))

    def forward(self, rows: Tensor) -> Tensor:
        """[r, width] to the same."""
        return F.gelu(rows @ self.up.to(rows.dtype), approximate="tanh") @ self.down.to(rows.dtype)


class Experts(nn.ModuleDict):
    """This rank's experts, named by their numbers among all: checkpoints are of any number of ranks then."""

    def __init__(self, width: int, hidden: int, numbers: Sequence[int], seed: int) -> None:
        made = {str(number): FeedForward(width, hidden, _seed_of(seed, number)) for number in numbers}
        super().__init__(made)

    def forward(self, rows: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """`rows`: [r, width], expert by expert; returns as many."""
        pieces = rows.split(list(rows_per_expert))
        return torch.cat([expert(piece) for expert, piece in zip(self.values(), pieces, strict=True)])


def _seed_of(seed: int, number: int) -> int:
    return zlib.crc32(f"{seed} expert {number}".encode())
