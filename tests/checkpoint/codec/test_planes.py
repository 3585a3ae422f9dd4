"""The method "planes": every bit of every dtype back, less than its bytes where there is something to save, no harm."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from commcomp.checkpoint import SnapshotStore
from commcomp.checkpoint.codec import planes
from commcomp.checkpoint.codec.words import BASES, words_of
from commcomp.checkpoint.coded import HostTensor, Input, TensorHeader
from commcomp.checkpoint.decoder import _DAMAGE
from commcomp.checkpoint.dtypes import TORCH_DTYPES, dtype_name, item_bytes
from tests.checkpoint.codec.floats import spoil
from tests.checkpoint.states import assert_same, random_tensor, tensor_of_bytes

DTYPES = sorted(TORCH_DTYPES)
SHAPES = [(), (0,), (1,), (3, 0, 2), (17,), (40, 33), (2, 3, 500)]
CONTENTS = ["any bits", "near the parent", "small", "constant", "repeated", "counting"]


def _bytes(dtype: str, count: int, seed: int, content: str) -> tuple[np.ndarray, np.ndarray]:
    """Raw bytes of `count` values, and of the parent's."""
    random, width = np.random.default_rng(seed), words_of(dtype).width
    words = count * item_bytes(dtype) // width
    mask = 1 if dtype == "bool" else (1 << 8 * width) - 1
    kind = np.dtype(f"<u{width}")
    parent = random.integers(0, mask, words, np.uint64, endpoint=True)
    if content == "any bits":
        values = random.integers(0, mask, words, np.uint64, endpoint=True)
    elif content == "near the parent":
        values = parent + random.integers(-3, 4, words).astype(np.uint64)
    elif content == "small":
        values = random.integers(-2, 200, words).astype(np.uint64)
    elif content == "constant":
        values = np.full(words, random.integers(0, 1 << 63), np.uint64)
    elif content == "repeated":
        values = np.resize(random.integers(0, mask, 40, np.uint64, endpoint=True), words)
    else:
        values = np.arange(words, dtype=np.uint64) * np.uint64(3)
    return tuple((given & np.uint64(mask)).astype(kind).view(np.uint8) for given in (values, parent))  # type: ignore[return-value]


def _tensors(dtype: str, shape: tuple[int, ...], seed: int, content: str) -> tuple[torch.Tensor, torch.Tensor]:
    given, parent = _bytes(dtype, int(np.prod(shape)), seed, content)
    return tuple(tensor_of_bytes(data.tobytes(), TORCH_DTYPES[dtype], shape) for data in (given, parent))  # type: ignore[return-value]


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.integers(0, 2**31), st.sampled_from(CONTENTS)),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([7, 100, 1 << 18]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_bit_of_every_dtype_comes_back(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, chosen: list, chunk_values: int
) -> None:
    """Alone, against a parent, and from a parent that was such a delta itself."""
    monkeypatch.setattr(planes, "CHUNK_VALUES", chunk_values)
    pairs = [_tensors(*one) for one in chosen]
    store = SnapshotStore(tmp_path_factory.mktemp("store"), threads=2)
    for step, which in enumerate((1, 0, 1)):
        state = [pair[which] for pair in pairs]
        store.save(step, state)
        assert_same(state, store.load(step))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", BASES)
def test_every_base_takes_every_bit_pattern(dtype: str, base: str) -> None:
    """NaN payloads, both zeros and infinities; parents of any bits."""
    kind = words_of(dtype)
    for content in CONTENTS:
        given, parent = _bytes(dtype, 300, 0, content)
        previous = kind.of(parent) if BASES[base].needs_parent else None
        payload = planes.encode_words(kind, base, kind.of(given), previous)
        header = TensorHeader("t", dtype, (300,), "planes", {"base": base}, (), 300, None)
        back = planes.decode_chunk(header, b"", payload, 0, 300, [parent] * BASES[base].needs_parent)
        assert back.tobytes() == given.tobytes()


def _size(given: torch.Tensor, parent: torch.Tensor | None = None) -> float:
    """Bits a value; decoded and compared."""
    data = [None if one is None else one.contiguous().view(torch.uint8).numpy().ravel() for one in (given, parent)]
    host = HostTensor("t", dtype_name(given.dtype), tuple(given.shape), data[0])
    coded = planes.encode_planes(host, None if parent is None else (Input("previous", "t"), data[1]), 1)
    assert coded is not None
    inputs = [data[1]] if coded.inputs else []
    assert len(coded.chunks) == 1
    back = planes.decode_chunk(coded.header, b"", coded.chunks[0], 0, given.numel(), inputs)
    assert back.tobytes() == data[0].tobytes()
    return 8 * len(coded.chunks[0]) / given.numel()


def test_less_is_stored_where_there_is_something_to_save() -> None:
    torch.manual_seed(0)
    before = torch.randn(1 << 16) / 50
    after = before + torch.randn(1 << 16) / 5000
    assert _size(after.half(), before.half()) < 10.7 < 13 < _size(after.half()) < 14
    eighths = [(one * 3000).to(torch.float8_e4m3fn) for one in (before, after)]
    assert _size(eighths[1], eighths[0]) < 2.1 < 6 < _size(eighths[1])
    assert _size(after.double(), before.double()) < 29  # fp32 values, seen as fp64
    assert _size(after > 0.02, before > 0.02) < 0.15
    assert _size(torch.arange(1 << 16)) < 0.02
    assert _size(torch.randint(0, 256, (1 << 16,))) < 8.1
    assert _size(torch.randint(0, 30000, (400,)).repeat(160).int()) < 1


def test_what_cannot_be_made_smaller_is_stored_as_it_is(tmp_path: Path) -> None:
    state = {"noise": random_tensor("int64", (5000,)), "few": torch.arange(7), "none": torch.zeros(0, 3).half()}
    store = SnapshotStore(tmp_path)
    for step in (0, 1):
        store.save(step, {**state, "noise": random_tensor("int64", (5000,), step)})
        assert {tensor.method for tensor in store.info(step).tensors} == {"raw"}


@pytest.mark.parametrize("mode", ["lossless", "cautious", "standard", "compact", "stored"])
def test_all_modes_but_stored_use_it(tmp_path: Path, mode: str) -> None:
    torch.manual_seed(0)
    weights = torch.randn(200, 300).half()
    counts = torch.randint(0, 9, (3000,))
    store = SnapshotStore(tmp_path, mode=mode)
    for step in (0, 1):
        weights, counts = weights * 1.001, counts + 1
        store.save(step, {"w": weights, "n": counts})
        assert_same({"w": weights, "n": counts}, store.load(step))
    expected = "raw" if mode == "stored" else "planes"
    assert {tensor.method for tensor in store.info(1).tensors} == {expected}
    assert store.info(1).parent == (None if mode == "stored" else 0)


def test_ranges_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "CHUNK_VALUES", 1000)
    torch.manual_seed(0)
    tensors = [torch.randn(40, 250).half()]
    tensors.append(tensors[0] * 1.01)
    tokens = torch.randint(0, 500, (10_000,))
    store = SnapshotStore(tmp_path, threads=2)
    for step, tensor in enumerate(tensors):
        store.save(step, {"w": tensor, "tokens": tokens + step, "z": torch.view_as_complex(torch.randn(5000, 2))})
    assert {tensor.method for tensor in store.info(1).tensors} == {"planes"}
    assert_same(tensors[1].flatten()[1990:4321], store.load_tensor(1, "w", 1990, 4321))
    assert_same(tokens[999:1001] + 1, store.load_tensor(1, "tokens", 999, 1001))
    assert store.load_tensor(1, "z", 17, 4000).shape == (3983,)


def _forged(dtype: str) -> tuple[TensorHeader, bytes, list[np.ndarray]]:
    given, parent = _bytes(dtype, 4000, 0, "near the parent")
    host = HostTensor("t", dtype, (4000,), given)
    coded = planes.encode_planes(host, (Input("previous", "t"), parent), 1)
    assert coded is not None and coded.inputs
    return coded.header, coded.chunks[0], [parent]


@pytest.mark.parametrize("dtype", ["float16", "float8_e5m2", "int64", "complex64", "bool"])
def test_damage_raises_or_gives_as_many_values(dtype: str) -> None:
    header, payload, inputs = _forged(dtype)
    random, raised = np.random.default_rng(0), 0
    for _ in range(400):
        place = int(random.integers(min(len(payload), 400)) if random.integers(2) else random.integers(len(payload)))
        spoiled = spoil(payload, place, random)
        try:
            back = planes.decode_chunk(header, b"", spoiled, 0, 4000, inputs)
            assert back.dtype == np.uint8 and back.shape == inputs[0].shape
        except ValueError:
            raised += 1
    assert raised > 100


def test_what_does_not_go_together_is_refused() -> None:
    header, payload, inputs = _forged("float16")
    changed = [
        ({"base": "sideways"}, payload, inputs, "sideways"),
        ({"base": ["xor"]}, payload, inputs, "xor"),
        ({}, payload, inputs, "None"),
        ({"base": "none"}, payload, inputs, "do not go"),
        ({"base": "xor"}, payload, [], "do not go"),
        ({"base": "xor"}, payload, [inputs[0][:-2]], "do not go"),
        ({"base": "none"}, b"", [], "head"),
        ({"base": "none"}, bytes([9, 9]) + payload[2:], [], "kind 9"),
    ]
    for fields, data, others, match in changed:
        spoiled = replace(header, settings=fields)
        with pytest.raises(ValueError, match=match):
            planes.decode_chunk(spoiled, b"", data, 0, 4000, others)
    with pytest.raises(ValueError, match="side"):
        planes.decode_chunk(header, b"x", payload, 0, 4000, inputs)


@pytest.mark.parametrize("how", [0, 1, 2, 3])
def test_a_short_payload_takes_no_memory_beyond_what_is_declared(how: int) -> None:
    """A chunk that claims more values than any may have is refused, others stay within a few times their bytes."""
    header = TensorHeader("t", "int64", (1 << 40,), "planes", {"base": "none"}, (), 1 << 40, None)
    payload = bytes([how] * 8) + b"\x01\0\0\0\0" * 8
    tracemalloc.start()
    for count in (1 << 40, planes.MOST_CHUNK_VALUES):
        try:
            assert len(planes.decode_chunk(header, b"", payload, 0, count, [])) == 8 * count
        except _DAMAGE as error:
            assert count == planes.MOST_CHUNK_VALUES or "values a chunk" in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 8 * planes.MOST_CHUNK_VALUES
