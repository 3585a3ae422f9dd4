"""Odd tensors, other items, and files that are not what the metadata says."""

from __future__ import annotations

import io
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._extension import StreamTransformExtension
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from commcomp.checkpoint.command_line.distcp import files, groups
from commcomp.checkpoint.command_line.file_state import read_state
from commcomp.checkpoint.state_tree import TensorPlace
from tests.checkpoint.command_line.distcp.odd_folders import NAME, Own, odd_state, require_copied, saved
from tests.checkpoint.command_line.files import bytes_below, run
from tests.checkpoint.states import assert_same

MOMENTS = ("exp_avg", "exp_avg_sq")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore::FutureWarning")


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
    assert "deflate/1" in require_copied(tmp_path / "saved", capsys)


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
        (lambda d: setattr(d, "planner_data", Own), "odd_folders.Own"),
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
    assert message in require_copied(tmp_path / "saved", capsys)
    run("pack", tmp_path / "saved" / NAME, expect=2)
    assert message in capsys.readouterr().err


def test_files_without_their_description_are_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "saved")
    os.unlink(tmp_path / "saved" / ".metadata")
    assert ".metadata is missing" in require_copied(tmp_path / "saved", capsys)
    saved(tmp_path / "other")
    (tmp_path / "other" / ".metadata").write_bytes(b"")
    run("pack", tmp_path / "other")
    assert "other/.metadata: " in capsys.readouterr().err


def _cut_elsewhere(origins: list[dict[str, Any]], place: int, value: Any) -> None:
    origins[0]["cuts"][0][place] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.clear(), "which files"),
        (lambda o: o[0].update(name="../x"), "no name of a .distcp file"),
        (lambda o: o[0].update(name=".."), "no name of a .distcp file"),
        (lambda o: o[0].update(name="../x.distcp"), "no name of a .distcp file"),
        (lambda o: o[0].update(name="sitecustomize.py"), "no name of a .distcp file"),
        (lambda o: o[0].update(name=7), "no name of a .distcp file"),
        (lambda o: o.append(dict(o[0])), "two files of one name"),
        (lambda o: o[0].update(name="other.distcp"), "nothing is there"),
        (lambda o: o[0].update(cuts=None), "nothing is there"),
        (lambda o: _cut_elsewhere(o, 0, 1 << 40), "a place"),
        (lambda o: _cut_elsewhere(o, 0, -1), "a place"),
        (lambda o: o[0]["cuts"].reverse(), "a place"),
        (lambda o: _cut_elsewhere(o, 1, "elsewhere"), "a place"),
        (lambda o: _cut_elsewhere(o, 1, None), "a place"),
        (lambda o: _cut_elsewhere(o, 2, [1 << 40]), "of a crc32"),
        (lambda o: _cut_elsewhere(o, 2, [-1]), "a place"),
        (lambda o: o[0]["cuts"].extend([o[0]["cuts"][-1]] * 20), "stands in 21 places"),
    ],
)
def test_descriptions_in_packed_files_that_do_not_fit_are_refused(
    tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    state = read_state(str(saved(tmp_path / "saved")), (), 1)
    arrays = {name: tensor.data for name, tensor in state.tensors.items()}
    origins = state.origin["files"]
    whole = b"".join(piece.tobytes() for piece in files.restored(origins, arrays, 1)[NAME].pieces())
    assert whole == (tmp_path / "saved" / NAME).read_bytes()
    change(origins)
    with pytest.raises(ValueError, match=message):
        files.restored(origins, arrays, 1)


def test_a_weight_that_is_tied_to_another_is_there_once(tmp_path: Path) -> None:
    weight, other = torch.randn(6, 7), torch.randn(6, 7)
    model = {"in.weight": weight, "middle.weight": other, "out.weight": weight.clone()}
    moments = {f"state.{name}.{kind}": torch.zeros(6, 7) for name in ("in.weight", "middle.weight") for kind in MOMENTS}
    state = read_state(str(saved(tmp_path / "saved", {"model": model, "optim": moments})), (), 1)
    places = state.info.skeleton
    assert (
        places["model.out.weight"][(0, 0)] == places["model.in.weight"][(0, 0)] == TensorPlace("model.in.weight/(0, 0)")
    )
    assert len(state.tensors) == 1 + 2 + len(moments)  # equal moments stay what they are
    run("pack", tmp_path / "saved")
    run("unpack", tmp_path / "saved.packed", tmp_path / "back")
    assert bytes_below(tmp_path / "back") == bytes_below(tmp_path / "saved")


@pytest.mark.parametrize("mode", ["lossless", "standard"])
def test_very_many_equal_weights_come_back(tmp_path: Path, mode: str) -> None:
    """As frozen ones that are 0 are equal to one that is trained from there."""
    model = {f"{number}.weight": torch.zeros(20, 20) for number in range(20)}
    moments = {f"state.3.weight.{kind}": torch.ones(20, 20) for kind in MOMENTS}
    saved(tmp_path / "saved", {"model": model, "optim": moments})
    run("pack", tmp_path / "saved", "--mode", mode)
    assert sorted(os.listdir(tmp_path / "saved.packed")) == [".metadata", f"{NAME}.ccsnap"]
    run("unpack", tmp_path / "saved.packed", tmp_path / "back")
    if mode == "lossless":
        assert bytes_below(tmp_path / "back") == bytes_below(tmp_path / "saved")
    loaded = {"model": {name: torch.ones(20, 20) for name in model}}
    dcp.load(loaded, checkpoint_id=tmp_path / "back", no_dist=True)
    assert_same(loaded, {"model": model})


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


def test_groups_are_read_anew_when_a_folder_changes(tmp_path: Path) -> None:
    for name in ("a", "other"):
        path = saved(tmp_path / "saved", {name: torch.ones(3)})
        assert [item.name for item in groups.group_of(str(path)).items[NAME]] == [name]
        os.rename(tmp_path / "saved", tmp_path / name)
