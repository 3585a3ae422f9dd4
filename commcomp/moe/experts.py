"""A gate and feed-forward experts, for `MoELayer`."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
        with torch.autocast(tokens.device.type, enabled=False):
            shares = F.linear(tokens.float(), self.weight.float()).softmax(-1)
        weights, experts = shares.topk(self.top_k, dim=-1)
        # Switch Transformer (arXiv:2101.03961), equations 4 to 6, over all choices of a token.
        number = max(1, len(tokens))  # of no tokens it is 0
        chosen = torch.zeros_like(shares).scatter_(1, experts, 1.0).sum(0) / (number * self.top_k)
        balance = len(self.weight) * (chosen * (shares.sum(0) / number)).sum()
        return Routing(experts, weights / weights.sum(-1, keepdim=True), balance)


class FeedForward(nn.Module):
    """Two matrices with GELU between them; `seed` decides the weights. Their gradients are divided by `ranks`."""

    def __init__(self, width: int, hidden: int, seed: int, ranks: int = 1) -> None:
        super().__init__()
        self.ranks = ranks
        generator = torch.Generator().manual_seed(seed)
        self.up = nn.Parameter(torch.empty(width, hidden).normal_(std=0.02, generator=generator))
        self.down = nn.Parameter(torch.empty(hidden, width).normal_(std=0.02, generator=generator))

    def forward(self, rows: Tensor) -> Tensor:
        """[r, width] to the same."""
        up, down = (_Averaged.apply(one, self.ranks).to(rows.dtype) for one in (self.up, self.down))
        return F.gelu(rows @ up, approximate="tanh") @ down


class _Averaged(torch.autograd.Function):
    """A parameter whose gradient is divided by `ranks`. A hook would not go along when it is copied or replaced."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.ranks, None


class Experts(nn.ModuleDict):
    """This rank's experts, named by their numbers among all: checkpoints are of any number of ranks then."""

    def __init__(self, width: int, hidden: int, numbers: Sequence[int], seed: int, ranks: int) -> None:
        made = {str(number): FeedForward(width, hidden, _seed_of(seed, number), ranks) for number in numbers}
        super().__init__(made)

    def forward(self, rows: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """`rows`: [r, width], expert by expert; returns as many."""
        pieces = rows.split(list(rows_per_expert))
        return torch.cat([expert(piece) for expert, piece in zip(self.values(), pieces, strict=True)])


def _seed_of(seed: int, number: int) -> int:
    return zlib.crc32(f"{seed} expert {number}".encode())
