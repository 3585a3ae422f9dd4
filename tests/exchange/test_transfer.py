"""Blocks of bytes between ranks: many transfers at once, of any size, each to its own place."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from commcomp.exchange.transfer import all_gather, all_to_all
from tests.ranks import run_ranks

SIZES = (1, 0, 70_000, 3, 1_000_003, 17)


def _block(sender: int, receiver: int, turn: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * turn + 10 * sender + receiver)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


def _all_at_once(rank: int) -> bool:
    """Start everything, the even ranks late, then wait in the other order."""
    num_ranks, group = dist.get_world_size(), dist.group.WORLD
    started = []
    if rank % 2 == 0:
        time.sleep(0.2)  # late: its peers' blocks are there before it is ready for them
    for turn, size in enumerate(SIZES):
        blocks = torch.stack([_block(rank, other, turn, size) for other in range(num_ranks)])
        out = torch.zeros_like(blocks)
        wanted = torch.stack([_block(other, rank, turn, size) for other in range(num_ranks)])
        started.append((all_to_all(out, blocks, group), out, wanted))
        gathered = torch.zeros(num_ranks, size, dtype=torch.uint8)
        all_own = torch.stack([_block(other, other, turn, size) for other in range(num_ranks)])
        started.append((all_gather(gathered, _block(rank, rank, turn, size), group), gathered, all_own))
    for transfer, _, _ in reversed(started):
        transfer.wait()
    return all(torch.equal(out, wanted) for _, out, wanted in started)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_block_arrives_where_it_belongs(num_ranks):
    assert all(run_ranks(_all_at_once, num_ranks))
