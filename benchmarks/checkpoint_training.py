"""Snapshots of the training run that checkpoint benchmarks save, compress and resume (examples/training_run.py).

A folder of them holds one file a step and `settings.json`, from which the run can be built again.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from training_run import State, TrainingRun, one_deterministic_thread, settings

__all__ = [
    "SETTINGS", "State", "TrainingRun", "adam_tensors", "load_settings", "load_snapshot", "one_deterministic_thread",
    "save_snapshot", "settings", "snapshot_path", "snapshot_steps", "with_bf16_weights",
]  # fmt: skip

SETTINGS = "settings.json"


def snapshot_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def save_snapshot(folder: Path, state: State) -> None:
    """Write the state under its step; a file with that name is always whole."""
    path = snapshot_path(folder, state["step"])
    aside = path.with_suffix(".partial")
    torch.save(state, aside)
    os.replace(aside, path)


def load_snapshot(folder: Path, step: int) -> State:
    """Read what save_snapshot wrote; nothing but tensors and plain values is accepted."""
    path = snapshot_path(folder, step)
    if not path.is_file():
        found = ", ".join(map(str, snapshot_steps(folder))) or "none"
        raise FileNotFoundError(f"{path} is not there (steps in the folder: {found}); make it by checkpoint_snapshots")
    return torch.load(path, weights_only=True, map_location="cpu")


def snapshot_steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.pt"))


def load_settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SETTINGS).read_text())


def adam_tensors(state: State) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """(weight, exp_avg, exp_avg_sq) of every parameter, by its name: the optimizer counts matrices, then vectors."""
    weights = state["model"]
    names = [name for name in weights if weights[name].dim() >= 2] + [n for n in weights if weights[n].dim() < 2]
    moments = state["optimizer"]["state"]
    if len(names) != len(moments):
        raise ValueError(f"{len(moments)} parameters in the optimizer's state; expected {len(names)}, as in the model")
    found = {}
    for index, name in enumerate(names):
        first, second = moments[index]["exp_avg"], moments[index]["exp_avg_sq"]
        if not weights[name].shape == first.shape == second.shape:
            raise ValueError(f"{name} is {tuple(weights[name].shape)}, its moments are {tuple(first.shape)}")
        found[name] = (weights[name], first, second)
    return found


def with_bf16_weights(state: State) -> State:
    """The state as mixed-precision training saves it: weights rounded to bf16, moments and masters left in fp32."""
    weights = {name: value.bfloat16() if value.is_floating_point() else value for name, value in state["model"].items()}
    return {**state, "model": weights}
