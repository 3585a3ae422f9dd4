"""The mean at the owner, and sparse means on any pattern: nothing of what was chosen is lost."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist

from commcomp.compressors.wire import FP32, RowFormat, Section
from commcomp.compressors.wire_blocks import BlockFormat
from commcomp.compressors.wire_sparse import SparseFormat
from commcomp.exchange.mean import GatherMean, TwoShotMean
from commcomp.exchange.owner import OwnerMean, ReduceScatterMean, make_owner_exchange
from tests.ranks import run_ranks

SECTIONS = [
    Section(2, 7, RowFormat("bf16")),
    Section(1, 33, BlockFormat(8, 16)),
    Section(3, 5, FP32),
    Section(1, 0, RowFormat("fp16")),
    Section(1, 500, SparseFormat(0.1, "fp32")),
]
DENSITIES = (0.001, 0.01, 0.1, 0.3)
LENGTH = 12_000


def values_of(rank: int, num_ranks: int, sections: list[Section]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(num_ranks, section.rows, section.length, generator=generator) for section in sections]


def at_owner(rank: int, fp32: bool) -> tuple[list, list, list, tuple[int, int]]:
    sections = [Section(2, 7, FP32), Section(1, 11, FP32)] if fp32 else SECTIONS
    # gloo has no real reduce-scatter, so it is never chosen here; it serves other backends.
    assert isinstance(make_owner_exchange(sections, dist.group.WORLD, torch.device("cpu")), OwnerMean)
    exchange = (ReduceScatterMean if fp32 else OwnerMean)(sections, dist.group.WORLD)
    for _ in range(2):  # the same object twice
        values = values_of(rank, dist.get_world_size(), sections)
        exchange.start(values, "step 0")
        exchange.advance()
        shares = [exchange.share(index).clone() for index in range(len(sections))]
        own = [block.clone() for block in exchange.finish()]
        exchange.release()
    return values, shares, own, (exchange.payload_bytes, exchange.wire_bytes)


@pytest.mark.parametrize("fp32", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_each_owner_gets_the_mean_of_its_own_block(num_ranks, fp32):
    outcomes = run_ranks(at_owner, num_ranks, fp32)
    for owner, (_, _, own, (payload, wire)) in enumerate(outcomes):
        for index, block in enumerate(own):
            delivered = sum(shares[index][owner].double() for _, shares, _, _ in outcomes) / num_ranks
            assert torch.allclose(block.double(), delivered, atol=1e-6)
        if not fp32:
            block_bytes = sum(section.encoded_bytes() for section in SECTIONS)
            assert (payload, wire) == (num_ranks * block_bytes, (num_ranks - 1) * block_bytes)
    for values, shares, _, _ in outcomes:
        for index in (0, 1, 2):  # near to what was given, where that is not sparse
            if index < len(values):
                assert torch.allclose(shares[index], values[index], atol=0.05)


def sparse_means(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each density and pattern: this rank's share, and the mean."""
    found = []
    for density in DENSITIES:
        section = Section(1, LENGTH, SparseFormat(density, "fp32"))
        for pattern in (GatherMean, TwoShotMean):
            exchange = pattern([section], dist.group.WORLD)
            exchange.start([torch.randn(1, LENGTH, generator=torch.Generator().manual_seed(rank))], "step 0")
            exchange.advance()
            found.append((exchange.share(0).clone(), exchange.finish()[0].clone()))
            exchange.release()
    return found


@functools.cache
def all_sparse_means(num_ranks: int) -> list:
    return run_ranks(sparse_means, num_ranks, timeout=120)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_a_sparse_mean_is_the_dense_mean_of_what_the_ranks_chose(num_ranks):
    """Different choices on every rank, densities of 0.1 % to 30 %: equal to rounding, no element lost."""
    everyone = all_sparse_means(num_ranks)
    for case in range(2 * len(DENSITIES)):
        shares = [own[case][0].double() for own in everyone]
        means = [own[case][1] for own in everyone]
        assert all(torch.equal(mean, means[0]) for mean in means)
        assert torch.allclose(means[0].double(), sum(shares) / num_ranks, atol=1e-6)
        density = DENSITIES[case // 2]
        for rank, share in enumerate(shares):
            chosen = int((share != 0).sum())
            assert chosen >= 0.8 * density * LENGTH
            given = torch.randn(1, LENGTH, generator=torch.Generator().manual_seed(rank)).double()
            if case % 2 == 0:  # gather: nobody rounds on the way
                assert torch.equal(share[share != 0], given[share != 0])
