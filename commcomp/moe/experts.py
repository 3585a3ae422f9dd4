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


class FeedForwardExperts(nn.Module):
    """This rank's experts: two matrices each, GELU between them."""

    def __init__(self, width: int, hidden: int, numbers: Sequence[int], seed: int) -> None:
        """`numbers`: which of all experts these are; with `seed` they decide the weights, however many ranks there are."""
        super().__init__()
        self.up = nn.Parameter(torch.empty(len(numbers), width, hidden))
        self.down = nn.Parameter(torch.empty(len(numbers), hidden, width))
        for place, number in enumerate(numbers):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} expert {number}".encode()))
            for matrix in (self.up, self.down):
                with torch.no_grad():
                    matrix[place].normal_(std=0.02, generator=generator)

    def forward(self, rows: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """`rows`: [r, width], expert by expert; returns as many."""
        pieces = rows.split(list(rows_per_expert))
        made = [F.gelu(rows @ up, approximate="tanh") @ down for rows, up, down in zip(pieces, self.up, self.down, strict=True)]
        return torch.cat(made)
