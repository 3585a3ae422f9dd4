"""The training run that checkpoint benchmarks save, compress and resume: one process, reproducible batches.

A state is {"step": int, "model": state dict, "optimizer": state dict}; a folder of snapshots holds one file a step and
`settings.json`, from which the run can be built again.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from benchmarks.record import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from gpt_model import GPT, GPTConfig
from stdlib_text import Batches, held_out_batches, load_split
from train_setup import learning_rate, make_optimizer

State = dict[str, Any]
SETTINGS = "settings.json"
_KEPT = (
    "model", "steps", "batch", "seed", "learning_rate", "final_learning_rate", "warmup_steps", "betas",
    "weight_decay", "gradient_clip", "eval_batches", "eval_batch",
)  # fmt: skip


def settings(model: str | dict[str, int] = "gpt_10m", **changes: Any) -> dict[str, Any]:
    """What fixes a run: those settings of examples/train_gpt.py that concern it, `changes` made, as plain values.

    `model` is the name of a file in configs/model, or a shape as such a file has it.
    """
    config = OmegaConf.load(ROOT / "configs" / "train_gpt.yaml")
    chosen = {key: config[key] for key in _KEPT if key != "model"}
    chosen["model"] = OmegaConf.load(ROOT / "configs" / "model" / f"{model}.yaml") if isinstance(model, str) else model
    if unknown := set(changes) - set(_KEPT):
        raise ValueError(f"no settings of a run: {', '.join(sorted(unknown))}; expected some of {', '.join(_KEPT)}")
    return OmegaConf.to_container(OmegaConf.create({**chosen, **changes}))


def one_deterministic_thread() -> None:
    """Make runs of this process equal to the bit: the order of a sum depends on the number of threads."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


@cache
def _text() -> tuple[np.ndarray, np.ndarray]:
    return load_split()


class TrainingRun:
    """The GPT of the examples with AdamW, on the CPU. `data_seed` None: the batches that the settings name."""

    def __init__(self, chosen: dict[str, Any], data_seed: int | None = None) -> None:
        config = OmegaConf.create(chosen)
        assert isinstance(config, DictConfig)
        torch.manual_seed(config.seed)
        self.config = config
        self.step = 0
        self.model = GPT(GPTConfig(**config.model))
        self.optimizer = make_optimizer(self.model, config)
        text, held_out_text = _text()
        context = config.model.context
        seed = config.seed if data_seed is None else data_seed
        self.batches = Batches(text, batch=config.batch, context=context, rank=0, seed=seed)
        self.held_out = held_out_batches(
            held_out_text, batch=config.eval_batch, context=context, count=config.eval_batches
        )

    def advance(self, steps: int) -> list[float]:
        """Take `steps` optimizer steps; returns the training loss of each, in nats."""
        losses = []
        for _ in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, self.config)
            loss = self.model(*self.batches.at(self.step))
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
            self.optimizer.step()
            self.step += 1
            losses.append(loss.item())
        return losses

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean next-byte cross entropy over the held-out batches, in nats."""
        return sum(self.model(*batch).item() for batch in self.held_out) / len(self.held_out)

    def state(self) -> State:
        """The run's state as torch gives it; its tensors are the run's own."""
        return {"step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: State) -> None:
        """Go on from `state`, which is left alone."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        # The optimizer keeps the tensors that it is given and would write into the caller's.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))


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
