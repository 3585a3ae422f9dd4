"""Blockwise quantisation: error bounds, expectation of stochastic rounding, nibbles, and the rotation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commcomp.compressors.quantize import (
    LEVELS,
    pack_nibbles,
    quantize_blocks,
    random_signs,
    rotate,
    rotate_back,
    unpack_nibbles,
)

BITS = pytest.mark.parametrize("bits", sorted(LEVELS))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def round_trip(blocks: torch.Tensor, bits: int, noise: torch.Tensor | None = None) -> torch.Tensor:
    codes, scale = quantize_blocks(blocks, bits, noise)
    return codes * scale.unsqueeze(-1)


@st.composite
def magnitudes(draw) -> torch.Tensor:
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    number = st.floats(width=32, allow_nan=False, allow_infinity=False)
    return torch.tensor(draw(st.lists(number, min_size=rows * length, max_size=rows * length))).view(rows, length)


@BITS
@given(blocks=magnitudes())
@settings(max_examples=150, deadline=None)
def test_nearest_rounding_errs_by_half_a_step(bits, blocks):
    codes, scale = quantize_blocks(blocks, bits)
    assert torch.equal(codes, codes.round()) and codes.abs().max() <= LEVELS[bits]
    step = blocks.double().abs().amax(dim=-1, keepdim=True) / LEVELS[bits]
    error = (codes.double() * scale.double().unsqueeze(-1) - blocks.double()).abs()
    # bf16 scales are up to 1/128 too large; below the smallest normal number nothing is sent.
    assert (error <= step * (0.5 * (1 + 2**-7) + 1e-5) + 2e-38 * LEVELS[bits]).all()


@BITS
def test_scales_cost_two_bytes(bits):
    _, scale = quantize_blocks(normal(100, 32), bits)
    assert torch.equal(scale, scale.bfloat16().float())


@BITS
def test_stochastic_rounding_has_the_right_expectation(bits):
    blocks = normal(1, 64).expand(20_000, 64)
    noise = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(1))
    decoded = round_trip(blocks, bits, noise)
    step = blocks[0].abs().max() / LEVELS[bits]
    assert ((decoded - blocks).abs() <= step * 1.02).all()
    assert (decoded.mean(dim=0) - blocks[0]).abs().max() < 5 * step / 20_000**0.5
    assert not torch.equal(decoded[0], decoded[1])


@BITS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_block_with_a_bad_number_decodes_to_nothing_finite_and_leaves_its_neighbours(bits, bad):
    blocks = normal(3, 8)
    clean = round_trip(blocks, bits)
    blocks[1, 2] = bad
    decoded = round_trip(blocks, bits)
    assert torch.equal(decoded[[0, 2]], clean[[0, 2]])
    assert not decoded[1].isfinite().any()


@BITS
def test_zero_blocks_stay_zero(bits):
    assert (round_trip(torch.zeros(2, 5), bits) == 0).all()


@given(codes=st.lists(st.integers(-8, 7), min_size=2, max_size=20).filter(lambda codes: len(codes) % 2 == 0))
def test_nibbles_come_back(codes):
    values = torch.tensor(codes, dtype=torch.float32)
    packed = pack_nibbles(values)
    assert packed.dtype == torch.uint8 and packed.numel() == len(codes) // 2
    assert torch.equal(unpack_nibbles(packed), values.to(torch.int8))


@pytest.mark.parametrize("block", [1, 2, 64, 256])
def test_rotation_is_orthonormal_and_comes_back(block):
    blocks, signs = normal(5, block), random_signs(block, seed=3)
    turned = rotate(blocks, signs)
    assert torch.allclose(turned.norm(dim=-1), blocks.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(rotate_back(turned, signs), blocks, atol=1e-5)


def test_rotation_lets_four_bits_hold_a_block_with_an_outlier():
    blocks, signs = normal(200, 64) * 0.01, random_signs(64, seed=0)
    blocks[:, 7] = 1.0
    small = torch.arange(64) != 7
    plain = (round_trip(blocks, 4) - blocks)[:, small].norm() / blocks[:, small].norm()
    turned = rotate_back(round_trip(rotate(blocks, signs), 4), signs)
    rotated = (turned - blocks)[:, small].norm() / blocks[:, small].norm()
    assert plain > 0.99  # the outlier's step swallows all the rest
    assert (turned - blocks).norm() < 0.15 * blocks.norm() and rotated < 3 * plain


def test_rotation_refuses_other_sizes():
    with pytest.raises(ValueError, match="power of 2 values, not 48"):
        rotate(normal(2, 48), torch.ones(48))


def test_signs_depend_on_the_seed_alone():
    assert torch.equal(random_signs(64, 5), random_signs(64, 5))
    assert not torch.equal(random_signs(64, 5), random_signs(64, 6))
    assert set(random_signs(64, 5).tolist()) == {-1.0, 1.0}
