"""Snapshots of a store, whose parents are found by their names, become files of torch.save and are compared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from commcomp.checkpoint import DeltaStorageWriter, SnapshotStore
from commcomp.checkpoint.command_line.main import main
from tests.checkpoint.codec.training import Training
from tests.checkpoint.states import assert_same


def run(*arguments: object, expect: int = 0) -> None:
    assert main(["ckpt", *map(str, arguments)]) == expect


def _store(path: Path, mode: str = "lossless") -> dict[int, Any]:
    """Three snapshots, each coded against the one before; what loading them gives."""
    training, store = Training(), SnapshotStore(path, mode=mode, threads=1)
    for step in (5, 6, 20):
        training.step(3)
        store.save(step, {**training.state(), "extra": (1, 2.5, [None, b"x", torch.Size([3])], torch.arange(4))})
    return {step: store.load(step) for step in store.steps()}


def _file(folder: Path, step: int, ending: str = ".ccsnap") -> Path:
    return folder / f"step-{step:012d}{ending}"


@pytest.mark.parametrize("mode", ["lossless", "standard"])
def test_a_snapshot_becomes_a_file_of_torch(tmp_path: Path, mode: str) -> None:
    states = _store(tmp_path / "store", mode)
    run("unpack", _file(tmp_path / "store", 20), tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert_same(states[20], loaded)
    assert loaded["model"]["head.weight"] is loaded["model"]["embedding.weight"]
    training = Training()
    training.load(loaded)
    run("diff", _file(tmp_path / "store", 20), tmp_path / "out.pt")
    run("unpack", _file(tmp_path / "store", 6))
    assert_same(states[6], torch.load(_file(tmp_path / "store", 6, ".pt"), weights_only=True))
    run("unpack", _file(tmp_path / "store", 6), expect=2)  # it is there
    os.unlink(_file(tmp_path / "store", 6, ".pt"))
    run("unpack", tmp_path / "store", tmp_path / "folder")
    for step, state in states.items():
        assert_same(state, torch.load(_file(tmp_path / "folder", step, ".pt"), weights_only=True))


def test_two_snapshots_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _store(tmp_path / "store")
    _store(tmp_path / "same", "stored")
    for step in (5, 20):
        run("diff", _file(tmp_path / "store", step), _file(tmp_path / "same", step))
    capsys.readouterr()
    run("diff", _file(tmp_path / "store", 6), _file(tmp_path / "store", 20), expect=1)
    told = capsys.readouterr().out
    assert "second moments" in told and "largest difference" in told
    run("diff", tmp_path / "store", tmp_path / "same")
    _store(tmp_path / "lossy", "standard")
    run("diff", _file(tmp_path / "store", 20), _file(tmp_path / "lossy", 20), expect=1)


def test_what_a_store_has_for_itself_is_no_part_of_it(tmp_path: Path) -> None:
    _store(tmp_path / "store")
    _store(tmp_path / "same")
    for name in (".lock", ".tmp-77-0123abcd"):
        (tmp_path / "same" / name).write_text("of another process")
    run("diff", tmp_path / "store", tmp_path / "same")
    run("unpack", tmp_path / "same", tmp_path / "folder")
    assert sorted(os.listdir(tmp_path / "folder")) == [f"step-{step:012d}.pt" for step in (5, 6, 20)]


def test_what_cannot_be_unpacked_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _store(tmp_path / "store")
    path = _file(tmp_path / "store", 20)
    os.rename(_file(tmp_path / "store", 6), tmp_path / "away")
    run("unpack", path, tmp_path / "out.pt", expect=2)
    assert "coded against step 6" in capsys.readouterr().err
    os.rename(tmp_path / "away", _file(tmp_path / "store", 6))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    run("unpack", path, tmp_path / "out.pt", expect=2)
    assert f"{path}, tensor" in capsys.readouterr().err
    os.rename(_file(tmp_path / "store", 5), _file(tmp_path / "store", 7))
    run("unpack", _file(tmp_path / "store", 7), tmp_path / "out.pt", expect=2)
    assert "it was renamed" in capsys.readouterr().err
    assert not [one for one in tmp_path.iterdir() if one.name.startswith("out")]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_ranks_part_is_refused_with_the_way_to_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        dcp.save({"w": torch.randn(40, 30)}, storage_writer=DeltaStorageWriter(tmp_path / "run", step, threads=1))
    parts = [tmp_path / "run" / f"step-{step:012d}" / "rank-00000.ccsnap" for step in (1, 2)]
    run("unpack", parts[1], tmp_path / "out.pt", expect=2)
    assert "DeltaStorageReader" in capsys.readouterr().err and not (tmp_path / "out.pt").exists()
    run("diff", *parts, expect=1)
    assert "weights" in capsys.readouterr().out
