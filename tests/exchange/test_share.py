"""A rank's own share taken away in one go: to the bit what subtracting the decoded share gives, on every pattern."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from commcomp.compressors import native
from commcomp.compressors.wire import FP32, RowFormat, Section
from commcomp.compressors.wire_blocks import BlockFormat
from commcomp.compressors.wire_sparse import SparseFormat
from commcomp.exchange.exchange import Share
from commcomp.exchange.mean import AllReduceMean, GatherMean, TwoShotMean
from commcomp.exchange.owner import OwnerMean, ReduceScatterMean
from tests.ranks import run_ranks
from tests.reference.given_gradients import same_bits

FORMATS = [
    RowFormat("int8"),
    BlockFormat(8, 16),
    BlockFormat(4, 8, rotate=True),
    BlockFormat(4, 16, stochastic=True),
    SparseFormat(0.1, "fp32"),
    SparseFormat(0.02, "int8"),
]
SIZES = [(1, 1), (1, 2), (2, 7), (1, 600), (1, 601), (3, 300)]
"""Rows and length: shorter than the number of ranks, whole slices for every rank, and a cut last one."""
CODED = [Section(*size, form) for form in FORMATS for size in SIZES]
PLAIN = [Section(*size, FP32) for size in SIZES]


def left_over(rank: int) -> dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """For each pattern and section: total minus share by two operations, in one, and in one in place."""
    num_ranks, found = dist.get_world_size(), {}
    for pattern in (AllReduceMean, GatherMean, TwoShotMean, OwnerMean, ReduceScatterMean):
        sections = PLAIN if pattern in (AllReduceMean, ReduceScatterMean) else CODED
        owners = (num_ranks,) if pattern in (OwnerMean, ReduceScatterMean) else ()
        exchange = pattern(sections, dist.group.WORLD)
        generator = torch.Generator().manual_seed(rank)
        totals = [torch.randn(*owners, one.rows, one.length, generator=generator) for one in sections]
        exchange.start([total.clone() for total in totals], "step 0")
        exchange.advance()
        shares = [Share(exchange, index) for index in range(len(sections))]
        found[pattern.__name__] = []
        for share, total in zip(shares, totals, strict=True):
            expected, out, inside = total - share.decoded(), torch.empty_like(total), total.clone()
            share.subtract_from(total, out)
            share.subtract_from(inside, inside)
            found[pattern.__name__].append((expected, out, inside))
        exchange.finish()
        exchange.release()
    return found


def by_torch(rank: int) -> dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    with mock.patch.object(native, "available", False):
        return left_over(rank)


@functools.cache
def outcomes(num_ranks: int, natively: bool) -> list[dict]:
    return run_ranks(left_over if natively else by_torch, num_ranks)


@pytest.mark.parametrize("natively", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_subtracting_a_share_is_subtracting_what_it_decodes_to(num_ranks, natively):
    for outcome in outcomes(num_ranks, natively):
        for pattern, cases in outcome.items():
            for index, (expected, out, inside) in enumerate(cases):
                assert same_bits(out, expected), (pattern, index)
                assert same_bits(inside, expected), (pattern, index)
                assert pattern in ("AllReduceMean", "ReduceScatterMean") or out.any() or out.numel() < 8
