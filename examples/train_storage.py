"""The two ways in which examples/train_gpt.py keeps checkpoints: as torch writes them, and coded by commcomp."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Protocol

from omegaconf import DictConfig
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, StorageReader, StorageWriter

from commcomp.checkpoint import DeltaStorageReader, DeltaStorageWriter, RunFolder

MODES = ("lossless", "cautious", "standard", "compact")
"""Of commcomp.checkpoint; docs/checkpoints.md says what they keep."""


class Storage(Protocol):
    """Checkpoints of one run by their steps. Rank 0 alone calls `begin` and `complete`."""

    def steps(self) -> list[int]:
        """Of the complete checkpoints, rising."""

    def folder(self, step: int) -> Path:
        """Where a complete checkpoint lies."""

    def begin(self, step: int) -> Path:
        """Make room for a checkpoint, and return the folder that it is written to.

        What a crash left of one goes, and so do this step's and later ones: the run went on from an older one.
        """

    def writer(self, step: int) -> StorageWriter:
        """What torch.distributed.checkpoint writes it with."""

    def complete(self, step: int, keep: int) -> None:
        """After all ranks have written: it counts, and of the older ones the newest `keep` - 1 stay."""


class Coded:
    """Folders step-<12 digits>: each checkpoint coded against the one before. It counts once its last file is there."""

    def __init__(self, path: Path, mode: str = "lossless", keyframe_every: int = 8) -> None:
        self._run, self._mode, self._keyframe_every = RunFolder(path), mode, keyframe_every

    def steps(self) -> list[int]:
        return self._run.steps()

    def folder(self, step: int) -> Path:
        return Path(self._run.folder(step))

    def begin(self, step: int) -> Path:
        self._run.prune(steps=[later for later in self.steps() if later >= step])
        self.folder(step).mkdir(parents=True, exist_ok=True)
        return self.folder(step)

    def writer(self, step: int) -> StorageWriter:
        return DeltaStorageWriter(self._run.path, step, self._mode, self._keyframe_every)

    def complete(self, step: int, keep: int) -> None:
        self._run.prune(keep=keep)


class Plain:
    """Folders step_<8 digits>, written aside and renamed at the end: a reader never sees half a checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def steps(self) -> list[int]:
        names = (path.name.removeprefix("step_") for path in self._path.glob("step_*") if path.is_dir())
        return sorted(int(name) for name in names if name.isdigit())

    def folder(self, step: int) -> Path:
        return self._path / f"step_{step:08d}"

    def begin(self, step: int) -> Path:
        for left_over in self._path.glob(".step_*.partial"):  # by a crash
            shutil.rmtree(left_over)
        for later in self.steps():
            if later >= step:
                shutil.rmtree(self.folder(later))
        self._aside(step).mkdir(parents=True)
        return self._aside(step)

    def writer(self, step: int) -> StorageWriter:
        return FileSystemWriter(self._aside(step))

    def complete(self, step: int, keep: int) -> None:
        _sync_folder(self._aside(step))
        self._aside(step).rename(self.folder(step))
        _sync_folder(self._path)
        for old in self.steps()[:-keep]:
            shutil.rmtree(self.folder(old))

    def _aside(self, step: int) -> Path:
        return self._path / f".step_{step:08d}.partial"


def storage_of(settings: DictConfig, path: Path) -> Storage | None:
    """What the `checkpoint` settings ask for; None: nothing is saved."""
    if settings.mode == "none":
        return None
    if settings.mode == "plain":
        return Plain(path)
    DeltaStorageWriter(path, 0, settings.mode, settings.keyframe_every)  # what is wrong is said now, not in a save
    return Coded(path, settings.mode, settings.keyframe_every)


def newest(path: Path) -> Path | None:
    """The folder of the newest checkpoint of either kind; None where there is none."""
    found = [(step, storage.folder(step)) for storage in (Plain(path), Coded(path)) for step in storage.steps()]
    return max(found)[1] if found else None


def reader_of(checkpoint: Path) -> StorageReader:
    """What torch.distributed.checkpoint reads a checkpoint's folder with. Raises ValueError where it is none."""
    if (checkpoint / ".metadata").is_file():
        return FileSystemReader(checkpoint)
    step = checkpoint.name.removeprefix("step-")
    if step.isdigit() and int(step) in RunFolder(checkpoint.parent).steps():
        return DeltaStorageReader(checkpoint.parent, int(step))
    raise ValueError(f"{str(checkpoint)!r} is no folder of a checkpoint")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
