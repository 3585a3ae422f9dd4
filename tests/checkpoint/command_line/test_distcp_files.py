"""What is not as an optimizer's plain state: odd tensors, other items, damage, and files that mean harm."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint._extension import StreamTransformExtension
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from commcomp.checkpoint.command_line.distcp import archive, groups, metadata, pickled
from commcomp.checkpoint.command_line.file_state import read_state
from tests.checkpoint.command_line.files import bytes_below, run
from tests.checkpoint.states import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore::FutureWarning")
NAME = "__0_0.distcp"


class Own:
    """Something that only pickle can save."""


def odd_state() -> dict[str, Any]:
    values = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    four = {"float4": torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}
    return {
        **{"fp32": values, "bf16": values.bfloat16(), "fp8": values.to(torch.float8_e4m3fn), "fp16": values.half()},
        **{"int64": torch.arange(5), "uint16": torch.arange(4).to(torch.uint16), "bool": values > 0},
        **{"complex": torch.complex(values, -values), "conjugate": torch.complex(values, values).conj()},
        **{"none": torch.empty(0, 3), "scalar": torch.tensor(2.5), "one": torch.ones(1, 1, 3), **four},
        **{"columns": values.t(), "part": values[1:3, ::2], "expanded": values[:1].expand(4, 8)},
        **{"channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)},
        **{"negative": torch.complex(values, values).conj().imag, "parameter": torch.nn.Parameter(values[0])},
        **{"text": "übung", "set": {1, 2}, "own": [Own, 3.0], "list": [1, None], "empty": {}, "nested": {"a/b.c": 1}},
    }


def saved(folder: Path, state: dict[str, Any] | None = None) -> Path:
    writer = dcp.FileSystemWriter(folder, overwrite=True)
    dcp.save(odd_state() if state is None else state, storage_writer=writer, no_dist=True)
    return folder / NAME


def test_odd_tensors_and_other_items_come_back_to_the_byte(tmp_path: Path) -> None:
    path = saved(tmp_path / "saved")
    state = read_state(str(path), (), 1)
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in state.tensors.items()}
    assert kinds["columns/(0, 0)"] == ("float32", (6, 8))  # as it lies in memory
    assert kinds["channels/(0, 0, 0, 0)"] == ("float32", (2, 4, 5, 3))
    assert kinds["scalar/()"] == ("float32", ()) and kinds["none/(0, 0)"] == ("float32", (0, 3))
    assert kinds["float4/(0,)"] == ("float4_e2m1fn_x2", (6,)) and kinds["one/(0, 0, 0)"] == ("float32", (1, 1, 3))
    assert kinds["fp8/(0, 0)"][0] == "float8_e4m3fn" and kinds["uint16/(0,)"] == ("uint16", (4,))
    assert "conjugate/(0, 0)" not in kinds and "set" not in state.info.skeleton  # they stay in the frame
    for mode in ("lossless", "stored", "compact"):
        packed, back = tmp_path / f"packed-{mode}", tmp_path / f"back-{mode}"
        run("pack", tmp_path / "saved", packed, "--mode", mode)
        assert sorted(os.listdir(packed)) == [".metadata", f"{NAME}.ccsnap"]
        run("unpack", packed, back)
        assert bytes_below(back) == bytes_below(tmp_path / "saved")
    one = tmp_path / "one.distcp"
    run("pack", path, tmp_path / "one.ccsnap")
    run("unpack", tmp_path / "one.ccsnap", one)
    assert one.read_bytes() == path.read_bytes()


def test_what_came_back_loads_in_torch(tmp_path: Path) -> None:
    state = {name: value for name, value in odd_state().items() if isinstance(value, torch.Tensor)}
    saved(tmp_path / "saved", state)
    run("pack", tmp_path / "saved")
    run("unpack", tmp_path / "saved.packed", tmp_path / "back")
    loaded = [{name: torch.zeros_like(value).contiguous() for name, value in state.items()} for _ in range(2)]
    for folder, to in zip(("saved", "back"), loaded):
        dcp.load(to, checkpoint_id=tmp_path / folder, no_dist=True)
    assert_same(*loaded)
    assert torch.equal(loaded[1]["fp32"], state["fp32"])


def test_safetensors_of_torch_distributed_come_back(tmp_path: Path) -> None:
    writer = HuggingFaceStorageWriter(str(tmp_path / "saved"))
    dcp.save({"w": torch.randn(30, 40), "b": torch.randn(4)}, storage_writer=writer, no_dist=True)
    run("pack", tmp_path / "saved")
    run("unpack", tmp_path / "saved.packed", tmp_path / "back")
    assert bytes_below(tmp_path / "back") == bytes_below(tmp_path / "saved")


def _copied(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Pack a folder of which nothing can be packed; what was said."""
    run("pack", folder, folder.parent / "packed")
    said = capsys.readouterr().err
    assert bytes_below(folder.parent / "packed") == bytes_below(folder)
    assert f"{NAME}: copied as it is" in said
    return said


class _Deflate(StreamTransformExtension):
    @staticmethod
    def from_descriptor(version: str) -> _Deflate:
        return _Deflate()

    @staticmethod
    def registry_name() -> str:
        return "deflate"

    def get_descriptor(self) -> str:
        return "deflate/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        class Packing(io.BytesIO):
            def close(self) -> None:
                output.write(zlib.compress(self.getvalue()))

        return Packing()

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        raise NotImplementedError


def test_files_that_are_transformed_already_are_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = dcp.FileSystemWriter(tmp_path / "saved", _extensions=[_Deflate()])
    dcp.save({"w": torch.zeros(30, 40)}, storage_writer=writer, no_dist=True)
    assert "deflate/1" in _copied(tmp_path / "saved", capsys)


def _resaved(folder: Path, change: Callable[[Any], object]) -> None:
    described = pickle.loads((folder / ".metadata").read_bytes())
    change(described)
    (folder / ".metadata").write_bytes(pickle.dumps(described))


def _move(described: Any, **fields: Any) -> None:
    for index, place in described.storage_data.items():
        if index.fqn == "fp32":
            vars(place).update(fields)


def _retype(described: Any) -> None:
    described.state_dict_metadata["fp32"].properties.dtype = torch.int32


def _resize(described: Any) -> None:
    described.state_dict_metadata["fp32"].chunks[0].sizes = torch.Size((8, 6))


def _forget(described: Any) -> None:
    del described.state_dict_metadata["fp32"]


def _rename(described: Any) -> None:
    described.state_dict_metadata["x" * 5000] = described.state_dict_metadata["fp32"]
    for index in described.storage_data:
        if index.fqn == "fp32":
            object.__setattr__(index, "fqn", "x" * 5000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: _move(d, offset=1 << 40), "ends at byte"),
        (lambda d: _move(d, offset=1), "lie over each other"),
        (lambda d: _move(d, length=7), "no archive of torch.save"),
        (lambda d: _move(d, length=-1), "without name, file or place"),
        (lambda d: _move(d, relative_path="../x.distcp"), "expected a file of the same folder"),
        (lambda d: _move(d, relative_path="away.distcp"), "copied as it is"),
        (_retype, ".metadata says int32"),
        (_resize, ".metadata says float32 (8, 6)"),
        (_forget, "is not described"),
        (_rename, "more than 4096 bytes"),
        (lambda d: d.storage_data.clear(), "say nothing of it"),
        (lambda d: setattr(d, "storage_data", None), "where its items lie"),
        (lambda d: setattr(d, "planner_data", Own), "test_distcp_files.Own"),
        (lambda d: setattr(d, "state_dict_metadata", [1]), "has no items"),
    ],
)
def test_files_that_are_not_what_the_metadata_says_are_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Any], object], message: str
) -> None:
    saved(tmp_path / "saved", {"fp32": odd_state()["fp32"], "other": torch.ones(3)})
    _resaved(tmp_path / "saved", change)
    if message == "copied as it is":  # without that file the others can be read
        run("pack", tmp_path / "saved")
        assert sorted(os.listdir(tmp_path / "saved.packed")) == [".metadata", f"{NAME}.ccsnap"]
        return
    assert message in _copied(tmp_path / "saved", capsys)
    run("pack", tmp_path / "saved" / NAME, expect=2)
    assert message in capsys.readouterr().err


def test_files_without_their_description_are_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "saved")
    os.unlink(tmp_path / "saved" / ".metadata")
    assert ".metadata is missing" in _copied(tmp_path / "saved", capsys)
    saved(tmp_path / "other")
    (tmp_path / "other" / ".metadata").write_bytes(b"")
    run("pack", tmp_path / "other")
    assert "other/.metadata: " in capsys.readouterr().err


def test_damage_in_a_packed_folder_is_found_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "saved")
    run("pack", tmp_path / "saved", "--quiet")
    path = tmp_path / "saved.packed" / f"{NAME}.ccsnap"
    data = path.read_bytes()
    for place in range(0, len(data), len(data) // 25):
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        run("verify", tmp_path / "saved.packed", "--quiet", expect=1)
        assert str(path) in capsys.readouterr().out
        run("unpack", tmp_path / "saved.packed", tmp_path / "back", expect=2)
        assert str(path) in capsys.readouterr().err
        assert not (tmp_path / "back").exists()


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
        _copied(tmp_path / "saved", capsys)
    assert not os.path.exists(mark)
    pickle.loads(evil)
    assert os.path.exists(mark)  # it would have


def test_a_refusal_names_the_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "saved", {"w": torch.ones(4)})
    (tmp_path / "saved" / ".metadata").write_bytes(pickle.dumps(_Evil("x")))
    said = _copied(tmp_path / "saved", capsys)
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


def _archives() -> Sequence[bytes]:
    found = []
    for value in (torch.arange(12.0).reshape(3, 4), torch.ones(3, dtype=torch.float8_e5m2), 0.5):
        torch.save(value, file := io.BytesIO())
        found.append(file.getvalue())
    return found


@given(st.sampled_from(_archives()), st.data())
def test_whatever_an_item_holds_only_a_value_error_is_raised(item: bytes, data: st.DataObject) -> None:
    broken = bytearray(item)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(item) - 1))] = data.draw(st.integers(0, 255))
    start = data.draw(st.integers(0, 30))
    array = torch.frombuffer(broken, dtype=torch.uint8).numpy()[start:]
    for read in (archive.tensor_in, archive.plain_value_in):
        try:
            found = read(array)
        except ValueError as error:
            assert str(error)
        else:
            if read is archive.tensor_in and found is not None:
                assert 0 <= found.start <= found.stop <= len(array)


def test_large_archives_are_read(tmp_path: Path) -> None:
    """More than 4 GiB, in a file that has a hole there."""
    values = 3 << 29
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, 0, 0, 0, 0, 7, 0xFFFFFFFF, 0xFFFFFFFF, 6, 20, 0, 0, 0, 0, 0)
    extra = struct.pack("<2H2Q", 1, 16, 4 * values, 4 * values)
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0, 0, 0, 0, 7, 0xFFFFFFFF, 0xFFFFFFFF, 6, 0)
    head, directory = local + b"data/0", entry + b"data/0" + extra
    start = len(head) + 4 * values
    end = start + len(directory)
    tail = directory + struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, 1, 1, len(directory), start)
    tail += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    tail += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    with open(tmp_path / "large", "wb") as file:
        file.write(head)
        file.seek(start)
        file.write(tail)
    item = np.asarray(np.memmap(tmp_path / "large", np.uint8, "r"))
    (found,) = archive._entries(item).items()
    assert found == ("data/0", archive._Entry(0, len(head), start, (start + 16, 14)))


def test_groups_are_read_anew_when_a_file_changes(tmp_path: Path) -> None:
    path = saved(tmp_path / "saved", {"a": torch.ones(3)})
    assert [item.name for item in groups.group_of(str(path)).items[NAME]] == ["a"]
    saved(tmp_path / "saved", {"other": torch.ones(3)})
    assert [item.name for item in groups.group_of(str(path)).items[NAME]] == ["other"]
