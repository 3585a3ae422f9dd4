"""The mean over ranks, by all three patterns, in every format, on 1 to 4 ranks."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.distributed as dist

from commcomp.compressors.wire import RowFormat, Section
from commcomp.exchange.mean import AllReduceMean, GatherMean, TwoShotMean, make_exchange, ring_bytes
from tests.ranks import run_ranks
from tests.reference.given_gradients import same_bits

PATTERNS = {"all-reduce": AllReduceMean, "gather": GatherMean, "two-shot": TwoShotMean}
DTYPES = ("fp32", "fp16", "bf16", "int8")
CASES = [("all-reduce", "fp32"), *((pattern, dtype) for pattern in ("gather", "two-shot") for dtype in DTYPES)]
SIZES = [(3, 7), (2, 1), (4, 32), (2, 0), (1, 3), (1, 101), (1, 2)]
"""Rows and length of the sections: odd lengths, and shorter than the number of ranks."""
UNIT = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7, "int8": 1 / 127}
"""Largest rounding step of each format, relative to the largest value of a row."""
ALL_RANKS = pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
ALL_CASES = pytest.mark.parametrize(("pattern", "dtype"), CASES)
BAD_PLACES = {float("nan"): (2, 1, 30), float("inf"): (0, 2, 6), -float("inf"): (5, 0, 0)}
"""A bad number to the section, row and column that hold it, on the last rank only."""


def sections(dtype: str) -> list[Section]:
    return [Section(rows, length, RowFormat(dtype)) for rows, length in SIZES]


def all_shares(exchange) -> list[torch.Tensor]:
    return [exchange.share(index) for index in range(len(exchange.sections))]


def make_values(rank: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return [
        torch.randn(rows, length, generator=generator) * 10.0 ** torch.arange(-2, rows - 2).view(rows, 1)
        + torch.arange(rows).view(rows, 1)
        for rows, length in SIZES
    ]


def exchange_everything(rank: int) -> dict:
    outcomes = {}
    for pattern, dtype in CASES:
        exchange = PATTERNS[pattern](sections(dtype), dist.group.WORLD)
        by_input = {}
        for seed in (0, 1):  # the same object twice
            by_input[seed] = once(exchange, make_values(rank, seed))
        for bad, (section, row, column) in BAD_PLACES.items():
            values = make_values(rank)
            if rank == dist.get_world_size() - 1:
                values[section][row, column] = bad
            by_input[str(bad)] = once(exchange, values)
        by_input["again"] = once(exchange, make_values(rank))
        outcomes[pattern, dtype] = {**by_input, "bytes": (exchange.payload_bytes, exchange.wire_bytes)}
    return outcomes


def once(exchange, values: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor], bool]:
    """Means, shares, and whether the shares did not change from `advance` until the end."""
    before = [block.clone() for block in values]
    exchange.start(values, "step 0")
    exchange.advance()
    early = [block.clone() for block in all_shares(exchange)]
    means = [block.clone() for block in exchange.finish()]
    assert all(torch.equal(block, old) or not old.isfinite().all() for block, old in zip(values, before, strict=True))
    delivered = [block.clone() for block in all_shares(exchange)]
    exchange.release()
    kept = all(same_bits(old, new) for old, new in zip(early, delivered, strict=True))
    return means, delivered, kept


@functools.cache
def outcomes(num_ranks: int) -> list[dict]:
    return run_ranks(exchange_everything, num_ranks)


def exact_mean(num_ranks: int, seed: int) -> list[torch.Tensor]:
    everyone = [make_values(rank, seed) for rank in range(num_ranks)]
    return [sum(block.double() for block in blocks) / num_ranks for blocks in zip(*everyone, strict=True)]


def row_scale(blocks_by_rank: list[torch.Tensor]) -> torch.Tensor:
    if not blocks_by_rank[0].numel():
        return torch.zeros(blocks_by_rank[0].shape[0], 1)
    return torch.stack(blocks_by_rank).abs().amax(dim=(0, 2)).unsqueeze(-1)


@ALL_RANKS
@ALL_CASES
@pytest.mark.parametrize("seed", [0, 1, "again"])
def test_result_is_the_mean_to_the_formats_rounding(num_ranks, pattern, dtype, seed):
    data_seed = 0 if seed == "again" else seed
    expected = exact_mean(num_ranks, data_seed)
    for outcome in outcomes(num_ranks):
        means, _, _ = outcome[pattern, dtype][seed]
        for index, (mean, exact) in enumerate(zip(means, expected, strict=True)):
            assert mean.shape == SIZES[index] and mean.dtype == torch.float32
            scale = row_scale([make_values(rank, data_seed)[index] for rank in range(num_ranks)])
            assert ((mean - exact).abs() <= 1.01 * UNIT[dtype] * scale + 1e-6 * scale + 1e-7).all()


@ALL_RANKS
@ALL_CASES
@pytest.mark.parametrize("which", [0, 1, "nan", "inf", "-inf"])
def test_every_rank_ends_with_the_same_bits(num_ranks, pattern, dtype, which):
    first, *others = (outcome[pattern, dtype][which][0] for outcome in outcomes(num_ranks))
    for other in others:
        assert all(same_bits(left, right) for left, right in zip(first, other, strict=True))


@ALL_RANKS
@ALL_CASES
def test_the_object_is_reusable_and_keeps_nothing_of_a_bad_exchange(num_ranks, pattern, dtype):
    for outcome in outcomes(num_ranks):
        for part in (0, 1):
            pairs = zip(outcome[pattern, dtype][0][part], outcome[pattern, dtype]["again"][part], strict=True)
            assert all(same_bits(left, right) for left, right in pairs)


@ALL_RANKS
@ALL_CASES
@pytest.mark.parametrize("seed", [0, 1])
def test_the_mean_of_what_was_delivered_is_the_result(num_ranks, pattern, dtype, seed):
    everyone = [outcome[pattern, dtype][seed] for outcome in outcomes(num_ranks)]
    for index, mean in enumerate(everyone[0][0]):
        shares = [delivered[index] for _, delivered, _ in everyone]
        scale = row_scale(shares)
        assert all(share.shape == mean.shape and share.dtype == torch.float32 for share in shares)
        total = sum(share.double() for share in shares) / num_ranks
        assert ((total - mean).abs() <= 1e-6 * scale).all()
    assert all(kept for _, _, kept in everyone)


@ALL_RANKS
@ALL_CASES
def test_own_share_is_the_own_value_to_the_formats_rounding(num_ranks, pattern, dtype):
    for rank, outcome in enumerate(outcomes(num_ranks)):
        _, delivered, _ = outcome[pattern, dtype][0]
        for index, (share, value) in enumerate(zip(delivered, make_values(rank), strict=True)):
            scale = row_scale([make_values(other)[index] for other in range(num_ranks)])
            # In two-shot an owner takes the second rounding of the mean N times over.
            times = 1 + (num_ranks if pattern == "two-shot" else 0)
            assert ((share - value).abs() <= 0.51 * times * UNIT[dtype] * scale + 1e-6 * scale + 1e-7).all()


@ALL_RANKS
@ALL_CASES
@pytest.mark.parametrize("bad", list(BAD_PLACES))
def test_bad_numbers_reach_all_ranks_in_their_row_alone(num_ranks, pattern, dtype, bad):
    where, row, column = BAD_PLACES[bad]
    for outcome in outcomes(num_ranks):
        means, clean = outcome[pattern, dtype][str(bad)][0], outcome[pattern, dtype][0][0]
        assert not means[where][row, column].isfinite()
        for index, (mean, expected) in enumerate(zip(means, clean, strict=True)):
            others = torch.ones(len(mean), dtype=torch.bool)
            if index == where:
                others[row] = False
            assert same_bits(mean[others], expected[others])


@ALL_RANKS
@ALL_CASES
def test_byte_counts_follow_the_formulas(num_ranks, pattern, dtype):
    whole = sum(section.encoded_bytes() for section in sections(dtype))
    slices = [section.of_length(math.ceil(section.length / num_ranks)) for section in sections(dtype)]
    sliced = sum(section.encoded_bytes() for section in slices)
    payload, wire = {
        "all-reduce": (whole, 2 * (num_ranks - 1) * whole // num_ranks),
        "gather": (whole, (num_ranks - 1) * whole),
        "two-shot": ((num_ranks + 1) * sliced, 2 * (num_ranks - 1) * sliced),
    }[pattern]
    for outcome in outcomes(num_ranks):
        assert outcome[pattern, dtype]["bytes"] == (payload, wire)


@pytest.mark.parametrize(("num_ranks", "expected"), [(1, 0), (2, 1000), (3, 1333), (4, 1500)])
def test_ring_bytes(num_ranks, expected):
    assert ring_bytes(1000, num_ranks) == expected


def special_exchanges(rank: int) -> dict:
    group, results = dist.group.WORLD, {}
    flat = torch.arange(5.0) + rank
    exchange = make_exchange([Section(1, 5, RowFormat("fp32"))], group, in_place=True)
    exchange.start([flat.unsqueeze(0)], "step 0")
    exchange.advance()
    (mean,) = exchange.finish()
    results["in place"] = (mean.data_ptr() == flat.data_ptr(), flat)
    for dtype in DTYPES:
        formats = RowFormat("fp32"), RowFormat(dtype), RowFormat("bf16")
        mixed = make_exchange([Section(*size, way) for size, way in zip([(1, 5), (2, 9), (1, 1)], formats)], group)
        blocks = [torch.full((1, 5), rank + 1.0), torch.full((2, 9), rank + 1.0), torch.full((1, 1), rank + 1.0)]
        mixed.start(blocks, "step 0")
        mixed.advance()
        results["mixed", dtype] = [block.clone() for block in mixed.finish()]
    results["patterns"] = [type(make_exchange([Section(1, 400, RowFormat(dtype))], group)).__name__ for dtype in DTYPES]
    return results


@ALL_RANKS
def test_in_place_reduction_overwrites_its_only_section(num_ranks):
    for same_memory, flat in (result["in place"] for result in run_special(num_ranks)):
        assert same_memory
        assert torch.equal(flat, torch.arange(5.0) + (num_ranks - 1) / 2)


@ALL_RANKS
def test_sections_of_different_formats_travel_together(num_ranks):
    for result in run_special(num_ranks):
        for dtype in DTYPES:
            for block in result["mixed", dtype]:
                assert torch.allclose(block, torch.full_like(block, (num_ranks + 1) / 2), rtol=0.01)


@functools.cache
def run_special(num_ranks: int) -> list[dict]:
    return run_ranks(special_exchanges, num_ranks)


@ALL_RANKS
def test_an_empty_payload_is_exchanged(num_ranks):
    for shapes in run_ranks(exchange_nothing, num_ranks):
        assert shapes == [(1, 0)] * len(DTYPES)


def exchange_nothing(rank: int) -> list[tuple[int, ...]]:
    shapes = []
    for dtype in DTYPES:
        empty = make_exchange([Section(1, 0, RowFormat(dtype))], dist.group.WORLD)
        empty.start([torch.empty(1, 0)], "step 0")
        empty.advance()
        shapes.append(tuple(empty.finish()[0].shape))
    return shapes


@ALL_RANKS
def test_the_pattern_that_sends_least_is_chosen(num_ranks):
    narrow = "GatherMean" if num_ranks <= 2 else "TwoShotMean"
    for result in run_special(num_ranks):
        assert result["patterns"] == ["AllReduceMean", narrow, narrow, narrow]


def add_what_fp16_cannot_add(rank: int) -> list[torch.Tensor]:
    """2049 and 120000 are no fp16 numbers."""
    exchange = GatherMean([Section(1, 2, RowFormat("fp16"))], dist.group.WORLD)
    exchange.start([torch.tensor([[2048.0, 60000.0]]) if rank == 0 else torch.tensor([[1.0, 60000.0]])], "step 0")
    exchange.advance()
    return exchange.finish()


def test_narrow_values_are_summed_in_fp32():
    for (mean,) in run_ranks(add_what_fp16_cannot_add, 2):
        assert torch.equal(mean, torch.tensor([[1024.5, 60000.0]]))


def test_gathered_values_are_those_that_the_wire_format_holds():
    expected = []
    for index, (rows, length) in enumerate(SIZES):
        total = torch.zeros(rows, length)
        for rank in range(3):
            section = Section(rows, length, RowFormat("int8"))
            data = torch.zeros(section.encoded_bytes(), dtype=torch.uint8)
            section.encode_into(data, make_values(rank)[index])
            total += section.decode(data)
        expected.append(total / 3)
    means = outcomes(3)[0]["gather", "int8"][0][0]
    assert all(same_bits(mean, block) for mean, block in zip(means, expected, strict=True))
