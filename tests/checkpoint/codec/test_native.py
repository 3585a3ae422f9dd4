"""The entropy coders in C++: every bit comes back, and nothing that is read can do harm."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commcomp.checkpoint.codec.native import Known, coders, decode_floats, decode_symbols, encode_floats, encode_symbols
from tests.checkpoint.codec.floats import float_knowledge, float_values, spoil


@given(st.integers(0, 5000), st.integers(1, 255), st.integers(0, 2**32 - 1), st.floats(0.01, 40))
@settings(max_examples=60, deadline=None)
def test_symbols_come_back(count: int, num_contexts: int, seed: int, width: float) -> None:
    random = np.random.default_rng(seed)
    contexts = random.integers(0, num_contexts, count).astype(np.uint8)
    centers = random.integers(0, 256, num_contexts)
    symbols = (random.normal(0, width, count) + centers[contexts]).astype(np.int64).astype(np.uint8)
    for used, num in ((contexts, num_contexts), (None, 1)):
        data = encode_symbols(symbols, used, num)
        assert (decode_symbols(data, count, used, num) == symbols).all()


@given(st.integers(1, 3000), st.integers(1, 40), st.integers(1, 255), st.integers(0, 2**32 - 1), st.floats(0.01, 40))
@settings(max_examples=60, deadline=None)
def test_symbols_come_back_from_the_coder_max(
    count: int, columns: int, num_contexts: int, seed: int, width: float
) -> None:
    random = np.random.default_rng(seed)
    contexts = random.integers(0, num_contexts, count).astype(np.uint8)
    symbols = (random.normal(127, width, count)).astype(np.int64).astype(np.uint8)
    columns = min(columns, count)
    for used, num in ((contexts, num_contexts), (None, 1)):
        data = encode_symbols(symbols, used, num, columns)
        assert (decode_symbols(data, count, used, num) == symbols).all()
        for end in (0, 5, len(data) - 1):
            with pytest.raises(ValueError):
                decode_symbols(data[:end], count, used, num)
        with pytest.raises(ValueError):
            decode_symbols(data + b"0", count, used, num)


def test_the_coder_max_finds_what_static_tables_do_not() -> None:
    random = np.random.default_rng(0)
    rows, columns = 400, 300
    busy = np.repeat(random.random((1, columns)) < 0.2, rows, 0)
    symbols = np.where(random.random((rows, columns)) < np.where(busy, 0.5, 0.01), 128, 127).astype(np.uint8).ravel()
    fast, most = len(encode_symbols(symbols)), len(encode_symbols(symbols, columns=columns))
    assert most < 0.8 * fast
    for data in (encode_symbols(symbols, columns=1), encode_symbols(symbols, columns=len(symbols))):
        assert (decode_symbols(data, len(symbols)) == symbols).all()
    with pytest.raises(ValueError, match="columns"):
        encode_symbols(symbols, columns=len(symbols) + 1)


def test_symbols_take_little_more_than_their_entropy() -> None:
    random = np.random.default_rng(0)
    for symbols in (
        np.clip(random.normal(128, 12, 1 << 18), 0, 255).astype(np.uint8),
        (random.random(1 << 18) < 0.01).astype(np.uint8),
        np.zeros(1 << 18, np.uint8),
    ):
        shares = np.bincount(symbols) / len(symbols)
        entropy = -sum(share * np.log2(share) for share in shares if share > 0) * len(symbols) / 8
        assert len(encode_symbols(symbols)) < 1.01 * entropy + 300


@pytest.mark.parametrize("format", ["fp32", "bf16"])
@pytest.mark.parametrize("cut", ["linear", "logarithmic", "relative"])
@given(
    st.sampled_from([0, 1, 7, 8, 9, 100, 2047, 2048, 2049, 5000]),
    st.integers(0, 2**31),
    st.sampled_from(["any bits", "special", "alike", "wide"]),
    st.sampled_from(["near", "anything", "nothing", "exact"]),
)
@settings(max_examples=60, deadline=None)
def test_floats_come_back_bit_for_bit(cut: str, format: str, count: int, seed: int, kind: str, what: str) -> None:
    values = float_values(format, count, seed, kind)
    known = float_knowledge(cut, format, values, seed, what)
    data = encode_floats(format, values, known)
    assert (decode_floats(format, data, count, known) == values).all()


@pytest.mark.parametrize("format", ["fp32", "bf16"])
@pytest.mark.parametrize("cut", ["linear", "logarithmic", "relative"])
def test_arrays_may_stand_at_any_address(cut: str, format: str) -> None:
    """As those of a tensor that begins in the middle of a file; what they give is the same."""
    values = float_values(format, 3000, 0, "alike")
    known = float_knowledge(cut, format, values, 0, "near")
    odd = Known(cut, _at_odd_address(known.predictions), _at_odd_address(known.scales), known.scale, known.resolution)
    data = encode_floats(format, _at_odd_address(values), odd)
    assert data == encode_floats(format, values, known)
    out = _at_odd_address(np.zeros_like(values))
    coders().decode_floats(
        *(format, cut, np.frombuffer(data, np.uint8), odd.predictions, odd.scales, odd.scale, odd.resolution, out)
    )
    assert (out == values).all()


def _at_odd_address(values: np.ndarray | None) -> np.ndarray:
    assert values is not None
    raw = np.concatenate([np.zeros(1, np.uint8), values.view(np.uint8)])
    return raw[1:].view(values.dtype)


def test_gaussian_changes_cost_their_entropy() -> None:
    """Within 0.02 bits of what an ideal coder for exactly this distribution would take."""
    random = np.random.default_rng(0)
    before = random.normal(0, 0.05, 1 << 18).astype(np.float32)
    for width in (5e-3, 5e-4, 3e-8):
        after = (before + random.normal(0, width, len(before))).astype(np.float32)
        data = encode_floats("fp32", after.view(np.uint8), Known("linear", before, None, width, 3))
        units = np.log2(np.spacing(np.abs(after)).astype(np.float64)).mean()
        ideal = np.log2(width * np.sqrt(2 * np.pi * np.e)) - units
        assert 8 * len(data) / len(after) < ideal + 0.05


@pytest.mark.parametrize("format", ["fp32", "bf16"])
@pytest.mark.parametrize("cut", ["linear", "logarithmic", "relative"])
def test_damaged_data_raises_or_gives_as_manyfloat_values(cut: str, format: str) -> None:
    """No crash, no hang, no other number of values: 5000 changed, cut or lengthened chunks each."""
    random, raised = np.random.default_rng(0), 0
    values = float_values(format, 3000, 0, "alike")
    known = float_knowledge(cut, format, values, 0, "near")
    data = encode_floats(format, values, known)
    for _ in range(5000):
        spoiled = spoil(data, int(random.integers(len(data))), random)
        try:
            assert len(decode_floats(format, spoiled, 3000, known)) == len(values)
        except ValueError:
            raised += 1
    assert raised > 1000


def test_damaged_symbols_raise_or_give_as_many() -> None:
    random = np.random.default_rng(0)
    contexts = random.integers(0, 9, 3000).astype(np.uint8)
    data = encode_symbols((random.normal(0, 2, 3000) + 100 + contexts).astype(np.uint8), contexts, 9)
    for place in range(min(len(data), 1500)):
        for bit in range(8):
            spoiled = bytearray(data)
            spoiled[place] ^= 1 << bit
            try:
                assert len(decode_symbols(spoiled, 3000, contexts, 9)) == 3000
            except ValueError:
                continue


def test_arguments_that_do_not_go_together_are_refused() -> None:
    values = np.zeros(8, np.uint8)
    with pytest.raises(ValueError, match="fp64"):
        encode_floats("fp64", values, Known("linear", None, None, 1.0, 3))
    with pytest.raises(ValueError, match="sideways"):
        encode_floats("fp32", values, Known("sideways", None, None, 1.0, 3))
    with pytest.raises(ValueError, match="resolution"):
        encode_floats("fp32", values, Known("linear", None, None, 1.0, 9))
    with pytest.raises(ValueError, match="as many"):
        encode_floats("fp32", values, Known("linear", np.zeros(3, np.float32), None, 1.0, 3))
    with pytest.raises(ValueError, match="below num_contexts"):
        encode_symbols(values, np.full(8, 3, np.uint8), 3)
