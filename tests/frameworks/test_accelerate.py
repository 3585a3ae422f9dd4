"""commcomp.accelerate under real Accelerators on two ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from commcomp import LowRank
from tests.frameworks.launching import as_launched, digest, ratio_of, run_example, snippet
from tests.ranks import run_ranks

pytest.importorskip("accelerate")

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, PartialState

from commcomp.accelerate import compress

STEPS = 5
MODES = ("ddp", "fsdp2")


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 24))


class Run:
    """A model under an Accelerator of its own, compressed unless `method` is None."""

    def __init__(self, mode: str, method: Any, **options: Any) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        names = ("gradient_accumulation_steps", "mixed_precision")
        self.accelerator = Accelerator(cpu=True, **{key: options.pop(key) for key in names if key in options})
        self.accelerator.scaler = options.pop("scaler", None)  # which it makes itself on GPUs, for fp16
        if mode == "fsdp2":
            shard_on_the_cpu(self.accelerator)
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.state = method and compress(self.accelerator, self.model, method, **options)

    def losses(self, start: int, stop: int) -> list[float]:
        found = []
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(10 * step + self.accelerator.process_index)
            inputs, targets = (torch.randn(8, width, generator=generator) for width in (48, 24))
            with self.accelerator.accumulate(self.model):
                loss = nn.functional.mse_loss(self.model(inputs), targets)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            found.append(loss.item())
        return found


def shard_on_the_cpu(accelerator: Accelerator) -> None:
    """accelerate shards on GPUs alone; told that it does, it goes the same way on the CPU."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def whole(model: nn.Module) -> list[float]:
    """The first values of each parameter."""
    values = (getattr(value, "full_tensor", lambda value=value: value)() for value in model.parameters())
    return [value.flatten()[0].item() for value in values]


def _uninterrupted(rank: int, folder: str) -> dict[str, Any]:
    as_launched(rank)
    found: dict[str, Any] = {}
    for mode in MODES:
        plain = Run(mode, None).losses(0, STEPS)
        full_rank = Run(mode, LowRank(rank=64, min_ratio=0), strict=False).losses(0, STEPS)
        run = Run(mode, LowRank(rank=2, factor_dtype="int8"), measure_every=0)
        losses = run.losses(0, STEPS)
        run.accelerator.save_state(f"{folder}/{mode}")
        losses += run.losses(STEPS, 2 * STEPS)
        ratio, weights = run.state.stats()["ratio"], whole(run.model)
        found[mode] = {"plain": plain, "full": full_rank, "losses": losses, "ratio": ratio, "weights": weights}
    mean = Run("ddp", LowRank(rank=2), mean_residual=True)
    mean.losses(0, STEPS)
    mean.accelerator.save_state(f"{folder}/mean")
    found["mean"] = mean.losses(STEPS, 2 * STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    scaled = Run("ddp", LowRank(rank=2, factor_dtype="int8"), scaler=scaler)
    found["scaled"], found["scale"] = scaled.losses(0, STEPS), scaled.state.loss_scale
    bare = Run("ddp", None)
    scope = {"accelerator": bare.accelerator, "model": Net(), "optimizer": bare.optimizer, "folder": f"{folder}/shown"}
    exec(snippet(1), scope)
    found["shown"] = scope["state"].config.policy[0].method
    accumulated = Run("ddp", LowRank(rank=2), gradient_accumulation_steps=2, mixed_precision="bf16")
    accumulated.losses(0, 6)
    found["accumulated"] = (accumulated.state.stats()["steps"], digest(accumulated.model))
    return found


def _resumed(rank: int, folder: str) -> dict[str, Any]:
    as_launched(rank)
    found: dict[str, Any] = {}
    for mode in MODES:
        run = Run(mode, LowRank(rank=2, factor_dtype="int8"))
        run.accelerator.load_state(f"{folder}/{mode}")
        found[mode] = run.losses(STEPS, 2 * STEPS)
    run = Run("ddp", LowRank(rank=2))
    run.accelerator.load_state(f"{folder}/mean")
    found["mean"] = run.losses(STEPS, 2 * STEPS)
    run = Run("ddp", LowRank(rank=2, factor_dtype="int8"))
    with pytest.warns(UserWarning, match="begins anew"):
        run.accelerator.load_state(f"{folder}/without")
    found["anew"] = run.losses(STEPS, 2 * STEPS)
    return found


def test_training_and_resuming(tmp_path: Path) -> None:
    ranks = run_ranks(_uninterrupted, 2, str(tmp_path))
    for rank in ranks:
        for mode in MODES:
            assert rank[mode]["full"] == pytest.approx(rank[mode]["plain"], rel=1e-4)
            assert rank[mode]["losses"][:STEPS] != pytest.approx(rank[mode]["plain"], rel=1e-3)
            assert rank[mode]["ratio"] > 2
        assert rank["scaled"] == pytest.approx(rank["ddp"]["losses"][:STEPS], rel=1e-5) and rank["scale"] > 2.0**10
        assert rank["shown"] == LowRank(rank=16) and (tmp_path / "shown/gradient_sync/.metadata").exists()
        assert rank["accumulated"] == (3, ranks[0]["accumulated"][1])
    for mode in MODES:
        assert ranks[0][mode]["weights"] == ranks[1][mode]["weights"]
    shutil.copytree(tmp_path / "ddp", tmp_path / "without", ignore=shutil.ignore_patterns("gradient_sync"))
    for uninterrupted, resumed in zip(ranks, run_ranks(_resumed, 2, str(tmp_path))):
        for mode in MODES:
            assert resumed[mode] == pytest.approx(uninterrupted[mode]["losses"][STEPS:], rel=1e-4)
        assert resumed["mean"] == pytest.approx(uninterrupted["mean"], rel=1e-4)
        assert resumed["anew"] != pytest.approx(uninterrupted["ddp"]["losses"][STEPS:], rel=1e-3)


def test_the_example(tmp_path: Path) -> None:
    lines = run_example("accelerate_ddp.py", tmp_path)
    assert len(lines) == 4 and ratio_of(lines[-1]) > 5
    assert float(lines[-1].split()[3].rstrip(",")) < float(lines[0].split()[3].rstrip(","))


def _refused(rank: int) -> None:
    as_launched(rank)
    run = Run("ddp", LowRank(rank=2))
    with pytest.raises(ValueError, match="has a compressed model already"):
        compress(run.accelerator, run.model, LowRank(rank=2))
    bare = Run("ddp", None)
    with pytest.raises(ValueError, match=r"found a Linear, .*expected a DistributedDataParallel"):
        compress(bare.accelerator, nn.Linear(48, 24), LowRank(rank=2))


def test_what_cannot_work_is_refused() -> None:
    run_ranks(_refused, 2)
