"""Folders that torch.distributed.checkpoint wrote on real ranks: packed, restored to the byte, loaded by torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

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
        elif how == "files":
            writer = dcp.FileSystemWriter(folder, thread_count=3)
            dcp.save(training.state(), storage_writer=writer)
        else:
            dcp.save(training.state(), checkpoint_id=folder, planner=planner)
    return whole(training.state())


def _load(rank: int, folder: str, kind: str) -> dict[str, Any]:
    training = Training(kind, flat=True)
    training.train(1)  # so that the optimizer has its state
    state = emptied(training.state())
    dcp.load(state, checkpoint_id=folder)
    return whole(state)


def _sizes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.ccsnap"))


@pytest.mark.parametrize(("kind", "how"), [("fsdp", "plain"), ("ddp", "plain"), ("fsdp", "async"), ("ddp", "files")])
def test_a_chain_of_two_ranks_comes_back_to_the_byte_and_loads(tmp_path: Path, kind: str, how: str) -> None:
    saved = run_ranks(_save, 2, str(tmp_path), kind, STEPS, how)[0]
    folders = [tmp_path / f"step-{step}" for step in STEPS]
    packed = [Path(f"{folder}.packed") for folder in folders]
    run("pack", folders[0])
    run("pack", folders[1], "--base", folders[0])
    run("pack", folders[2], "--base", packed[1], "--base", folders[0])
    sizes = [_sizes(folder) for folder in packed]
    whole_size = sum(path.stat().st_size for path in folders[0].glob("*.distcp"))
    print(kind, how, whole_size, sizes, sorted(p.name for p in packed[2].iterdir()))
    assert not list(packed[2].glob("*.distcp")) and (packed[2] / ".metadata").is_file()
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
    for loaded in run_ranks(_load, 2, str(tmp_path / "back"), kind):
        assert loaded == saved
