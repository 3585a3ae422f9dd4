"""Thresholds, selection, and the codes of positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commcomp.compressors.sparsify import (
    BLOCK,
    decode_positions,
    encode_positions,
    magnitude_threshold,
    num_blocks,
    pack_bitmap,
    select,
    unpack_bitmap,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["normal", "laplace", "log-normal"])
@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.5])
def test_the_threshold_finds_the_density(kind, density):
    values = normal(1_000_000)
    if kind == "laplace":
        values = values.sign() * torch.empty_like(values).exponential_(generator=torch.Generator().manual_seed(1))
    elif kind == "log-normal":
        values = values.sign() * (2 * normal(1_000_000, seed=1)).exp()
    reached = float((values.abs() >= magnitude_threshold(values, round(density * values.numel()))).float().mean())
    sampled = density * values.numel() / (values.numel() // (1 << 16))
    assert abs(reached / density - 1) < 5 / sampled**0.5


def test_the_threshold_of_few_values_is_exact_and_never_nought():
    values = torch.tensor([0.0, -3.0, 2.0, 1.0])
    assert float(magnitude_threshold(values, 2)) == 2.0
    assert float(magnitude_threshold(values, 0)) == 3.0  # at least one is always taken
    assert float(magnitude_threshold(torch.zeros(10), 3)) > 0


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_selection_takes_the_first_that_reach_the_threshold(data):
    length = data.draw(st.integers(1, 700))
    capacity = data.draw(st.integers(0, 700))
    values = normal(length, seed=data.draw(st.integers(0, 1000)))
    threshold = torch.tensor(data.draw(st.sampled_from([0.5, 2.0, 9.0])))
    positions = select(values, threshold, capacity)
    assert positions.shape == (capacity,)
    used = positions[positions < length]
    assert torch.equal(used, torch.nonzero(values.abs() >= threshold).view(-1)[:capacity])
    assert torch.equal(positions[: len(used)], used) and (positions[len(used) :] == length).all()
    assert (used.diff() > 0).all()


def test_selection_leaves_nothing_out_below_capacity_and_takes_bad_numbers():
    values = normal(1000)
    values[[3, 800]] = torch.tensor([float("nan"), -float("inf")])
    threshold = torch.tensor(1.5)
    positions = select(values, threshold, 400)
    expected = torch.nonzero((values.abs() >= threshold) | values.isnan()).view(-1)
    assert torch.equal(positions[positions < 1000], expected)
    assert torch.equal(select(values, threshold, 7), expected[:7])


def test_a_full_block_gives_up_its_last_value():
    positions = select(torch.ones(2 * BLOCK + 5), torch.tensor(0.5), 3 * BLOCK)
    missing = set(range(2 * BLOCK + 5)) - set(positions.tolist())
    assert missing == {BLOCK - 1, 2 * BLOCK - 1}


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_positions_come_back(data):
    length = data.draw(st.integers(1, 1500))
    mask = torch.rand(length, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) < data.draw(
        st.sampled_from([0.0, 0.001, 0.05, 0.9])
    )
    values = mask.float()
    capacity = int(mask.sum()) + data.draw(st.integers(0, 5))
    positions = select(values, torch.tensor(0.5), capacity)
    counts, offsets = encode_positions(positions, length)
    assert counts.dtype == offsets.dtype == torch.uint8
    assert counts.shape == (num_blocks(length),) and offsets.shape == (capacity,)
    assert torch.equal(decode_positions(counts, offsets, length), positions)


def test_any_bytes_decode_to_places_inside():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        counts = torch.randint(0, 256, (4,), dtype=torch.uint8, generator=generator)
        offsets = torch.randint(0, 256, (300,), dtype=torch.uint8, generator=generator)
        decoded = decode_positions(counts, offsets, 3 * BLOCK + 10)
        assert decoded.min() >= 0 and decoded.max() <= 3 * BLOCK + 10


@given(bits=st.lists(st.booleans(), max_size=70))
def test_bitmaps_come_back_and_or_as_sets(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_bitmap(mask)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-len(bits) // 8)
    assert torch.equal(unpack_bitmap(packed, len(bits)), mask)
    other = ~mask if len(bits) % 2 else torch.roll(mask, 1)
    assert torch.equal(unpack_bitmap(packed | pack_bitmap(other), len(bits)), mask | other)


def test_bitmaps_of_a_batch_are_those_of_its_rows():
    mask = normal(3, 13) > 0
    packed = pack_bitmap(mask)
    assert packed.shape == (3, 2)
    assert all(torch.equal(packed[row], pack_bitmap(mask[row])) for row in range(3))
    assert torch.equal(unpack_bitmap(packed, 13), mask)


def test_position_codes_are_as_small_as_said():
    for density, bits in ((0.03, 9.1), (0.002, 23.7)):
        count = round(density * 1_000_000)
        assert 8 * (num_blocks(1_000_000) + count) / count <= bits


@pytest.mark.parametrize("shape", [(8192, 1024), (3072, 768), (4096, 4096), (5000, 384)])
@pytest.mark.parametrize("spread", [0.1, 10.0])
def test_the_threshold_sees_all_columns(shape, spread):
    """Columns whose number a power of two divides are larger or smaller than the others, as heads and gates can be."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values[:, ::16] *= spread
    count = values.numel() // 100
    reached = int((values.abs() >= magnitude_threshold(values.view(-1), count)).sum())
    assert 0.85 * count < reached < 1.15 * count
