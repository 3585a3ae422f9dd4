"""Pickles read as data: the same values, no code, no memory that is only claimed."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commcomp.checkpoint.command_line.distcp import metadata, pickled
from tests.checkpoint.command_line.distcp.odd_folders import require_copied, saved
from tests.checkpoint.command_line.files import run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore::FutureWarning")


class _Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


class _Building:
    """Code in the state that an object would be given."""

    def __init__(self, path: str) -> None:
        self.state = _Evil(path)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", ["metadata", "planner", "item"])
def test_no_code_of_a_file_runs(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    protocol: int,
    place: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    path, mark = saved(tmp_path / "saved", {"w": torch.ones(4, 5)}), "ran"
    at = tmp_path / "saved" / ".metadata"
    evil = pickle.dumps(_Evil(mark), protocol)
    if place == "metadata":
        at.write_bytes(evil)
    elif place == "planner":
        described = pickle.loads(at.read_bytes())
        described.planner_data = _Building(mark)
        at.write_bytes(pickle.dumps(described, protocol))
    else:  # over the tensor's own pickle, which is longer
        data = path.read_bytes()
        own = data.index(b"\x80\x02ctorch._utils")
        path.write_bytes(data[:own] + evil + data[own + len(evil) :])
    if place == "item":
        run("pack", tmp_path / "saved")
        run("verify", tmp_path / "saved.packed")
    else:
        require_copied(tmp_path / "saved", capsys)
    assert not os.path.exists(mark)
    pickle.loads(evil)
    assert os.path.exists(mark)  # it would have


def test_a_refusal_names_the_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "saved", {"w": torch.ones(4)})
    (tmp_path / "saved" / ".metadata").write_bytes(pickle.dumps(_Evil("x")))
    said = require_copied(tmp_path / "saved", capsys)
    assert "posix.system" in said and "nothing was run" in said


_LARGE = 1 << 40
_BOMBS = [
    b"\x80\x04\x8e" + struct.pack("<Q", _LARGE) + b"x",  # so many bytes
    b"\x80\x05\x96" + struct.pack("<Q", _LARGE) + b"x",  # a bytearray
    b"\x80\x04\x8d" + struct.pack("<Q", _LARGE) + b"x",  # text
    b"\x80\x04\x95" + struct.pack("<Q", _LARGE) + b"N.",  # a frame
    b"\x80\x02Nr\xff\xff\xff\xff.",  # a place among what is kept for later
    b"\x80\x02(" * 50_000 + b".",
    b"\x80\x02" + b"]" + b"]a" * 50_000 + b".",
    b"\x80\x02)" + b"\x85" * 200_000 + b".",  # deep
    b"\x80\x02ctorch\nSize\nq\x00" + b"h\x00" * 50_000 + b")R" + b"\x85R" * 50_000 + b".",  # deep in another way
    b"\x80\x02]q\x00" + b"h\x00a" * 50_000 + b".",  # itself
    b"\x80\x02)" + b"2\x86" * 50_000 + b".",  # doubled
    b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b"\x01.",  # an integer
]


@pytest.mark.parametrize("number", range(len(_BOMBS)))
def test_a_pickle_takes_no_more_memory_than_it_is_large(tmp_path: Path, number: int) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(_BOMBS[number])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"\.metadata"):
            metadata.read(str(path))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000 + 200 * len(_BOMBS[number])
    finally:
        tracemalloc.stop()


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


def _as_dicts(value: Any) -> Any:
    if type(value) is pickled.Pairs:
        return {key: _as_dicts(item) for key, item in value}
    return type(value)(map(_as_dicts, value)) if type(value) in (list, tuple) else value


@given(_PLAIN, st.integers(3, 5))
def test_plain_values_are_read_as_pickle_reads_them(value: Any, protocol: int) -> None:
    assert _as_dicts(pickled.read(pickle.dumps(value, protocol), ())) == value


@given(st.binary(max_size=300), st.data())
def test_whatever_a_pickle_holds_only_a_value_error_is_raised(noise: bytes, data: st.DataObject) -> None:
    whole = pickle.dumps({"a": [1, (2.0, "x" * 300)], "b": torch.Size((3, 4)), "c": torch.float32})
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    for broken in (noise, whole[:start] + noise[:3] + whole[stop:]):
        try:
            pickled.read(broken, metadata._NAMES)
        except ValueError as error:
            assert str(error)


def test_a_description_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    saved(tmp_path / "saved")
    path = tmp_path / "saved" / ".metadata"
    described = pickle.loads(path.read_bytes())
    items = {(item.name, item.offset): item for item in metadata.read(str(path))}
    assert len(items) == len(described.storage_data) == len(described.state_dict_metadata)
    for index, place in described.storage_data.items():
        item = items[index.fqn, None if index.offset is None else tuple(index.offset)]
        assert (item.file, item.start, item.length) == (place.relative_path, place.offset, place.length)
        kind = described.state_dict_metadata[index.fqn]
        if item.offset is not None:
            assert (f"torch.{item.dtype}", item.sizes) == (str(kind.properties.dtype), kind.chunks[0].sizes)


@given(st.data())
def test_whatever_a_description_holds_only_a_value_error_is_raised(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "description"
    if not folder.exists():
        saved(folder, {"w": torch.ones(3, 4), "x": 5})
    whole = (folder / ".metadata").read_bytes()
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start, min(start + 20, len(whole))))
    path = folder / "broken"
    path.write_bytes(whole[:start] + data.draw(st.binary(max_size=20)) + whole[stop:])
    try:
        metadata.read(str(path))
    except ValueError as error:
        assert str(path) in str(error)
