"""Rows that lie near to others, found by their distances: few leaders such that every row has one within its reach."""

from __future__ import annotations

import torch
from torch import Tensor

from commcomp.compressors import native

BLOCK = 512
"""Rows of one expert that are compared with one another."""

_ROUNDS = 12
"""A row's lot is settled when those of earlier rows in its reach are: this many links of such a chain are followed."""


def nearest_leaders(sketches: Tensor, experts: Tensor, counts: Tensor, reach: Tensor) -> Tensor:
    """int64 [n]: for each row an earlier one to stand for it, which stands for itself; or itself.

    In order, a row becomes a leader unless an earlier leader is within its reach; then it follows the nearest of those.
    Only rows of one expert, and of one block of `BLOCK` of these, are compared. What becomes of a row depends on itself
    and on rows before it alone. Rows that are not finite stay alone. No host waits; memory is `BLOCK` numbers a row.

    `sketches`: fp32 [n, length], by expert; `experts`: int64 [n]; `counts`: int64 [experts], rows of each. `reach`:
    fp32 [n], a squared distance.
    """
    found = _native_leaders(sketches, counts, reach)
    if found is not None:
        return found
    place, slots = _places(experts, counts)
    table = sketches.new_full((slots * BLOCK, sketches.shape[1]), torch.nan)
    table = table.index_copy_(0, place, sketches).unflatten(0, (slots, BLOCK))
    within = reach.new_full((slots * BLOCK,), -1.0).index_copy_(0, place, reach).view(slots, BLOCK, 1)
    distances = _distances(table)
    earlier = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=table.device).tril(-1)
    near = ((distances <= within) & earlier).to(table.dtype)
    leads = torch.ones(slots, BLOCK, 1, dtype=table.dtype, device=table.device)
    for _ in range(_ROUNDS):
        leads = (near.bmm(leads) == 0).to(table.dtype)
    near.mul_(leads.transpose(1, 2))
    distances = distances.masked_fill_(near == 0, torch.inf)
    nearest = distances.min(-1)
    own = torch.arange(BLOCK, device=table.device)
    follows = (leads.squeeze(-1) == 0) & (nearest.values < torch.inf)
    chosen = torch.where(follows, nearest.indices, own)
    rows = torch.full((slots * BLOCK,), -1, dtype=torch.int64, device=table.device)
    rows.index_copy_(0, place, torch.arange(len(place), device=place.device))
    return rows.view(slots, BLOCK).gather(1, chosen).view(-1).index_select(0, place)


def _native_leaders(sketches: Tensor, counts: Tensor, reach: Tensor) -> Tensor | None:
    if not native.available or sketches.device.type != "cpu" or sketches.dtype != torch.float32:
        return None
    rows, length = sketches.shape
    numbers = counts.tolist()
    if reach.shape != (rows,) or reach.dtype != torch.float32 or sum(numbers) != rows or min(numbers, default=0) < 0:
        raise ValueError(f"reach is {tuple(reach.shape)} {reach.dtype}, counts are {numbers}; rows: {rows}")
    sketches, reach = sketches.contiguous(), reach.contiguous()
    starts: list[int] = []
    end = 0
    for count in numbers:
        starts += range(end, end + count, BLOCK)
        end += count
    bounds, out = torch.tensor([*starts, end]), torch.empty(rows, dtype=torch.int64)
    # Each row is compared with a few hundred others.
    threads = native.threads_for(rows * length * (BLOCK // 8))
    places = sketches.data_ptr(), length, bounds.data_ptr(), len(starts), reach.data_ptr(), out.data_ptr()
    native._native.nearest_leaders(*places, threads)
    return out


def _places(experts: Tensor, counts: Tensor) -> tuple[Tensor, int]:
    """Where each row lies if every expert's rows begin a block; and how many blocks there can be at most."""
    blocks = -(-counts // BLOCK)
    first_row, first_block = counts.cumsum(0) - counts, blocks.cumsum(0) - blocks
    shift = first_block * BLOCK - first_row
    place = torch.arange(len(experts), device=experts.device) + shift.index_select(0, experts)
    return place, len(experts) // BLOCK + min(len(counts), len(experts))


def _distances(table: Tensor) -> Tensor:
    """Squared, [slots, BLOCK, BLOCK]."""
    norms = torch.linalg.vecdot(table, table)
    return torch.baddbmm(norms.unsqueeze(2) + norms.unsqueeze(1), table, table.transpose(1, 2), alpha=-2.0)
