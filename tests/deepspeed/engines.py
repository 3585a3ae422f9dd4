"""Small engines on two processes, and the same training by DDP and FSDP2, which their losses must equal."""

from __future__ import annotations

import os
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commcomp

VOCABULARY, WIDTH = 72, 32


class Model(nn.Module):
    """A classifier of characters; `inner`: rows of one of its matrices, perhaps no multiple of the ranks."""

    def __init__(self, inner: int = WIDTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.first = nn.Linear(WIDTH, 4 * WIDTH)
        self.odd = nn.Linear(4 * WIDTH, inner)
        self.norm = nn.LayerNorm(inner)
        self.head = nn.Linear(inner, VOCABULARY)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(self.first(self.embedding(tokens)))
        logits = self.head(self.norm(self.odd(hidden)))
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def batch(step: int, rank: int, micro: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens, [8, 16], and what follows them: a rule with noise."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    tokens = torch.randint(0, VOCABULARY, (8, 16), generator=generator)
    return tokens, (3 * tokens + torch.randint(0, 3, tokens.shape, generator=generator)) % VOCABULARY


def make_model(dtype: torch.dtype = torch.float32, inner: int = WIDTH) -> Model:
    """The same on every rank."""
    torch.manual_seed(0)
    return Model(inner).to(dtype)


def no_compiling() -> None:
    """DeepSpeed compiles its shared-memory reduction for minutes, unless told that it is not there."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def ds_config(stage: int, gradient: dict[str, Any] | None, *, bf16: bool = False, **more: Any) -> dict[str, Any]:
    """A configuration with the block, if there is to be one."""
    zero = {"stage": stage, **more.pop("zero", {})}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
        "steps_per_print": 100000,
        **more,
    }
    if bf16:
        config["bf16"] = {"enabled": True}
    if gradient is not None:
        config["commcomp"] = {"gradient": gradient}
    return config


def make_engine(config: dict[str, Any], model: nn.Module | None = None, *, always_ours: bool = False) -> Any:
    """An engine with torch's AdamW; by commcomp's `initialize` if the configuration has a block."""
    import deepspeed

    no_compiling()
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))  # as torchrun does
    model = make_model() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    make = commcomp.deepspeed.initialize if always_ours or "commcomp" in config else deepspeed.initialize
    engine, *_ = make(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def train_engine(engine: Any, steps: range, micro_batches: int = 1) -> list[float]:
    """Mean losses over ranks, one a step."""
    losses = []
    for step in steps:
        total = 0.0
        for micro in range(micro_batches):
            loss = engine(*batch(step, dist.get_rank(), micro))
            engine.backward(loss)
            engine.step()
            total += float(loss.detach()) / micro_batches
        losses.append(_mean(total))
    return losses


def train_ddp(
    gradient: dict[str, Any] | None, steps: int, *, micro_batches: int = 1, bf16: bool = False, begun: bool = False
) -> list[float]:
    """The same by DistributedDataParallel; in bf16 with weights in fp32 beside the model, perhaps `begun`: after a step
    of zeros, by which DeepSpeed's unfused optimizer makes its state."""
    model = DistributedDataParallel(make_model(torch.bfloat16 if bf16 else torch.float32), bucket_cap_mb=25)
    if gradient is not None:
        model.register_comm_hook(commcomp.GradientSync.from_config(model, gradient), commcomp.comm_hook)
    return _train(model, steps, micro_batches, masters=bf16, begun=begun)


def train_fsdp2(gradient: dict[str, Any] | None, steps: int, inner: int = WIDTH) -> list[float]:
    """The same by fully_shard on the whole model."""
    from torch.distributed.fsdp import fully_shard

    model = make_model(inner=inner)
    fully_shard(model)
    if gradient is not None:
        commcomp.fsdp.register_comm_hook(model, commcomp.GradientSync.from_config(model, gradient))
    return _train(model, steps, 1)


def _train(
    model: nn.Module, steps: int, micro_batches: int, *, masters: bool = False, begun: bool = False
) -> list[float]:
    weights = list(model.parameters())
    optimized = [nn.Parameter(value.detach().float().clone()) for value in weights] if masters else weights
    optimizer = torch.optim.AdamW(optimized, lr=3e-3)
    if begun:
        for own in optimized:
            own.grad = torch.zeros_like(own)
        optimizer.step()
    losses = []
    for step in range(steps):
        total = 0.0
        for micro in range(micro_batches):
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = micro == micro_batches - 1
            loss = model(*batch(step, dist.get_rank(), micro))
            (loss / micro_batches).backward()
            total += float(loss.detach()) / micro_batches
        for own, value in zip(optimized, weights, strict=True):
            own.grad = value.grad.float() if masters else value.grad
        optimizer.step()
        with torch.no_grad():
            for own, value in zip(optimized, weights, strict=True):
                value.copy_(own)
                value.grad = None
        losses.append(_mean(total))
    return losses


def _mean(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def whole_weights(engine: Any) -> list[Tensor]:
    """Copies, also under ZeRO 3."""
    import deepspeed

    found = []
    for parameter in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found.append(parameter.detach().float().clone())
    return found


def same_on_all_ranks(engine: Any) -> bool:
    """Whether all ranks have the same weights."""
    equal = True
    for mine in whole_weights(engine):
        other = mine.clone()
        dist.broadcast(other, 0)
        equal &= bool(torch.equal(mine, other))
    return equal


def fail_in_backward(engine: Any) -> None:
    """A pass whose backward raises when half of the gradients are there."""

    def fail(gradient: Tensor) -> None:
        raise ArithmeticError("as asked for")

    def watch(module: nn.Module, arguments: Any, output: Tensor) -> None:
        output.register_hook(fail)

    handle = engine.module.first.register_forward_hook(watch)
    try:
        engine.backward(engine(*batch(999, dist.get_rank())))
    except ArithmeticError:
        pass
    finally:
        handle.remove()
    engine.zero_grad()
