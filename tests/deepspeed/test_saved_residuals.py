"""The files with residuals beside a checkpoint, by themselves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from commcomp.checkpoint import DamagedFileError, MissingSnapshotError
from commcomp.deepspeed import saved_residuals
from tests.checkpoint.same_objects import assert_same_object


def state_of(rank: int) -> dict[str, torch.Tensor]:
    return {
        f"rank_{rank}/residual/w": torch.full((40, 30), float(rank)),
        "warm_right/w": torch.ones(2, 30),
        "step": torch.tensor(5),
    }


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for rank in range(3):
        size = saved_residuals.write(str(tmp_path), state_of(rank), rank, 3, "one", threads=1)
        assert size == os.path.getsize(saved_residuals.path_of(str(tmp_path), rank))
    return str(tmp_path)


def test_each_rank_reads_its_own_or_those_that_it_needs(folder: str) -> None:
    for rank in range(3):
        found = saved_residuals.read(folder, rank, 3, 1)
        assert found is not None and (found.save, found.num_ranks) == ("one", 3)
        assert_same_object(found.state, state_of(rank))
    for rank, needed in ((0, {0, 1}), (1, {1, 2})):
        found = saved_residuals.read(folder, rank, 2, 1)
        assert found is not None and found.num_ranks == 3
        assert {key for key in found.state if "/" in key} == {"warm_right/w"} | {f"rank_{i}/residual/w" for i in needed}
    assert saved_residuals.read(os.path.join(folder, "nothing"), 0, 3, 1) is None


def test_a_file_that_is_missing_or_of_another_save_is_named(folder: str) -> None:
    os.unlink(saved_residuals.path_of(folder, 1))
    for rank, num_ranks in ((1, 3), (0, 2)):
        with pytest.raises(MissingSnapshotError, match=r"commcomp_rank_1\.ccsnap is missing; it was saved on 3 ranks"):
            saved_residuals.read(folder, rank, num_ranks, 1)
    saved_residuals.write(folder, state_of(1), 1, 3, "two", threads=1)
    with pytest.raises(DamagedFileError, match=r"commcomp_rank_1\.ccsnap: is of another save"):
        saved_residuals.read(folder, 0, 2, 1)
    shutil.copy(saved_residuals.path_of(folder, 0), saved_residuals.path_of(folder, 1))
    with pytest.raises(DamagedFileError, match="expected rank 1"):
        saved_residuals.read(folder, 1, 3, 1)


def test_every_flipped_byte_is_found(folder: str) -> None:
    path = Path(saved_residuals.path_of(folder, 2))
    good = path.read_bytes()
    for at in range(0, len(good), 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(DamagedFileError, match=r"commcomp_rank_2\.ccsnap"):
            saved_residuals.read(folder, 2, 3, 1)


def test_files_of_an_earlier_save_are_removed(folder: str) -> None:
    (Path(folder) / "latest").write_text("kept")
    (Path(folder) / ".commcomp_rank_0.ccsnap.unfinished").write_bytes(b"half")
    saved_residuals.remove(folder)
    saved_residuals.write(folder, state_of(0), 0, 1, "two", threads=1)
    assert sorted(os.listdir(folder)) == ["commcomp_rank_0.ccsnap", "latest"]
