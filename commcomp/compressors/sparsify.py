"""Choosing the largest values of a gradient without waiting for the device, and coding where they lie.

Positions are coded by blocks of 256: a count a block, and each position's offset in its block, one byte each. That is
9 bits a value at 3 % density and 24 at 0.2 %, where a bitmap takes 33 and 500; from one value in 8 on, a bitmap is
smaller. All sizes are fixed by the capacity, so nobody has to ask how many values there were.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
_MOST_IN_BLOCK = 255  # what a count of one byte can say
_SAMPLE = 1 << 16


def magnitude_threshold(values: Tensor, count: int) -> Tensor:
    """A magnitude that about `count` of `values` (fp32 [n]) reach, a scalar tensor; nothing is read by the host.

    The quantile of an evenly strided sample of some 65 536 values: it finds a density of 1 % with a standard error of
    4 %. Never 0, so that a gradient which is mostly zero is not selected whole.
    """
    smallest = torch.finfo(torch.float32).tiny
    if count >= values.numel():
        return torch.full((), smallest, device=values.device)
    stride = values.numel() // _SAMPLE | 1  # odd: an even one would meet few of the columns of usual matrices
    sample = values[::stride].abs()
    kept = min(max(round(count * sample.numel() / values.numel()), 1), sample.numel())
    return sample.topk(kept, sorted=True).values[-1].clamp_min(smallest)


def select(values: Tensor, threshold: Tensor, capacity: int, *, by_offsets: bool = True) -> Tensor:
    """Positions, int64 [capacity] ascending, of values (fp32 [n]) whose magnitude reaches `threshold`.

    At most `capacity` are taken and, where positions go as offsets, at most 255 in a block of 256, the first ones; what
    is left over stays in the residual. Unused places hold n. NaN counts as large: it must reach the optimizer.
    """
    length = values.numel()
    chosen = ~(values.abs() < threshold)
    if by_offsets:
        blocks = chosen[: length // BLOCK * BLOCK].view(-1, BLOCK)
        blocks[:, -1] &= ~blocks.all(dim=1)
    return torch.nonzero_static(chosen, size=capacity, fill_value=length).view(-1)


def num_blocks(length: int) -> int:
    """Blocks that `length` positions fall into."""
    return -(-length // BLOCK)


def encode_positions(positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Ascending positions below `length`, padded with `length`: counts uint8 [blocks], offsets uint8 [capacity]."""
    blocks = positions // BLOCK
    used = positions < length
    counts = torch.zeros(num_blocks(length) + 1, dtype=torch.int64, device=positions.device)
    counts.scatter_add_(0, torch.where(used, blocks, num_blocks(length)), used.long())
    return counts[:-1].to(torch.uint8), (positions % BLOCK).to(torch.uint8)


def decode_positions(counts: Tensor, offsets: Tensor, length: int) -> Tensor:
    """Inverse of `encode_positions`, int64 [capacity]; places beyond the counts' sum hold `length`."""
    ends = counts.long().cumsum(0)
    places = torch.arange(offsets.numel(), device=offsets.device)
    blocks = torch.searchsorted(ends, places, right=True)
    return torch.where(blocks < counts.numel(), blocks * BLOCK + offsets.long(), length).clamp_max(length)


def pack_bitmap(mask: Tensor) -> Tensor:
    """bool [..., n] as uint8 [..., ceil(n / 8)], the first position in the lowest bit."""
    missing = -mask.shape[-1] % 8
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, missing)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(dim=-1, dtype=torch.uint8)


def unpack_bitmap(packed: Tensor, length: int) -> Tensor:
    """Inverse of `pack_bitmap`: uint8 [..., ceil(n / 8)] to bool [..., n]."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> places) & 1).flatten(-2)[..., :length].bool()
