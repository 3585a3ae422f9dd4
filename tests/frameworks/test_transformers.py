"""commcomp.transformers under real Trainers on two ranks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from commcomp import LowRank
from tests.frameworks.launching import as_launched, digest, ratio_of, run_example, snippet
from tests.ranks import run_ranks

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from commcomp.transformers import compress  # noqa: E402
from tests.frameworks.test_accelerate import shard_on_the_cpu, whole  # noqa: E402

STEPS, SAVED = 8, 4


def trainer_of(folder: str, *, sharded: bool = False, **options: Any) -> Any:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    windows = torch.randint(0, 64, (64, 16), generator=torch.Generator().manual_seed(1))
    drop_out = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=48, n_layer=2, n_head=2, **drop_out
    )
    arguments = transformers.TrainingArguments(
        folder,
        use_cpu=True,
        per_device_train_batch_size=4,
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=0.0,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **{"save_strategy": "no", "max_steps": STEPS, **options},
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    data = [{"input_ids": window, "labels": window} for window in windows]
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    if sharded:
        shard_on_the_cpu(trainer.accelerator)
        trainer.is_fsdp_enabled = True
    return trainer


def losses_of(trainer: Any, resume_from: Any = None) -> list[float]:
    """The mean over ranks, of every step."""
    trainer.train(resume_from_checkpoint=resume_from)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _uninterrupted(rank: int, folder: str) -> dict[str, Any]:
    as_launched(rank)
    plain = losses_of(trainer_of(folder))
    trainer = trainer_of(folder)
    compress(trainer, LowRank(rank=48, min_ratio=0), strict=False)
    full_rank = losses_of(trainer)
    trainer = trainer_of(folder, save_strategy="steps", save_steps=SAVED)
    compression = compress(trainer, LowRank(rank=2, factor_dtype="int8"), measure_every=0)
    losses = losses_of(trainer)
    stats, weights = compression.state.stats(), digest(trainer.model)
    with pytest.raises(ValueError, match="called for this Trainer already"):
        compress(trainer, LowRank(rank=2))
    again = compression.state
    trainer.args.output_dir, trainer.args.max_steps = f"{folder}/again", 2
    trainer.train()
    assert compression.state is again and again.step == STEPS + 2
    shown = {"trainer": trainer_of(folder, max_steps=2)}
    exec(snippet(2), shown)
    accumulated = trainer_of(folder, gradient_accumulation_steps=2, bf16=True)
    micro_batches = compress(accumulated, LowRank(rank=2))
    accumulated.train()
    return {
        "plain": plain,
        "full": full_rank,
        "losses": losses,
        "weights": weights,
        "ratios": (stats["ratio"], shown["compression"].state.stats()["ratio"]),
        "steps": (stats["steps"], micro_batches.state.stats()["steps"]),
    }


def _resumed(rank: int, folder: str) -> dict[str, Any]:
    as_launched(rank)
    found = {}
    for name in ("checkpoint-4", "without"):
        trainer = trainer_of(folder)
        compress(trainer, LowRank(rank=2, factor_dtype="int8"))
        found[name] = losses_of(trainer, os.path.join(folder, name))
    sharded = losses_of(trainer_of(folder, sharded=True))
    trainer = trainer_of(folder, sharded=True)
    compress(trainer, LowRank(rank=48, min_ratio=0), strict=False)
    found["sharded full"] = losses_of(trainer)
    trainer = trainer_of(folder, sharded=True)
    compression = compress(trainer, LowRank(rank=2))
    losses_of(trainer)
    return {**found, "sharded": sharded, "ratio": compression.state.stats()["ratio"], "weights": whole(trainer.model)}


def test_training_and_resuming(tmp_path: Path) -> None:
    ranks = run_ranks(_uninterrupted, 2, str(tmp_path))
    for rank in ranks:
        assert rank["full"] == pytest.approx(rank["plain"], rel=1e-4)
        assert rank["losses"] != pytest.approx(rank["plain"], rel=1e-4)
        assert min(rank["ratios"]) > 1.2 and rank["steps"] == (STEPS, STEPS)
        assert rank["weights"] == ranks[0]["weights"]
    ignored = shutil.ignore_patterns("gradient_sync")
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "without", ignore=ignored)
    with_residuals = run_ranks(_resumed, 2, str(tmp_path))
    for uninterrupted, resumed in zip(ranks, with_residuals):
        expected = uninterrupted["losses"]
        assert resumed["checkpoint-4"] == pytest.approx(expected, rel=1e-5)
        assert resumed["without"] != pytest.approx(expected, rel=1e-4)
        assert resumed["sharded full"] == pytest.approx(resumed["sharded"], rel=1e-4)
        assert resumed["ratio"] > 2 and resumed["weights"] == with_residuals[0]["weights"]


def test_the_example(tmp_path: Path) -> None:
    *_, line = run_example("hf_trainer.py", tmp_path)
    assert line.startswith("40 steps, ") and ratio_of(line) > 3
    assert (tmp_path / "runs/hf_trainer/checkpoint-40/gradient_sync/.metadata").exists()
