"""commcomp.lightning.SnapshotIO as Lightning's plugin, without a Trainer."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning.pytorch")
pytest.importorskip("xxhash")

from lightning.fabric.plugins import TorchCheckpointIO

from commcomp.checkpoint import DamagedFileError, MissingSnapshotError
from commcomp.checkpoint.command_line.main import main
from commcomp.lightning import SnapshotIO


def checkpoint(step: int = 5) -> dict[str, Any]:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
    moments = {"step": torch.tensor(5.0), "exp_avg": weight * 0.1, "exp_avg_sq": weight.square() * 0.01}
    return {
        "epoch": 1,
        "global_step": step,
        "state_dict": OrderedDict(weight=weight, tied=weight),
        "optimizer_states": [{"state": {0: moments}, "param_groups": []}],
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_k_models": {}, "best_model_score": None}},
        "hyper_parameters": {"width": 64, "rate": 1e-3, "name": "small"},
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    assert torch.equal(one["state_dict"]["tied"], other["state_dict"]["tied"])
    first, second = (found["optimizer_states"][0]["state"][0]["exp_avg"] for found in (one, other))
    assert torch.equal(first, second)
    return all(one[key] == other[key] for key in ("epoch", "global_step", "callbacks", "hyper_parameters"))


def test_what_is_saved_comes_back_and_is_removed(tmp_path: Path) -> None:
    io, path = SnapshotIO(), tmp_path / "made" / "epoch=1-step=5.ckpt"
    io.save_checkpoint(checkpoint(), path)
    assert same(io.load_checkpoint(str(path), map_location="cpu", weights_only=True), checkpoint())
    assert os.listdir(path.parent) == [path.name]
    io.remove_checkpoint(path)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("later", [3, 5, 9])
def test_a_checkpoint_is_replaced(tmp_path: Path, later: int) -> None:
    io, path = SnapshotIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(checkpoint(5), path)
    io.save_checkpoint(checkpoint(later), path)
    assert same(io.load_checkpoint(path), checkpoint(later))
    assert len([name for name in os.listdir(path) if name.endswith(".ccsnap")]) == 1


def test_a_link_is_replaced_and_what_it_led_to_stays(tmp_path: Path) -> None:
    io, path, link = SnapshotIO(), tmp_path / "epoch=1.ckpt", tmp_path / "last.ckpt"
    io.save_checkpoint(checkpoint(5), path)
    link.symlink_to(path.name)
    assert same(io.load_checkpoint(link), checkpoint(5))
    io.save_checkpoint(checkpoint(6), link)
    assert same(io.load_checkpoint(path), checkpoint(5)) and same(io.load_checkpoint(link), checkpoint(6))


def test_files_of_torch_are_read_and_replaced(tmp_path: Path) -> None:
    io, path = SnapshotIO(), tmp_path / "last.ckpt"
    TorchCheckpointIO().save_checkpoint(checkpoint(5), path)
    assert same(io.load_checkpoint(path), checkpoint(5))
    io.save_checkpoint(checkpoint(6), path)
    assert path.is_dir() and same(io.load_checkpoint(path), checkpoint(6))


def test_the_command_line_makes_it_a_file_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    SnapshotIO().save_checkpoint(checkpoint(), path)
    (snapshot,) = path.glob("*.ccsnap")
    assert main(["ckpt", "unpack", str(snapshot), str(tmp_path / "plain.pt")]) == 0
    assert same(torch.load(tmp_path / "plain.pt", weights_only=True), checkpoint())


def test_a_lossy_mode_takes_less(tmp_path: Path) -> None:
    sizes = []
    for mode in ("lossless", "standard"):
        SnapshotIO(mode).save_checkpoint(checkpoint(), tmp_path / mode)
        sizes.append(sum(file.stat().st_size for file in (tmp_path / mode).glob("*.ccsnap")))
    assert sizes[1] < 0.8 * sizes[0]


def test_what_cannot_be_held_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    io, bad = SnapshotIO(), checkpoint()
    bad["hyper_parameters"]["folder"] = Path("data")
    with pytest.raises(TypeError, match="hyper_parameters/folder"):
        io.save_checkpoint(bad, tmp_path / "bad.ckpt")
    assert os.listdir(tmp_path) == []


def test_errors_name_the_thing(tmp_path: Path) -> None:
    io, path = SnapshotIO(), tmp_path / "one.ckpt"
    with pytest.raises(ValueError, match="mode='losless'"):
        SnapshotIO("losless")
    with pytest.raises(ValueError, match=r"s3://bucket/one\.ckpt is no path of a local file system"):
        io.save_checkpoint(checkpoint(), "s3://bucket/one.ckpt")
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint(checkpoint(), path, storage_options={})
    with pytest.raises(FileNotFoundError):
        io.load_checkpoint(path)
    path.mkdir()
    with pytest.raises(MissingSnapshotError, match=r"one\.ckpt has no snapshot"):
        io.load_checkpoint(path)
    io.save_checkpoint(checkpoint(), path)
    with pytest.raises(ValueError, match="map_location='cuda'"):
        io.load_checkpoint(path, map_location="cuda")
    (snapshot,) = path.glob("*.ccsnap")
    data = bytearray(snapshot.read_bytes())
    data[len(data) // 2] ^= 1
    snapshot.write_bytes(data)
    with pytest.raises(DamagedFileError):
        io.load_checkpoint(path)
