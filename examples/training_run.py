"""The training of examples/train_gpt.py as an object in one process, whose state can be taken and put back.

A state is {"step": int, "model": state dict, "optimizer": state dict}.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from gpt_model import GPT, GPTConfig
from stdlib_text import Batches, held_out_batches, load_split
from train_setup import learning_rate, make_optimizer

State = dict[str, Any]
_CONFIGS = Path(__file__).resolve().parent.parent / "configs"
_KEPT = (
    "model", "steps", "batch", "seed", "learning_rate", "final_learning_rate", "warmup_steps", "betas",
    "weight_decay", "gradient_clip", "eval_batches", "eval_batch",
)  # fmt: skip


def settings(model: str | dict[str, int] = "gpt_10m", **changes: Any) -> dict[str, Any]:
    """What fixes a run: those settings of examples/train_gpt.py that concern it, `changes` made, as plain values.

    `model` is the name of a file in configs/model, or a shape as such a file has it.
    """
    config = OmegaConf.load(_CONFIGS / "training.yaml")
    chosen = {key: config[key] for key in _KEPT if key != "model"}
    chosen["model"] = OmegaConf.load(_CONFIGS / "model" / f"{model}.yaml") if isinstance(model, str) else model
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
