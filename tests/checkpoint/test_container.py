"""One file: what is written is read, in the layout that docs/format.md gives; what is damaged is named."""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings

from commcomp.checkpoint import DamagedFileError, SnapshotError, SnapshotStore
from commcomp.checkpoint.chain import SnapshotChain
from commcomp.checkpoint.coded import CURRENT, PREVIOUS, CodedTensor, HostTensor, Input
from commcomp.checkpoint.container import FileHeader
from commcomp.checkpoint.container_reader import SnapshotReader
from commcomp.checkpoint.container_writer import SnapshotWriter
from commcomp.checkpoint.loading import load_state
from tests.checkpoint.codecs import XorEncoder
from tests.checkpoint.states import assert_same, changing_state, random_tensor, states


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """On tmpfs where there is one: these tests write very many small files."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path_factory.mktemp("files")
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


def _load(path: str | Path, threads: int = 1):
    with SnapshotChain(0, lambda step: str(path)) as chain:
        return load_state(chain, None, threads, verify=True)


def _small_file(folder: Path) -> bytes:
    state = {
        "w": torch.arange(40.0),
        "again": torch.arange(40.0),
        "empty": torch.empty(0, 3),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "zeros": torch.zeros(300, dtype=torch.int16),
        "lr": 0.1,
    }
    store = SnapshotStore(folder / "small")
    return Path(store.save(3, state, overwrite=True).path).read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(states)
def test_round_trip(folder, state):
    store = SnapshotStore(folder / "round_trip", threads=1)
    store.save(0, state, overwrite=True)
    assert_same(state, store.load(0))


def test_every_byte_is_where_the_format_says(tmp_path):
    """Reads a file by the document alone."""
    values = torch.tensor([1.0, float("nan"), -0.0])
    state = {"w": values, "text": "x" * 5000, "lr": -0.0}
    data = Path(SnapshotStore(tmp_path).save(7, state, {"run": "a"}).path).read_bytes()
    assert data[:8] == data[-8:] == b"CCSNAP\x00\x01"
    stored, raw, crc32 = struct.unpack("<III", data[8:20])
    assert zlib.crc32(data[20 : 20 + stored]) == crc32 and stored < raw
    header = json.loads(zlib.decompress(data[20 : 20 + stored]))
    assert header == {
        "format": 1,
        "step": 7,
        "mode": "lossless",
        "tree": {"dict": [["w", {"tensor": "w"}], ["text", "x" * 5000], ["lr", {"float": "8000000000000000"}]]},
        "metadata": {"run": "a"},
    }
    trailer = data[-56:]
    offset, length, raw_length, crc_directory, crc_header, flags, total = struct.unpack("<QQQIIIQ", trailer[:44])
    assert struct.unpack("<I", trailer[44:48])[0] == zlib.crc32(trailer[:44])
    assert (crc_header, total, flags, raw_length) == (crc32, len(data), 0, length)
    text = data[offset : offset + length]
    assert zlib.crc32(text) == crc_directory and offset + length + 56 == len(data)
    block = b"\x00" + values.numpy().tobytes()
    hash_of_w = xxhash.xxh3_128(b"float32[3]" + block[1:]).hexdigest()
    assert json.loads(text) == {
        "parent": None,
        "state_hash": xxhash.xxh3_128(struct.pack("<I", 1) + b"w" + bytes.fromhex(hash_of_w)).hexdigest(),
        "tensors": [
            {
                "name": "w",
                "dtype": "float32",
                "shape": [3],
                "method": "raw",
                "settings": {},
                "inputs": [],
                "chunk_values": 3,
                "bound": None,
                "hash": hash_of_w,
                "side": [20 + stored, 0, 0],
                "chunks": [[20 + stored, 13, zlib.crc32(block)]],
            }
        ],
    }
    assert data[20 + stored : offset] == block


def test_every_flip_of_a_byte_is_noticed(folder):
    data = _small_file(folder)
    path, good = folder / "flipped.ccsnap", _load(folder / "small" / "step-000000000003.ccsnap")
    for place in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            path.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
            with pytest.raises(DamagedFileError) as caught:
                assert_same(good, _load(path))
            assert str(path) in str(caught.value)


def test_random_mutations_are_noticed(folder):
    """Cut, lengthened, doubled, swapped and overwritten: an error that names the file, and no memory to speak of."""
    data = _small_file(folder)
    path, chance = folder / "mutated.ccsnap", random.Random(0)
    before, longest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    for _ in range(int(os.environ.get("COMMCOMP_MUTATIONS", 30_000))):
        mutated = _mutated(data, chance)
        if mutated == data:
            continue
        path.write_bytes(mutated)
        started = time.perf_counter()
        with pytest.raises(DamagedFileError, match=r"mutated\.ccsnap"):
            _load(path)
        longest = max(longest, time.perf_counter() - started)
    assert longest < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def _mutated(data: bytes, chance: random.Random) -> bytes:
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        start, length = chance.randrange(len(data)), chance.choice([1, 1, 4, 8, 100])
        piece, kind = data[start : start + length], chance.randrange(6)
        if kind == 0:
            data = data[:start] or b"\x00"
        elif kind == 1:
            data = data[:start] + chance.randbytes(length) + data[start:]
        elif kind == 2:
            data = data[:start] + piece + data[start:]
        elif kind == 3:
            data = data[:start] + chance.randbytes(len(piece)) + data[start + len(piece) :]
        elif kind == 4:
            data = data[:start] + data[start + len(piece) :] or b"\x00"
        else:
            to = chance.randrange(len(data))
            data = data[:to] + piece + data[to + len(piece) :]
    return data


def _rebuilt(data: bytes, change_header=None, change_directory=None) -> bytes:
    """The file with other JSON in it and every checksum right."""
    stored, raw = struct.unpack("<II", data[8:16])
    header = data[20 : 20 + stored]
    header = json.loads(zlib.decompress(header) if stored < raw else header)
    fields = struct.unpack("<QQQIIIQ", data[-56:-12])
    directory = data[fields[0] : fields[0] + fields[1]]
    directory = json.loads(zlib.decompress(directory) if fields[5] else directory)
    header = change_header(header) if change_header else header
    directory = change_directory(directory) if change_directory else directory
    header, directory = json.dumps(header).encode(), json.dumps(directory).encode()
    body = struct.pack("<8sIII", data[:8], len(header), len(header), zlib.crc32(header)) + header
    body += data[20 + stored : fields[0]]
    trailer = struct.pack(
        "<QQQIIIQ",
        *(len(body), len(directory), len(directory), zlib.crc32(directory), zlib.crc32(header), 0),
        len(body) + len(directory) + 56,
    )
    return body + directory + trailer + struct.pack("<I8s", zlib.crc32(trailer), data[:8])


def test_forged_files_are_refused(folder):
    """Random changes of the JSON under right checksums: refused, or read as what they say; never much memory."""
    path, chance = folder / "forged.ccsnap", random.Random(1)
    data = _small_file(folder)
    shift = _header_shift(data)
    data = _rebuilt(data, change_directory=lambda directory: _moved(directory, shift))
    path.write_bytes(data)
    _load(path)
    outcomes = {"refused": 0, "read": 0}
    tracemalloc.start()
    try:
        for number in range(1500):
            where = "change_header" if number % 3 == 0 else "change_directory"
            path.write_bytes(_rebuilt(data, **{where: lambda node: _forged(node, chance)}))
            tracemalloc.reset_peak()
            try:
                _load(path)
                outcomes["read"] += 1
            except (DamagedFileError, SnapshotError) as error:
                assert "forged.ccsnap" in str(error)
                outcomes["refused"] += 1
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert min(outcomes.values()) > 25, outcomes


def _header_shift(data: bytes) -> int:
    stored, raw = struct.unpack("<II", data[8:16])
    text = data[20 : 20 + stored]
    return len(json.dumps(json.loads(zlib.decompress(text) if stored < raw else text))) - stored


def _moved(directory: dict, shift: int) -> dict:
    for tensor in directory["tensors"]:
        for block in [tensor["side"], *tensor["chunks"]]:
            block[0] += shift
    return directory


_WRONG = [None, -1, 0, 1, 2, 7, 1 << 31, 1 << 40, 1 << 62, 1 << 63, 1 << 70, 1.5, "", "w", "float32", "same", "raw"]
_WRONG += [[], {}, True, [1], [1 << 40], [1 << 20, 1 << 20, 1 << 20], {"a": 1}, [["current", "w"]], [["previous", "w"]]]


def _forged(node, chance: random.Random):
    """One value somewhere replaced, removed or doubled; blocks keep following the header's length."""
    if isinstance(node, dict) and node and chance.random() < 0.95:
        key = chance.choice(list(node))
        if chance.random() < 0.05:
            del node[key]
        else:
            node[key] = _forged(node[key], chance)
        return node
    if isinstance(node, list) and node and chance.random() < 0.9:
        index = chance.randrange(len(node))
        if chance.random() < 0.1:
            node.insert(index, node[index])
        elif chance.random() < 0.1:
            del node[index]
        else:
            node[index] = _forged(node[index], chance)
        return node
    return chance.choice(_WRONG)


def test_a_bomb_is_not_unpacked(folder):
    """A directory that claims to unpack to 256 MiB, and more, of a few bytes."""
    path, data = folder / "bomb.ccsnap", _small_file(folder)
    offset = struct.unpack("<Q", data[-56:-48])[0]
    for claimed in (256 << 20, (256 << 20) + 1, 1 << 60):
        packed = zlib.compress(bytes(1 << 20))
        trailer = struct.pack(
            "<QQQIIIQ",
            *(offset, len(packed), claimed, zlib.crc32(packed), struct.unpack("<I", data[16:20])[0], 1),
            offset + len(packed) + 56,
        )
        path.write_bytes(data[:offset] + packed + trailer + struct.pack("<I8s", zlib.crc32(trailer), data[:8]))
        tracemalloc.start()
        try:
            with pytest.raises(DamagedFileError):
                SnapshotReader(path)
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()


def test_json_that_nests_too_deep_is_refused(folder):
    path, data = folder / "deep.ccsnap", _small_file(folder)
    deep: list = []
    for _ in range(900):
        deep = [deep]
    for change in ({"change_header": lambda h: {**h, "tree": deep}}, {"change_directory": lambda d: deep}):
        path.write_bytes(_rebuilt(data, **change))
        with pytest.raises(DamagedFileError):
            _load(path)


def test_damage_names_tensor_chunk_and_offset(tmp_path):
    store = SnapshotStore(tmp_path)
    path = Path(store.save(0, {"a": torch.zeros(3), "big": random_tensor("uint8", (3 << 20,))}).path)
    with SnapshotReader(path) as reader:
        block = reader.tensors["big"].chunks[1]
    data = bytearray(path.read_bytes())
    data[block.offset + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match=f"tensor 'big', chunk 1, at byte {block.offset}: crc32") as caught:
        store.load()
    assert (caught.value.tensor, caught.value.chunk, caught.value.offset) == ("big", 1, block.offset)
    assert_same(store.load_tensor(0, "big", 0, 10), random_tensor("uint8", (3 << 20,))[:10])
    assert len(store.verify()) == 1 and "chunk 1" in store.verify()[0]


def _header() -> FileHeader:
    return FileHeader(0, "lossless", {"tensor": "w"}, {})


def _coded(**changes) -> CodedTensor:
    fields = dict(
        name="w",
        dtype="float32",
        shape=(4,),
        method="raw",
        settings={},
        inputs=(),
        chunk_values=4,
        side=b"",
        chunks=[b"\x00" + bytes(16)],
    )
    return CodedTensor(**{**fields, **changes})


def _given(dtype: str = "float32", shape: tuple[int, ...] = (4,), **others) -> HostTensor:
    return HostTensor("w", dtype, shape, np.zeros(16, np.uint8))


def test_an_encoder_that_changes_dtype_or_shape_is_told(tmp_path):
    for changes in ({"dtype": "int32"}, {"shape": (2, 2)}):
        with (
            pytest.raises(SnapshotError, match=r"it was float32\[4\]"),
            SnapshotWriter(str(tmp_path / "file"), _header()) as writer,
        ):
            writer.add(_coded(**changes), _given())


@pytest.mark.parametrize(
    "changes",
    [
        {"chunks": []},
        {"chunk_values": 3},
        {"chunk_values": 0},
        {"dtype": "float31"},
        {"shape": (5,)},
        {"name": "n" * 5000},
        {"inputs": (Input(PREVIOUS, "w"),)},
        {"inputs": (Input(CURRENT, "w"),)},
        {"reconstruction": np.zeros(15, np.uint8)},
        {"reconstruction": np.zeros(4, np.float32)},
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_an_encoder_that_errs_leaves_no_file(tmp_path, changes, threads):
    path = tmp_path / "file"
    with (
        pytest.raises(SnapshotError, match="coded tensor"),
        SnapshotWriter(str(path), _header(), None, threads) as writer,
    ):
        writer.add(_coded(**changes), _given(**changes))
        writer.finish(["w"])
    assert not path.exists()


def test_a_tensor_left_out_or_coded_twice_leaves_no_file(tmp_path):
    path = tmp_path / "file"
    for names, times, words in ((["w", "x"], 1, "left out"), (["w"], 2, "before")):
        with pytest.raises(SnapshotError, match=words), SnapshotWriter(str(path), _header()) as writer:
            for _ in range(times):
                writer.add(_coded(), _given())
            writer.finish(names)
        assert not path.exists()


def test_other_formats_are_told_from_damage(folder):
    path = folder / "future.ccsnap"
    path.write_bytes(_rebuilt(_small_file(folder), change_header=lambda h: {**h, "format": 2}))
    with pytest.raises(SnapshotError, match="format 2; this commcomp reads 1") as caught:
        SnapshotReader(path)
    assert not isinstance(caught.value, DamagedFileError)


def test_flips_of_a_delta_and_its_parent(folder, with_codecs):
    """With inputs of both kinds, side data and short chunks."""
    store = SnapshotStore(folder / "delta", encoder=XorEncoder(100), threads=1)
    for step in (0, 1):
        store.save(step, changing_state(step))
    assert store.info(1).parent == 0
    good, chance = store.load(1), random.Random(2)
    for step in (0, 1):
        path = Path(store._files.path_of(step))
        data = path.read_bytes()
        for place in chance.sample(range(len(data)), 600):
            path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
            with pytest.raises(DamagedFileError, match=path.name):
                store.load(1)
        path.write_bytes(data)
    assert_same(good, store.load(1))
