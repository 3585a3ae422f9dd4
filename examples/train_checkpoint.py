"""Checkpoints of examples/train_gpt.py through torch.distributed.checkpoint, for any world size."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import commcomp

_PREFIX = "step_"


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradient_sync: commcomp.GradientSync | None,
    history: dict[str, Any],
    keep: int,
) -> None:
    """Write `folder/step_<step>` on all ranks (one shared file system); keep the newest `keep` checkpoints.

    The files are written aside and the folder renamed at the end, so that a reader never sees half a checkpoint
    and a crash leaves the former one whole. `history` is rank 0's, any JSON value.
    """
    target = folder / f"{_PREFIX}{step:08d}"
    aside = folder / f".{target.name}.partial"
    if dist.get_rank() == 0:
        for left_over in folder.glob(f".{_PREFIX}*.partial"):  # by a crash
            shutil.rmtree(left_over)
        aside.mkdir(parents=True)
    dist.barrier()
    state = _training_state(model, optimizer, step)
    if gradient_sync is not None:
        state["gradient_sync"] = gradient_sync.state_dict()
    dcp.save(state, checkpoint_id=aside)
    if dist.get_rank() == 0:
        _write_synced(aside / "history.json", json.dumps(history))
        _sync_folder(aside)
        if target.exists():  # going on from an older checkpoint, this step comes again
            shutil.rmtree(target)
        aside.rename(target)
        _sync_folder(folder)
        for old in _steps_in(folder)[:-keep]:
            shutil.rmtree(folder / f"{_PREFIX}{old:08d}")
    dist.barrier()


def load(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradient_sync: commcomp.GradientSync | None,
) -> tuple[int, dict[str, Any]]:
    """Load a checkpoint of any world size; returns (steps done, history)."""
    state = _training_state(model, optimizer, 0)
    dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    if gradient_sync is not None:
        saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        if any(key.startswith("gradient_sync.") for key in saved):
            gradient_sync.restore(checkpoint, prefix="gradient_sync")
        elif dist.get_rank() == 0:
            print(f"{checkpoint} holds no residuals: gradient compression starts afresh", flush=True)
    return int(state["step"]), json.loads((checkpoint / "history.json").read_text())


def find(resume: str, folder: Path) -> Path | None:
    """Return the checkpoint that `resume` (auto, none or a path) means, equal on all ranks; None: start afresh."""
    if resume == "none":
        if _steps_in(folder):
            raise ValueError(
                f"resume=none, but {folder} holds checkpoints; delete them, choose another output_dir, "
                "or go on from the newest with resume=auto"
            )
        return None
    if resume != "auto":
        if not (Path(resume) / ".metadata").is_file():
            raise ValueError(f"resume is {resume!r}; expected auto, none or the folder of a checkpoint")
        return Path(resume)
    newest = [_steps_in(folder)[-1:]]
    dist.broadcast_object_list(newest, src=0)  # ranks must agree even if one sees the file system late
    return folder / f"{_PREFIX}{newest[0][0]:08d}" if newest[0] else None


def _training_state(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "step": torch.tensor(step)}


def _steps_in(folder: Path) -> list[int]:
    names = (path.name for path in folder.glob(f"{_PREFIX}*") if path.is_dir())
    return sorted(int(name[len(_PREFIX) :]) for name in names if name[len(_PREFIX) :].isdigit())


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
