"""Whatever vectors a machine has, the same bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commcomp.checkpoint.codec.native import coders, decode_floats, encode_floats
from tests.checkpoint.codec.floats import float_knowledge, float_values

SETS = coders().instruction_sets()
FASTEST = SETS[-1]


@pytest.fixture(autouse=True)
def fastest_afterwards() -> Iterator[None]:
    yield
    coders().use(FASTEST)


def test_sets_are_named_and_others_refused() -> None:
    assert SETS[0] == "plain"
    with pytest.raises(ValueError, match="'none of these'"):
        coders().use("none of these")


@pytest.mark.skipif(len(SETS) == 1, reason="this machine has plain arithmetic only")
@pytest.mark.parametrize("format", ["fp32", "bf16"])
@pytest.mark.parametrize("cut", ["linear", "logarithmic", "relative"])
@given(
    st.sampled_from([1, 7, 8, 33, 2047, 2049, 5000]),
    st.integers(0, 2**31),
    st.sampled_from(["any bits", "special", "alike", "wide"]),
    st.sampled_from(["near", "anything", "nothing", "exact"]),
)
@settings(max_examples=40, deadline=None)
def test_floats_are_coded_alike(cut: str, format: str, count: int, seed: int, kind: str, what: str) -> None:
    values = float_values(format, count, seed, kind)
    known = float_knowledge(cut, format, values, seed, what)
    coded = []
    for name in SETS:
        coders().use(name)
        coded.append(encode_floats(format, values, known))
        assert (decode_floats(format, coded[0], count, known) == values).all()
    assert all(data == coded[0] for data in coded)


def _lattice(octaves: bool, rows: int, columns: int, seed: int, strange: bool) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    predictions = random.normal(0, 1, (rows, columns)).astype(np.float32)
    references = np.exp(random.normal(0, 2, (rows, columns))).astype(np.float32)
    values = (predictions + references * random.normal(0, 3, (rows, columns))).astype(np.float32)
    if octaves:
        predictions = references
        values = (references * np.exp(random.normal(0, 5, (rows, columns)))).astype(np.float32)
    if strange:
        bits = random.integers(0, 2**32, (3, rows, columns), np.uint32).view(np.float32)
        places = random.random((3, rows, columns)) < 0.1
        values = np.where(places[0], bits[0], values)
        if not octaves:
            predictions = np.where(places[1], bits[1], predictions)
            references = np.where(places[2], bits[2], references)
    return {"values": values, "predictions": predictions, "references": references}


@pytest.mark.skipif(len(SETS) == 1, reason="this machine has plain arithmetic only")
@given(
    st.booleans(),
    st.integers(1, 5),
    st.sampled_from([1, 7, 8, 33, 100]),
    st.integers(0, 2**31),
    st.sampled_from([1e-3, 0.6, 2.4, 60.0, 1e30]),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_lattices_are_cut_and_joined_alike(
    octaves: bool, rows: int, columns: int, seed: int, step: float, strange: bool
) -> None:
    given_ = _lattice(octaves, rows, columns, seed, strange)
    values, known = given_["values"], (octaves, given_["predictions"], given_["references"], step)
    found = []
    for name in SETS:
        coders().use(name)
        symbols, reconstruction = np.empty(values.shape, np.uint8), np.empty(values.shape, np.float32)
        coders().cut_on_lattice(values, *known, symbols, reconstruction)
        joined = np.empty(values.shape, np.float32)
        coders().join_on_lattice(symbols, *known, joined)
        contexts = np.empty(values.shape, np.uint8)
        spread = np.random.default_rng(seed).integers(-3000, 3000, rows + columns).astype(np.int32)
        coders().lattice_contexts(spread[:rows], spread[rows:], 7, contexts)
        coded = symbols != 255
        assert joined[coded].tobytes() == reconstruction[coded].tobytes()
        found.append((symbols.tobytes(), reconstruction.tobytes(), joined[coded].tobytes(), contexts.tobytes()))
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("step", [0.5, 2.4])
def test_a_lattice_keeps_within_a_step_and_above_zero(step: float) -> None:
    for octaves in (False, True):
        given_ = _lattice(octaves, 40, 50, 0, False)
        values, predictions, references = (given_[key] for key in ("values", "predictions", "references"))
        values[0, :5] = 0
        symbols, joined = np.empty(values.shape, np.uint8), np.empty(values.shape, np.float32)
        coders().cut_on_lattice(values, octaves, predictions, references, step, symbols, joined)
        coded = symbols != 255
        assert coded.mean() > 0.9
        if octaves:
            assert joined.min() > 0
            away = np.abs(np.log2(np.maximum(values, 2.0**-126)) - np.log2(joined))[coded]
            assert away.max() < step + 0.09  # keys are linear between powers of two
        else:
            away = (np.abs(values - joined) / references)[coded]
            assert away.max() < step * 1.001
        assert away.max() > 0.8 * step
