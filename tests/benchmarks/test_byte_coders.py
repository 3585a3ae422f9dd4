"""The coders that checkpoints are compared with: exact on every bit pattern, and what is behind them."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from benchmarks.byte_coders import (
    CODERS,
    exponent_back,
    exponent_first,
    join_planes,
    ordered,
    size_of,
    split_planes,
    unordered,
    unzigzag,
    zigzag,
)

DTYPES = (np.uint32, np.uint16)


def patterns(dtype: type, seed: int) -> np.ndarray:
    """Random bits, with every special value: zeros of both signs, denormals, infinities, NaN payloads."""
    bits = 8 * np.dtype(dtype).itemsize
    top, exponent = 1 << (bits - 1), 0x7F80 << (bits - 16)
    special = [0, 1, top, top | 1, exponent, top | exponent, exponent | 1, top | exponent | 3, (1 << bits) - 1]
    random = np.random.default_rng(seed).integers(0, 1 << bits, 5000, dtype=dtype)
    return np.concatenate([np.array(special, dtype), random])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODERS)
def test_gives_back_every_bit(name: str, dtype: type) -> None:
    if name == "ZipNN" and importlib.util.find_spec("zipnn") is None:
        pytest.skip("zipnn is not installed; pip install '.[benchmarks]'")
    values, previous = patterns(dtype, seed=1), patterns(dtype, seed=2)
    untouched = values.copy()
    streams = CODERS[name].encode(values, previous)
    back = CODERS[name].decode(streams, previous)
    assert back.dtype == values.dtype
    np.testing.assert_array_equal(back, untouched)
    np.testing.assert_array_equal(values, untouched)


@pytest.mark.parametrize("name", ["BitX", "integer delta"])
def test_differences_from_near_values_cost_less_than_the_values(name: str) -> None:
    previous = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    values = (previous * np.float32(1 + 1e-5)).view(np.uint32)
    streams = CODERS[name].encode(values, previous.view(np.uint32))
    assert size_of(streams) < 0.5 * size_of(CODERS["zstd-3"].encode(values, previous.view(np.uint32)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_transforms_are_undone(dtype: type) -> None:
    values = patterns(dtype, seed=3)
    np.testing.assert_array_equal(exponent_back(exponent_first(values)), values)
    np.testing.assert_array_equal(unordered(ordered(values)), values)
    np.testing.assert_array_equal(unzigzag(zigzag(values)), values)
    np.testing.assert_array_equal(join_planes(split_planes(values), values.dtype), values)


def test_planes_begin_with_the_exponent() -> None:
    values = np.array([1.0, -1.0, 2.0], np.float32).view(np.uint32)
    assert list(split_planes(exponent_first(values))[0]) == [127, 127, 128]
    halves = (values >> 16).astype(np.uint16)
    assert list(split_planes(exponent_first(halves))[0]) == [127, 127, 128]
    assert list(split_planes(exponent_first(halves))[1]) == [0, 1, 0]


def test_integers_are_in_the_order_of_the_floats() -> None:
    values = np.sort(np.random.default_rng(4).standard_normal(1000).astype(np.float32))
    assert (np.diff(ordered(values.view(np.uint32)).astype(np.int64)) >= 0).all()
    zero = ordered(np.array([-0.0, 0.0], np.float32).view(np.uint32))
    assert zero[1] - zero[0] == 1


def test_small_differences_of_either_sign_become_small_numbers() -> None:
    differences = np.array([0, -1, 1, -2, 2], np.int32).view(np.uint32)
    assert list(zigzag(differences)) == [0, 1, 2, 3, 4]


def test_size_counts_the_lengths_of_the_streams() -> None:
    assert size_of([b"abc", b""]) == 3 + 2 * 8
