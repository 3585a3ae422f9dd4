"""The run that checkpoint benchmarks train: resumed from a file it goes on to the bit, with other data it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.checkpoint_snapshots import make_snapshots
from benchmarks.checkpoint_training import TrainingRun, load_snapshot, settings, snapshot_steps

TINY = {"layers": 1, "heads": 2, "width": 16, "context": 16, "vocabulary": 256}
SETTINGS = settings(TINY, steps=20, warmup_steps=2, batch=2, eval_batches=2, eval_batch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("snapshots")
    make_snapshots(folder, [3, 5, 8], SETTINGS)
    return folder


def same(one: dict, other: dict) -> bool:
    model = all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    moments = zip(one["optimizer"]["state"].values(), other["optimizer"]["state"].values())
    return model and all(torch.equal(a[key], b[key]) for a, b in moments for key in a)


def test_a_resumed_run_goes_on_to_the_bit(folder: Path) -> None:
    assert snapshot_steps(folder) == [3, 5, 8]
    snapshot = load_snapshot(folder, 3)
    run = TrainingRun(SETTINGS)
    run.restore(snapshot)
    run.advance(5)
    assert run.step == 8
    assert same(run.state(), load_snapshot(folder, 8))
    assert same(snapshot, load_snapshot(folder, 3)), "going on must not write into the state that was restored"


def test_another_data_seed_gives_another_run(folder: Path) -> None:
    run = TrainingRun(SETTINGS, data_seed=1)
    run.restore(load_snapshot(folder, 3))
    run.advance(5)
    assert not same(run.state(), load_snapshot(folder, 8))


def test_an_interrupted_run_is_finished(folder: Path, tmp_path: Path) -> None:
    make_snapshots(tmp_path, [3], SETTINGS)
    make_snapshots(tmp_path, [3, 5, 8], SETTINGS)
    assert same(load_snapshot(tmp_path, 8), load_snapshot(folder, 8))
    assert (tmp_path / "losses.json").read_text() == (folder / "losses.json").read_text()


def test_another_run_is_not_mixed_in(folder: Path) -> None:
    with pytest.raises(SystemExit, match="another run"):
        make_snapshots(folder, [9], {**SETTINGS, "batch": 3})


def test_missing_snapshot_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"step_00000004.pt is not there \(steps in the folder: 3, 5, 8\)"):
        load_snapshot(folder, 4)


def test_unknown_setting_is_named() -> None:
    with pytest.raises(ValueError, match="no settings of a run: depth"):
        settings(depth=3)
