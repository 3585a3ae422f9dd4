"""Pruning a run of DeltaStorageWriter: what stays can be loaded, whatever goes, also after a crash or damage."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from commcomp.checkpoint import DeltaStorageReader, DeltaStorageWriter, MissingSnapshotError, RunFolder
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SAVED = 6


def _value(step: int, rank: int = 0) -> torch.Tensor:
    """Two in a row have much in common: each is coded against the one before."""
    return torch.arange(3000.0) + 1e-3 * torch.arange(3000) * step + rank


def _save(run: Path | str, steps: range, keyframe_every: int) -> None:
    for step in steps:
        writer = DeltaStorageWriter(run, step, keyframe_every=keyframe_every, threads=1)
        dcp.save({"value": _value(step)}, storage_writer=writer)


def _assert_loads(run: Path | str, step: int) -> None:
    state = {"value": torch.zeros(3000)}
    dcp.load(state, storage_reader=DeltaStorageReader(run, step, threads=1))
    assert torch.equal(state["value"], _value(step))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Six checkpoints, 1 to 6, with a keyframe every so many."""
    found = {}
    for every in (1, 2, 3, 8):
        found[every] = tmp_path_factory.mktemp(f"every{every}")
        _save(found[every], range(1, SAVED + 1), every)
    parents = [RunFolder(found[3]).read(step).parent for step in range(1, SAVED + 1)]
    assert parents == [None, 1, 2, None, 4, 5]
    return found


@pytest.fixture
def run(runs: dict[int, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs[3], tmp_path / "run"))


@pytest.mark.parametrize(
    ("keep", "removed"), [(1, (1, 2, 3)), (3, (1, 2, 3)), (4, ()), (5, ()), (6, ()), (99, ())]
)
def test_the_newest_stay_with_those_that_they_need(run: Path, keep: int, removed: tuple[int, ...]) -> None:
    """2 and 1 are kept for the sake of 3."""
    folder = RunFolder(run)
    assert folder.prune(keep=keep) == removed
    assert folder.steps() == sorted(set(range(1, SAVED + 1)) - set(removed))
    for step in folder.steps():
        _assert_loads(run, step)
    assert not any(Path(folder.folder(step)).exists() for step in removed)
    _save(run, range(7, 8), 3)  # the next save goes on
    _assert_loads(run, 7)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=12)
@given(unwanted=st.sets(st.integers(1, SAVED)), every=st.sampled_from([1, 2, 3, 8]))
def test_what_others_need_is_not_removed(
    tmp_path_factory: pytest.TempPathFactory, runs: dict[int, Path], unwanted: set[int], every: int
) -> None:
    run = tmp_path_factory.mktemp("pruned")
    shutil.copytree(runs[every], run, dirs_exist_ok=True)
    removed = RunFolder(run).prune(steps=unwanted)
    assert set(removed) <= unwanted and (every > 1 or set(removed) == unwanted)
    stays = set(range(1, SAVED + 1)) - set(removed)
    assert RunFolder(run).steps() == sorted(stays)
    for step in stays:
        _assert_loads(run, step)
    parents = {RunFolder(run).read(step).parent for step in stays}
    assert unwanted - set(removed) <= parents  # for no other reason


def test_a_folder_goes_with_what_lies_in_it_and_so_do_remains_of_crashes(run: Path) -> None:
    folder = RunFolder(run)
    (Path(folder.folder(1)) / "notes.txt").write_text("of the user")
    os.unlink(folder.description_file(2))  # a crash while it was removed
    before, after = Path(folder.folder(0)), Path(folder.folder(9))
    for incomplete in (before, after):  # crashes while these were saved; the latter may be going on
        incomplete.mkdir()
        (incomplete / "rank-00000.ccsnap").write_bytes(b"half")
    assert folder.prune(steps=[1, 3]) == (1, 3)
    assert sorted(path.name[-1] for path in run.iterdir()) == ["4", "5", "6", "9"]
    assert folder.steps() == [4, 5, 6]


def test_a_crash_amid_pruning_leaves_checkpoints_that_load(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = shutil.rmtree, []

    def crashing(path: str) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path)

    monkeypatch.setattr(shutil, "rmtree", crashing)
    with pytest.raises(KeyboardInterrupt):
        RunFolder(run).prune(keep=1)
    monkeypatch.undo()
    assert RunFolder(run).steps() == [1, 4, 5, 6]
    for step in RunFolder(run).steps():
        _assert_loads(run, step)
    assert RunFolder(run).prune(keep=1) == (1,)
    assert len(list(run.iterdir())) == 3


@pytest.mark.parametrize("damage", ["changed", "removed"])
def test_where_it_is_not_known_what_is_needed_all_earlier_ones_stay(run: Path, damage: str) -> None:
    folder = RunFolder(run)
    if damage == "changed":
        Path(folder.description_file(5)).write_text("{}")
    else:
        shutil.rmtree(folder.folder(5))
    before = folder.steps()
    with pytest.warns(UserWarning, match=r"before step 5 are not removed.*(step-000000000005|step 5;)"):
        assert folder.prune(keep=1) == ()
    assert folder.steps() == before


def test_wrong_calls_remove_nothing(run: Path) -> None:
    folder = RunFolder(run)
    for wrong in ({}, {"keep": 0}, {"keep": 1, "steps": [1]}, {"steps": [-1]}):
        with pytest.raises(ValueError):
            folder.prune(**wrong)
    with pytest.raises(MissingSnapshotError, match="no snapshot of step 8"):
        folder.prune(steps=[1, 8])
    assert folder.steps() == list(range(1, SAVED + 1))
    assert RunFolder(run / "nowhere").prune(keep=1) == () and not (run / "nowhere").exists()


def _save_and_prune(rank: int, run: str) -> list[list[int]]:
    seen = []
    for step in range(1, 6):
        state = {"value": _value(step), f"of_rank_{rank}": _value(step, rank + 1)}
        dcp.save(state, storage_writer=DeltaStorageWriter(run, step, keyframe_every=2, threads=1))
        if rank == 0:
            RunFolder(run).prune(keep=1)
            seen.append(RunFolder(run).steps())
    return seen


def test_two_ranks_save_while_the_first_prunes(tmp_path: Path) -> None:
    assert run_ranks(_save_and_prune, 2, str(tmp_path))[0] == [[1], [1, 2], [3], [3, 4], [5]]
    _assert_loads(tmp_path, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RunFolder(tmp_path).prune(keep=1) == ()
