"""Decoding through parents and inputs: whole, by range, on threads; and what a codec may get wrong."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from commcomp.checkpoint import DamagedFileError, MissingSnapshotError, SnapshotError, SnapshotStore, codec_registry
from commcomp.checkpoint.chain import SnapshotChain
from commcomp.checkpoint.coded import CURRENT, CodedTensor, HostTensor, Input
from commcomp.checkpoint.container import FileHeader
from commcomp.checkpoint.container_writer import SnapshotWriter
from commcomp.checkpoint.decode_plan import plan
from commcomp.checkpoint.decoder import decode, whole
from commcomp.checkpoint.exact_codec import CHUNK_BYTES
from tests.checkpoint.codecs import XorEncoder
from tests.checkpoint.states import assert_same, changing_state, random_tensor, training_state


@pytest.fixture
def chained(tmp_path, with_codecs):
    """Five snapshots whose chunks are cut differently, and what they hold."""
    for step in range(5):
        SnapshotStore(tmp_path, encoder=XorEncoder(7 + step)).save(step, changing_state(step))
    store = SnapshotStore(tmp_path, threads=1)
    assert [store.info(step).parent for step in range(5)] == [None, 0, 1, 2, 3]
    return store


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(
    step=st.integers(0, 4),
    name=st.sampled_from(["w", "m", "b"]),
    start=st.none() | st.integers(-600, 600),
    stop=st.none() | st.integers(-600, 600),
)
def test_any_range_of_any_tensor(chained, step, name, start, stop):
    expected = changing_state(step)[name]
    assert_same(expected[start:stop].contiguous(), chained.load_tensor(step, name, start, stop))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_decode_the_same(chained, threads):
    for _ in range(5):
        assert_same(changing_state(4), SnapshotStore(chained.path, threads=threads).load())


def test_a_tensor_keeps_its_shape_and_a_range_does_not(tmp_path):
    store = SnapshotStore(tmp_path)
    values = random_tensor("float8_e5m2", (3, 4))
    store.save(0, {"w": values, "empty": torch.empty(0, 3), "scalar": torch.tensor(2.0)})
    assert_same(values, store.load_tensor(0, "w"))
    assert store.load_tensor(0, "w", 2, 5).shape == (3,) and store.load_tensor(0, "w", 9, 2).shape == (0,)
    assert store.load_tensor(0, "empty").shape == (0, 3) and store.load_tensor(0, "empty", 0, 3).shape == (0,)
    assert_same(torch.tensor([2.0]), store.load_tensor(0, "scalar", 0, 1))
    with pytest.raises(MissingSnapshotError, match="no tensor 'v'; it has 'w'"):
        store.load_tensor(0, "v")


def test_random_access_reads_little(tmp_path):
    store = SnapshotStore(tmp_path, threads=1)
    big = random_tensor("uint8", (20 * CHUNK_BYTES,))
    store.save(0, {"big": big, "other": random_tensor("int32", (CHUNK_BYTES,), 1)})
    store.save(1, {"big": big, "other": random_tensor("int32", (CHUNK_BYTES,), 2)})
    assert store.info(1).parent == 0
    with SnapshotChain(1, store._files.path_of) as chain:
        opened = chain[0].bytes_read
        assert opened < 16 << 10
        start, stop = 3 * CHUNK_BYTES + 5, 4 * CHUNK_BYTES + 7  # in two chunks of the parent
        piece = decode(chain, {"big": (start, stop)})["big"]
        assert_same(big[start:stop], torch.from_numpy(piece.values(start, stop).copy()))
        assert 2 * CHUNK_BYTES <= chain.bytes_read <= 2 * CHUNK_BYTES + (32 << 10)
        assert chain[0].bytes_read == opened  # the whole of it stands in the parent
    with SnapshotChain(1, store._files.path_of) as chain:
        decode(chain, whole(chain[0], ["other"]))
        assert len(chain.opened) == 1  # not coded against the parent: that is not even opened


def _file_of(path: Path, coded: list[CodedTensor], data: list[np.ndarray]) -> SnapshotChain:
    tree = [{"tensor": tensor.name} for tensor in coded]
    with SnapshotWriter(str(path), FileHeader(0, "lossless", tree, {})) as writer:
        for tensor, values in zip(coded, data):
            writer.add(tensor, HostTensor(tensor.name, tensor.dtype, tensor.shape, values))
        writer.finish([tensor.name for tensor in coded])
    return SnapshotChain(0, lambda step: str(path))


def test_inputs_nested_deep_are_decoded_once(tmp_path, monkeypatch):
    """600 tensors that each use the two before: by recursion without a memory that would never end."""
    calls = []

    def decode_sum(header, side, payload, start, count, inputs):
        calls.append(header.name)
        return np.frombuffer(payload, np.uint8) + sum(inputs)

    monkeypatch.setitem(codec_registry.decoders, "sum", decode_sum)
    values, coded = [], []
    for number in range(600):
        inputs = tuple(Input(CURRENT, str(other)) for other in (number - 1, number - 2) if other >= 0)
        expected = np.full(4, 1, np.uint8) + sum((values[int(s.tensor)] for s in inputs), np.zeros(4, np.uint8))
        values.append(expected.astype(np.uint8))
        coded.append(CodedTensor(str(number), "uint8", (4,), "sum", {}, inputs, 2, b"", [b"\1\1"] * 2))
    with _file_of(tmp_path / "deep", coded, values) as chain:
        piece = decode(chain, {"599": (2, 3)})["599"]
        assert (piece.start, piece.data.tolist()) == (2, values[-1][2:].tolist()) and len(calls) == 600
        for threads in (1, 3):
            pieces = decode(chain, whole(chain[0]), threads=threads)
            assert all(np.array_equal(pieces[str(i)].data, values[i]) for i in range(600))


def test_the_memory_of_inputs_serves_again_after_their_last_use(tmp_path, monkeypatch):
    """What is decoded on the way to one tensor does not stay in memory."""
    import weakref

    alive: list[weakref.ref] = []
    most = [0]
    lock = threading.Lock()
    real = np.empty

    class _Tracked(np.ndarray):
        pass

    def tracked(*args, **kwargs):
        array = real(*args, **kwargs).view(_Tracked)
        with lock:
            alive.append(weakref.ref(array))
            most[0] = max(most[0], sum(ref() is not None for ref in alive))
        return array

    coded = [CodedTensor("0", "uint8", (4,), "raw", {}, (), 4, b"", [b"\0abcd"])]
    for number in range(1, 50):
        source = (Input(CURRENT, str(number - 1)),)
        coded.append(CodedTensor(str(number), "uint8", (4,), "same", {}, source, 4, b"", [b""]))
    with _file_of(tmp_path / "line", coded, [np.frombuffer(b"abcd", np.uint8)] * 50) as chain:
        monkeypatch.setattr(np, "empty", tracked)
        assert decode(chain, whole(chain[0], ["49"]))["49"].data.tobytes() == b"abcd"
    assert 0 < len(alive) <= 3 and most[0] <= 3


def _raises(error):
    def decoder(header, side, payload, start, count, inputs):
        raise error

    return decoder


@pytest.mark.parametrize(
    "decoder, words",
    [
        (_raises(ValueError("no such table")), "no such table"),
        (_raises(IndexError("out of table")), "out of table"),
        (lambda *_: np.zeros(15, np.uint8), r"decoded to uint8\[15\]; expected 4 float32"),
        (lambda *_: np.zeros(4, np.float32), r"decoded to float32\[4\]"),
        (lambda *_: np.zeros(16, np.uint8), "decoded values have hash"),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_codec_gets_wrong_is_named(tmp_path, monkeypatch, decoder, words, threads):
    store = SnapshotStore(tmp_path, threads=threads)
    store.save(0, {"w": torch.ones(4), "v": torch.ones(5)})
    monkeypatch.setitem(codec_registry.decoders, "raw", decoder)
    with pytest.raises(DamagedFileError, match=words) as caught:
        store.load(tensors="w")
    assert caught.value.tensor == "w" and caught.value.path == store._files.path_of(0)


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    store = SnapshotStore(tmp_path, threads=1)
    store.save(0, {"w": torch.ones(4)})
    monkeypatch.setitem(codec_registry.decoders, "raw", _raises(MemoryError()))
    with pytest.raises(SnapshotError, match=r"not enough memory.*fewer threads") as caught:
        store.load()
    assert not isinstance(caught.value, DamagedFileError)


def test_an_unknown_method_asks_for_a_newer_version(tmp_path, with_codecs, monkeypatch):
    store = SnapshotStore(tmp_path, encoder=XorEncoder())
    store.save(0, {"w": torch.ones(4)})
    monkeypatch.delitem(codec_registry.decoders, "xor")
    with pytest.raises(SnapshotError, match=r"method 'xor', which this commcomp does not have.*install a newer one"):
        store.load()


def test_more_memory_than_there_is_is_said(tmp_path, monkeypatch):
    coded = [CodedTensor("0", "uint8", (4,), "raw", {}, (), 4, b"", [b"\0abcd"])]

    def no_memory(*_):
        raise MemoryError

    with _file_of(tmp_path / "huge", coded, [np.frombuffer(b"abcd", np.uint8)]) as chain:
        monkeypatch.setattr(np, "empty", no_memory)
        with pytest.raises(SnapshotError, match="huge: tensor '0' declares 4 bytes, more than the memory has"):
            decode(chain, whole(chain[0]))


def test_the_plan_visits_only_what_is_needed(tmp_path, with_codecs):
    store = SnapshotStore(tmp_path, encoder=XorEncoder(10), threads=1)
    store.save(0, training_state(0))
    with SnapshotChain(0, store._files.path_of) as chain:
        name = next(iter(chain[0].tensors))
        ranges, of_parent = plan(chain[0], {name: (13, 15)})
        assert ranges == {name: (10, 20)} and not of_parent
