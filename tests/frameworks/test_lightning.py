"""commcomp.lightning under real Trainers on two ranks."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from commcomp import LowRank
from tests.frameworks.launching import as_launched, digest, ratio_of, run_example, snippet
from tests.ranks import run_ranks

pl = pytest.importorskip("lightning.pytorch")

from commcomp.lightning import Compression, SnapshotIO  # noqa: E402

STEPS = 6
"""An epoch."""


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 24))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.5)


class Sharded(Regression):
    """For the strategy that leaves fully_shard to the module."""

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.net, FSDPModule):
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


USUAL: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 2,
    "strategy": "ddp",
    "max_epochs": 2,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    inputs, targets = (torch.randn(2 * STEPS * 8, width, generator=generator) for width in (48, 24))
    return DataLoader(TensorDataset(inputs, targets), batch_size=8)


def fit(
    folder: str, *callbacks: Any, ckpt_path: str | None = None, sharded: bool = False, **options: Any
) -> Regression:
    if sharded:
        options["strategy"] = pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**USUAL, **options})
    model = Sharded() if sharded else Regression()
    trainer.fit(model, data(), ckpt_path=ckpt_path)
    return model


def saving() -> dict[str, Any]:
    return {"enable_checkpointing": True, "plugins": [SnapshotIO()]}


def _uninterrupted(rank: int, folder: str) -> dict[str, Any]:
    as_launched(rank)
    plain = fit(folder)
    full_rank = fit(folder, Compression(LowRank(rank=64, min_ratio=0), strict=False))
    compression = Compression(policy=[("*", LowRank(rank=2))], measure_every=0)
    checkpoints = pl.callbacks.ModelCheckpoint(folder, save_top_k=-1, save_last="link")
    compressed = fit(folder, compression, checkpoints, **saving())
    ratio = compression.state.stats()["ratio"]
    fit(folder, compression, max_epochs=1)
    accumulated = Compression({"method": "low_rank", "rank": 2})
    fit(folder, accumulated, accumulate_grad_batches=3, precision="bf16-mixed")
    scaled = Compression(LowRank(rank=2))
    precision = pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    fit(folder, scaled, plugins=[precision])
    shown: dict[str, Any] = {"Trainer": partial(pl.Trainer, **USUAL), "model": Regression(), "data": data()}
    exec(snippet(0), shown)
    return {
        "sharded": _sharded(f"{folder}/sharded"),
        "plain": plain.losses,
        "full rank": full_rank.losses,
        "compressed": compressed.losses,
        "weights": digest(compressed),
        "ratio": ratio,
        "fitted again": compression.state.step,
        "accumulated": accumulated.state.stats(),
        "shown": shown["compression"].state.stats()["ratio"],
        "scale": (scaled.state.uses_loss_scale, scaled.state.loss_scale),
    }


def _sharded(folder: str) -> dict[str, Any]:
    plain = fit(folder, sharded=True)
    full_rank = fit(folder, Compression(LowRank(rank=64, min_ratio=0), strict=False), sharded=True)
    checkpoints = pl.callbacks.ModelCheckpoint(folder, save_top_k=-1)
    compression = Compression(LowRank(rank=2))
    compressed = fit(folder, compression, checkpoints, sharded=True, enable_checkpointing=True)
    ratio = compression.state.stats()["ratio"]
    return {"plain": plain.losses, "full rank": full_rank.losses, "compressed": compressed.losses, "ratio": ratio}


def _resumed(rank: int, folder: str) -> dict[str, Any]:
    as_launched(rank)
    path = os.path.join(folder, f"epoch=0-step={STEPS}.ckpt")
    losses = fit(folder, Compression(LowRank(rank=2)), ckpt_path=path, **saving()).losses
    checkpoint = SnapshotIO().load_checkpoint(path)
    del checkpoint["callbacks"]["Compression"]
    without = os.path.join(folder, f"without-{rank}.ckpt")
    SnapshotIO().save_checkpoint(checkpoint, without)
    with pytest.warns(UserWarning, match="begins anew"):
        anew = fit(folder, Compression(LowRank(rank=2)), ckpt_path=without, **saving()).losses
    checkpoints = pl.callbacks.ModelCheckpoint(folder, save_top_k=-1, save_last="link")
    again = fit(folder, Compression(LowRank(rank=2)), checkpoints, ckpt_path="last", max_epochs=3, **saving())
    path = os.path.join(folder, "sharded", f"epoch=0-step={STEPS}.ckpt")
    sharded = fit(folder, Compression(LowRank(rank=2)), ckpt_path=path, sharded=True).losses
    return {"losses": losses, "anew": anew, "third epoch": again.losses, "sharded": sharded}


def test_training_and_resuming(tmp_path: Path) -> None:
    ranks = run_ranks(_uninterrupted, 2, str(tmp_path))
    for run in (run for rank in ranks for run in (rank, rank["sharded"])):
        assert run["full rank"] == pytest.approx(run["plain"], rel=1e-4)
        assert run["compressed"] != pytest.approx(run["plain"], rel=1e-3)
        assert run["ratio"] > 2
    for rank in ranks:
        assert rank["fitted again"] == STEPS
        assert rank["shown"] > 1.3 and rank["scale"] == (True, 2.0**10)
        assert rank["accumulated"]["steps"] == 2 * STEPS // 3 and rank["accumulated"]["ratio"] > 2
    assert ranks[0]["weights"] == ranks[1]["weights"]
    # Under LowRank with fp32 factors the mean of the residuals decides what is decoded.
    for uninterrupted, resumed in zip(ranks, run_ranks(_resumed, 2, str(tmp_path))):
        expected = uninterrupted["compressed"][STEPS:]
        assert len(resumed["third epoch"]) == STEPS
        assert resumed["losses"] == pytest.approx(expected, rel=1e-4)
        assert resumed["sharded"] == pytest.approx(uninterrupted["sharded"]["compressed"][STEPS:], rel=1e-4)
        assert resumed["anew"] != pytest.approx(expected, rel=1e-3)


def test_the_example(tmp_path: Path) -> None:
    *_, line = run_example("lightning_ddp.py", tmp_path)
    assert line.startswith("step 100: loss ") and ratio_of(line) > 3
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert "Compression" in SnapshotIO().load_checkpoint(checkpoint)["callbacks"]


def test_one_process_is_told_or_warned(tmp_path: Path) -> None:
    alone = {"devices": 1, "strategy": "auto"}
    with pytest.raises(ValueError, match=r"found a Regression, .*torchrun.* strict=False"):
        fit(str(tmp_path), Compression(LowRank(rank=2)), **alone)
    with pytest.warns(UserWarning, match="found a Regression"):
        fit(str(tmp_path), compression := Compression(LowRank(rank=2), strict=False), **alone)
    assert compression.state is None


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((), {}, "either one method"),
        ((LowRank(),), {"policy": [("*", LowRank())]}, "either one method"),
        ((LowRank(),), {"start_stp": 3}, "unknown key 'start_stp' .did you mean 'start_step'"),
        (({"method": "low_rank"},), {"start_step": 3}, "a whole configuration"),
        (({"method": "low_rnk"},), {}, "did you mean 'low_rank'"),
    ],
)
def test_wrong_settings_are_said_at_once(arguments: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Compression(*arguments, **settings)
