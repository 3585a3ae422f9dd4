"""Folders that torch.distributed.checkpoint wrote on real ranks: packed, restored to the byte, loaded by torch."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from commcomp.checkpoint.command_line.distcp import archive, groups
from commcomp.checkpoint.command_line.file_state import FileState, read_state
from commcomp.checkpoint.container_reader import SnapshotReader
from commcomp.checkpoint.host_copy import as_tensor
from commcomp.checkpoint.roles import find_moments
from tests.checkpoint.codec.bounds import require_within
from tests.checkpoint.command_line.files import bytes_below, run
from tests.checkpoint.distributed.training import Training, emptied, whole
from tests.ranks import run_ranks

STEPS = (20, 30, 31)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def _save(rank: int, run: str, kind: str, steps: tuple[int, ...], how: str) -> dict[str, Any]:
    training = Training(kind, flat=True)
    group = dist.new_group(backend="gloo") if how == "async" else None
    planner = DefaultSavePlanner(enable_plan_caching=True) if how == "cached" else None
    for step in steps:
        training.train(step)
        folder = os.path.join(run, f"step-{step}")
        if how == "async":
            dcp.async_save(training.state(), checkpoint_id=folder, process_group=group).result()
        elif how == "several files":
            dcp.save(training.state(), storage_writer=dcp.FileSystemWriter(folder, thread_count=3))
        elif how == "a file a tensor":
            dcp.save(training.state(), storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=False))
        else:
            collective = how != "without collectives"
            dcp.save(training.state(), checkpoint_id=folder, planner=planner, use_collectives=collective)
    return whole(training.state())


def _load(rank: int, folder: str, kind: str, collective: bool = True) -> dict[str, Any]:
    training = Training(kind, flat=True)
    training.train(1)  # so that the optimizer has its state
    state = emptied(training.state())
    if collective:
        dcp.load(state, checkpoint_id=folder)
    else:
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return whole(state)


def _size(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("fsdp", "plain"),
        ("ddp", "plain"),
        ("fsdp", "async"),
        ("fsdp", "cached"),
        ("ddp", "several files"),
        ("ddp", "a file a tensor"),
        ("fsdp", "without collectives"),
    ],
)
def test_a_chain_of_two_ranks_comes_back_to_the_byte_and_loads(tmp_path: Path, kind: str, how: str) -> None:
    saved = run_ranks(_save, 2, str(tmp_path), kind, STEPS, how)[0]
    folders = [tmp_path / f"step-{step}" for step in STEPS]
    packed = [Path(f"{folder}.packed") for folder in folders]
    run("pack", folders[0])
    run("pack", folders[1], "--base", folders[0])
    run("pack", folders[2], "--base", packed[1], "--base", folders[0])
    assert not any(list(folder.glob("*.distcp")) for folder in packed)
    sizes = [_size(folder, "*.ccsnap") / _size(before, "*.distcp") for folder, before in zip(packed, folders)]
    if how != "a file a tensor":  # there headers are much of it
        assert sizes[0] < 0.6 and sizes[1] < 0.95 * sizes[0] and sizes[2] < 0.25, sizes
    bases: list[list[object]] = [[], ["--base", packed[0]], ["--base", folders[1]]]
    for folder, small, base in zip(folders, packed, bases):
        back = tmp_path / "back"
        run("unpack", small, back, *base)
        assert bytes_below(back) == bytes_below(folder)
        run("verify", small, *base)
        run("diff", folder, small, *base)
        run("diff", small, folder, *base)
        shutil.rmtree(back)
    run("unpack", packed[2], tmp_path / "back", "--base", packed[1], "--base", packed[0])
    if how != "without collectives":  # which dcp.load reads by rank
        for loaded in run_ranks(_load, 2, str(tmp_path / "back"), kind):
            assert loaded == saved


def test_files_that_share_weights_and_moments_are_packed_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(_save, 2, str(tmp_path / "ddp"), "ddp", (3,), "plain")
    run_ranks(_save, 2, str(tmp_path / "fsdp"), "fsdp", (3,), "plain")
    both = ("__0_0.distcp", "__1_0.distcp")
    assert groups.group_of(str(tmp_path / "ddp" / "step-3" / both[1])).names == both
    for name in both:
        group = groups.group_of(str(tmp_path / "fsdp" / "step-3" / name))
        assert group.names == (name,)
        assert len(group.steps) in (0, 6)  # they lie in one file
        assert group.settings["optim.param_groups.few.betas"] == (0.9, 0.95)
    run("pack", tmp_path / "ddp" / "step-3")
    packed = tmp_path / "ddp" / "step-3.packed"
    assert sorted(os.listdir(packed)) == [".metadata", "__0_0.distcp.ccsnap"]
    run("unpack", packed / "__0_0.distcp.ccsnap", tmp_path / "alone" / both[0], expect=2)  # no such folder
    (tmp_path / "alone").mkdir()
    shutil.copy(packed / ".metadata", packed / both[1])  # in the way of a file that is held
    run("unpack", packed, tmp_path / "back", expect=2)
    assert "is there already" in capsys.readouterr().err and not (tmp_path / "back").exists()
    run("unpack", packed / "__0_0.distcp.ccsnap", tmp_path / "alone" / both[0])
    assert sorted(os.listdir(tmp_path / "alone")) == list(both)


@pytest.mark.parametrize("missing", ["__0_0.distcp", "__1_0.distcp"])
def test_of_files_that_belong_together_those_that_are_left_are_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    run_ranks(_save, 2, str(tmp_path), "ddp", (3,), "plain")
    folder, packed = tmp_path / "step-3", tmp_path / "step-3.packed"
    (folder / missing).unlink()
    run("pack", folder)
    assert bytes_below(packed) == bytes_below(folder) and len(bytes_below(packed)) == 2
    assert f"{missing} is missing" in capsys.readouterr().err
    run("diff", folder, packed)
    (left,) = folder.glob("*.distcp")
    run("pack", left, expect=2)
    assert f"{missing} is missing" in capsys.readouterr().err


def _tensors(state: FileState) -> dict[str, torch.Tensor]:
    return {n: as_tensor(state.stored[n].header, t.data.copy()) for n, t in state.tensors.items()}


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_a_lossy_mode_keeps_its_bounds_and_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    run_ranks(_save, 2, str(tmp_path), kind, STEPS, "plain")
    folders = [tmp_path / f"step-{step}" for step in STEPS]
    packed, back = ([tmp_path / f"{what}-{step}" for step in STEPS] for what in ("packed", "back"))
    run("pack", folders[0], packed[0], "--mode", "standard")
    run("unpack", packed[0], back[0])
    run("pack", folders[1], packed[1], "--mode", "standard", "--base", back[0])  # what came back is the same base
    run("unpack", packed[1], back[1], "--base", packed[0])
    told = capsys.readouterr().out
    assert "largest error" in told and "second moments" in told
    assert _size(packed[1], "*.ccsnap") < 0.25 * _size(folders[1], "*.distcp")
    lossy = 0
    for path in packed[1].glob("*.ccsnap"):
        with SnapshotReader(path) as reader:
            bounds = {name: tensor.header.bound for name, tensor in reader.tensors.items()}
        given, found = (
            _tensors(read_state(str(folder / path.stem), (), 1).hashed(1)) for folder in (folders[1], back[1])
        )
        assert given.keys() == found.keys() == bounds.keys()
        for name, value in given.items():
            bound = bounds[name]
            if bound is None:
                assert torch.equal(value, found[name]), name
                continue
            lossy += 1
            second = found.get(name.replace("exp_avg/", "exp_avg_sq/"))
            require_within(name, bound, value, found[name], second)
    assert lossy == (18 if kind == "fsdp" else 9)  # three matrices with their moments, a half on each rank
    loaded = run_ranks(_load, 2, str(back[1]), kind)
    assert loaded[0] == loaded[1] == _load(0, str(back[1]), "alone", False)
    for path in back[1].glob("*.distcp"):
        _require_archives(path)
    run("diff", folders[1], back[1], expect=1)
    run("diff", packed[1], back[1], "--base", packed[0])


def _require_archives(path: Path) -> None:
    """Every item is one whose crc32 are right."""
    data = path.read_bytes()
    for item in groups.group_of(str(path)).items[path.name]:
        part = path.with_suffix(".part")
        part.write_bytes(data[item.start : item.start + item.length])
        with zipfile.ZipFile(part) as zipped:
            assert zipped.testzip() is None, item
        part.unlink()


def test_a_base_of_another_sharding_does_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, ranks in (("fsdp", 2), ("ddp", 2), ("fsdp", 4)):
        run_ranks(_save, ranks, str(tmp_path / f"{kind}{ranks}"), kind, (20, 21), "plain")
    base = tmp_path / "fsdp2" / "step-20"
    for other in ("ddp2", "fsdp4"):
        folder, packed, back = tmp_path / other / "step-21", tmp_path / f"packed-{other}", tmp_path / f"back-{other}"
        run("pack", folder, packed, "--base", base)
        run("unpack", packed, back, "--base", base)
        assert bytes_below(back) == bytes_below(folder)
    said = capsys.readouterr().err
    assert "__2_0.distcp: no base has a file of that name" in said
    assert f"__0_0.distcp: {base / '__0_0.distcp'} has nothing that is of use to it" in said
    folder = tmp_path / "fsdp2" / "step-21"
    run("pack", folder, tmp_path / "packed", "--base", tmp_path / "ddp2" / "step-20")
    run("unpack", tmp_path / "packed", tmp_path / "back", "--base", tmp_path / "ddp2" / "step-20")
    assert bytes_below(tmp_path / "back") == bytes_below(folder)


def _save_counted(rank: int, folder: str) -> None:
    """Weights of one shape, an optimizer that counts them, and items spread over the ranks."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(20, 20, bias=False) for _ in range(12)))
    model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(torch.ones(1, 20)).sum().backward()
    optimizer.step()
    dcp.save({"model": model.module.state_dict(), "optim": optimizer.state_dict()}, checkpoint_id=folder)


def test_weights_and_moments_that_are_only_counted_find_each_other(tmp_path: Path) -> None:
    run_ranks(_save_counted, 2, str(tmp_path))
    state = read_state(str(tmp_path / "__0_0.distcp"), (), 1)
    assert [part["name"] for part in state.origin["files"]] == ["__0_0.distcp", "__1_0.distcp"]
    found = {moments.weight: moments for moments in find_moments(state.tensors, state.info)}
    assert len(found) == 12
    for number in range(12):
        moments = found[f"model.{number}.weight/(0, 0)"]
        assert moments.second == f"optim.state.{number}.exp_avg_sq/(0, 0)"
        assert moments.step == f"optim.state.{number}.step/()" and moments.rate == 1e-3


def test_values_are_cut_out_of_every_tensor_of_an_optimizer(tmp_path: Path) -> None:
    _save(0, str(tmp_path), "alone", (3,), "plain")
    path = tmp_path / "step-3" / "__0_0.distcp"
    data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8).numpy()
    for item in groups.group_of(str(path)).items[path.name]:
        saved = archive.tensor_in(data[item.start : item.start + item.length])
        assert (saved is None) == (item.offset is None), item.text
        assert saved is None or len(saved.crc_places) == 2
