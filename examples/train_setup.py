"""What examples/train_gpt.py needs around its loop: processes, settings, optimizer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import nn

from train_gradients import PARALLEL
from train_storage import MODES


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands: its rank among `world_size` and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device


@contextmanager
def distributed(device: str, timeout_seconds: float = 600) -> Iterator[Place]:
    """Join torchrun's process group, or make one of a single process; `device` is auto, cpu or cuda.

    A rank that waits longer than `timeout_seconds` for another gives up, so that torchrun can restart all of them.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    enough_gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}; expected auto, cpu or cuda")
    if device == "cuda" and not enough_gpus:
        raise ValueError("device=cuda needs a GPU per process; use device=cpu")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available() and enough_gpus)
    target = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(target)
    backend = "nccl" if on_gpu else "gloo"
    if dist.is_torchelastic_launched():
        timeout = timedelta(seconds=timeout_seconds)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun's store outlives a restart, and gloo would connect to the dead processes' addresses in it.
        store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield Place(rank=dist.get_rank(), world_size=dist.get_world_size(), device=target)
    dist.destroy_process_group()  # only after success: with a lost peer it could wait for ever


def check_settings(config: DictConfig) -> None:
    """Raise ValueError naming the setting, its value and what was expected."""
    at_least = {
        "steps": 1, "batch": 1, "log_every": 1, "eval_every": 1, "eval_batches": 1, "eval_batch": 1,
        "warmup_steps": 0, "gradient_clip": 0, "seed": 0,
    }  # fmt: skip
    if config.checkpoint.mode not in ("none", "plain", *MODES):
        modes = ", ".join(("none", "plain", *MODES))
        raise ValueError(f"checkpoint.mode is {config.checkpoint.mode!r}; expected one of {modes}")
    if config.checkpoint.mode != "none":
        at_least |= {"checkpoint.every": 1, "checkpoint.keep": 1}
    for name, minimum in at_least.items():
        value = OmegaConf.select(config, name)
        if not isinstance(value, (int, float)) or value < minimum:
            raise ValueError(f"{name} is {value!r}; expected a number of at least {minimum}")
    if config.parallel not in PARALLEL:
        raise ValueError(f"parallel is {config.parallel!r}; expected one of {', '.join(PARALLEL)}")
    if config.precision not in ("fp32", "bf16"):
        raise ValueError(f"precision is {config.precision!r}; expected fp32 or bf16")


def make_optimizer(model: nn.Module, config: DictConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings but not the norms' vectors."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    decay = config.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=tuple(config.betas))


def learning_rate(step: int, config: DictConfig) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine down to `final_learning_rate` of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


def run_name(config: DictConfig) -> str:
    """Short name of a run for tables and plots, such as `low_rank rank=4 int8 rounds=1, fsdp2`."""
    gathers = ""
    if config.gather_bits:
        gathers = f"gathers {config.gather_bits} bits" + (" of the difference" if config.gather_difference else "")
    if "moe" in config:
        return _tokens_name(config.moe)
    parallel, name = config.parallel, _gradient_name(config.gradient)
    if name == "none":
        name, parallel = f"plain {parallel.upper()}", "ddp"
    return ", ".join(part for part in (name, "" if parallel == "ddp" else parallel, gathers) if part)


def _tokens_name(tokens: Mapping[str, Any]) -> str:
    lsh, quantized = tokens.get("lsh"), tokens.get("quantized")
    parts = [f"clusters rate={lsh['rate']} {lsh['search']} {lsh['centroid']}"] if lsh else []
    return " ".join([*parts, *([quantized["dtype"]] if quantized else [])]) or "plain all-to-all"


def _gradient_name(gradient: Mapping[str, Any]) -> str:
    method = gradient.get("method")
    residual = gradient.get("residual_dtype", "fp32")
    kept = {"fp32": "", "none": " without error feedback"}.get(residual, f" residual {residual}")
    if method is None:
        return f"policy of {len(gradient.get('policy', ()))} rules{kept}"
    parts = [str(method)]
    for key in ("rank", "bits", "density", "layers", "factor_dtype", "value_dtype", "dtype", "rounds"):
        if key in gradient:
            parts.append(str(gradient[key]) if key.endswith("dtype") or key == "layers" else f"{key}={gradient[key]}")
    return " ".join(parts) + kept
