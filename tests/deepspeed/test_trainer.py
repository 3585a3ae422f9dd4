"""transformers' Trainer with the block in its deepspeed configuration: it calls `deepspeed.initialize` by itself."""

from __future__ import annotations

import os
import socket
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

# Not imported here: that takes seconds, and only the ranks need it.
pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("deepspeed", "transformers", "accelerate")),
    reason="needs deepspeed, transformers and accelerate",
)
STEPS, MICRO_BATCHES, VOCABULARY = 3, 2, 64


def _config(stage: int, gradient: dict[str, Any] | None) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return config if gradient is None else {**config, "commcomp": {"gradient": gradient}}


def _train(stage: int, gradient: dict[str, Any] | None, folder: str) -> tuple[list[float], dict[str, Any] | None]:
    """Losses, and what the engine says that it sent; None if it is plain."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        deepspeed=_config(stage, gradient),
        optim="adamw_torch",
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=MICRO_BATCHES,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    size = GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    tokens = torch.randint(0, VOCABULARY, (4 * 2 * STEPS * MICRO_BATCHES, 16))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(GPT2LMHeadModel(size), arguments, train_dataset=data)  # type: ignore[arg-type]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    own = getattr(trainer.model_wrapped, "commcomp", None)
    return losses, own and own.stats()["gradient"]


def _runs(rank: int, folder: str, port: int) -> dict[tuple[int, str], tuple[list[float], dict[str, Any] | None]]:
    from tests.deepspeed import engines

    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})  # as torchrun does
    engines.no_compiling()
    import commcomp.deepspeed

    commcomp.deepspeed.install()
    methods: dict[str, Any] = {"plain": None, "dense": {"method": "dense"}, "low rank": {"method": "low_rank"}}
    return {
        (stage, name): _train(stage, gradient, folder) for stage in (2, 3) for name, gradient in methods.items()
    }


@cache
def runs(folder: str) -> dict[tuple[int, str], tuple[list[float], dict[str, Any] | None]]:
    """By stage and method."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return run_ranks(_runs, 2, folder, port, init=False)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


@pytest.mark.parametrize("stage", [2, 3])
def test_the_trainers_engine_compresses(stage: int, folder: Path) -> None:
    made = runs(str(folder))
    (plain, nothing), (dense, _), (losses, stats) = (made[stage, name] for name in ("plain", "dense", "low rank"))
    assert nothing is None
    assert dense == pytest.approx(plain, rel=1e-5)
    assert stats is not None and stats["ratio"] > 1.5
    assert stats["steps"] == STEPS * MICRO_BATCHES
    assert len(losses) == STEPS and losses != dense and losses[-1] < losses[0]
