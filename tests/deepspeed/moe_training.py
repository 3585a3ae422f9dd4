"""Small models with DeepSpeed's MoE layers, their engines and their training, for tests in processes of their own."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.moe.layers import clustered

WIDTH, EXPERTS, BATCH, LENGTH = 16, 4, 4, 16


def start() -> Any:
    """DeepSpeed, for processors alone; nothing is compiled."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(dist.get_rank()))
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Model(nn.Module):
    """One or two MoE layers between linear ones; experts differ from rank to rank, the rest is equal."""

    def __init__(self, *, layers: int = 1, recompute: bool = False, **settings: Any) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        torch.manual_seed(0)
        self.recompute = recompute
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        settings = {"num_experts": EXPERTS, "ep_size": 2, "k": 1, "capacity_factor": 1.25, **settings}
        self.blocks = nn.ModuleList(
            MoE(WIDTH, nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)), **settings)
            for _ in range(layers)
        )
        torch.manual_seed(1 + dist.get_rank() % settings["ep_size"])
        for layer in self.moe_layers():
            for parameter in layer.experts.parameters():
                nn.init.normal_(parameter, std=0.2)

    def moe_layers(self) -> list[Any]:
        return [block.deepspeed_moe for block in self.blocks]

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x, balance = torch.tanh(self.before(tokens)), tokens.new_zeros(())
        for block in self.blocks:
            made, loss, _ = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
            x, balance = x + made, balance + loss
        return self.after(x), balance


def engine_of(model: nn.Module, stage: int, rate: float = 0.3, bf16: bool = False) -> Any:
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
    }
    return deepspeed.initialize(model=model, optimizer=torch.optim.SGD(groups, lr=rate), config=config)[0]


def tokens_of(step: int) -> Tensor:
    return clustered((BATCH, LENGTH, WIDTH), seed=1 + step % 8 + 100 * dist.get_rank(), noise=0.2)


def loss_of(engine: Any, step: int) -> Tensor:
    tokens = tokens_of(step)
    made, balance = engine(tokens.to(next(engine.parameters()).dtype))
    return (made.float() - tokens.flip(-1).square()).square().mean() + 0.01 * balance


def train(engine: Any, steps: int, first: int = 0) -> list[float]:
    """Losses, means over ranks."""
    losses = []
    for step in range(first, first + steps):
        torch.manual_seed(10 * step + dist.get_rank())  # the gate draws numbers
        loss = loss_of(engine, step)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
    return losses


def weights_of(engine: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in engine.module.parameters()]
