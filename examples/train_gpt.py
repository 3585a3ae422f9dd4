"""Train a small GPT on the sources of Python's standard library, its gradients compressed by commcomp.

    torchrun --standalone --nproc-per-node 2 examples/train_gpt.py gradient=low_rank gradient.rank=8
    python examples/train_gpt.py model=gpt_1m gradient=none steps=100
    torchrun --standalone --nproc-per-node 2 examples/train_gpt.py checkpoint=standard checkpoint.every=100

Settings: configs/train_gpt.yaml and training.yaml. The run leaves `result.json`, TensorBoard logs and checkpoints in
`output_dir`, and when it was interrupted the same command goes on from the newest checkpoint;
`python -m commcomp.telemetry.report RUN_DIR... --out DIR` compares runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hydra
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from gpt_model import GPT, GPTConfig
from stdlib_text import Batches, held_out_batches, load_split
from train_checkpoint import Checkpoints
from train_gradients import Traffic, compress_gathers, spread, synchronise_gradients
from train_record import RunRecord, StepClock
from train_setup import (
    Place,
    check_settings,
    distributed,
    learning_rate,
    make_optimizer,
)


@hydra.main(version_base=None, config_path="../configs", config_name="train_gpt")
def main(config: DictConfig) -> None:
    check_settings(config)
    with distributed(config.device, config.timeout_seconds) as place:
        train(config, place)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is different from model to model."""

    make_model: Callable[[DictConfig], GPT] = lambda config: GPT(GPTConfig(**config.model))
    objective: Callable[[nn.Module, Tensor], Tensor] = lambda model, loss: loss
    """What is minimised, by the model and the loss of the forward pass just made."""
    clip: Callable[[nn.Module, float], object] = lambda model, largest: nn.utils.clip_grad_norm_(
        model.parameters(), largest
    )
    layer_stats: Callable[[nn.Module], dict[str, Any]] = lambda model: {}
    """Of the model's own parts, for the record."""
    evaluated: Callable[[nn.Module, int], object] = lambda model, step: None
    """Called on every rank after each held-out evaluation, with the steps done: to look at more."""


def train(config: DictConfig, place: Place, recipe: Recipe = Recipe()) -> None:
    torch.manual_seed(config.seed)  # equal weights on every rank; nothing else here draws random numbers
    bare_model = recipe.make_model(config).to(place.device)
    model = spread(bare_model, config.parallel, bucket_cap_mb=config.bucket_cap_mb, device=place.device)
    gathers = compress_gathers(model, config.parallel, config.gather_bits, config.gather_difference)
    optimizer = make_optimizer(bare_model, config)

    gradient = OmegaConf.to_container(config.gradient, resolve=True)
    gradient_sync = synchronise_gradients(model, config.parallel, gradient)  # a GradientSync, registered as a hook

    text, held_out_text = load_split()
    context = config.model.context
    batches = Batches(text, batch=config.batch, context=context, rank=place.rank, seed=config.seed)
    held_out = held_out_batches(
        held_out_text, batch=config.eval_batch, context=context, count=config.eval_batches
    )

    parameters = sum(p.numel() for p in bare_model.parameters())
    traffic = Traffic(model, config.parallel, gradient, gradient_sync, gathers)
    record = RunRecord(config, place, traffic, gradient_sync, parameters, lambda: recipe.layer_stats(bare_model))
    checkpoints = Checkpoints(config, bare_model, optimizer, gradient_sync, record)
    first_step = checkpoints.resume()

    clock = StepClock(place)
    for step in range(first_step, config.steps):
        clock.start()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        tokens, targets = (part.to(place.device) for part in batches.at(step))
        with torch.autocast(place.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = model(tokens, targets)
        optimizer.zero_grad()
        recipe.objective(bare_model, loss).backward()
        if config.gradient_clip:
            recipe.clip(bare_model, config.gradient_clip)
        optimizer.step()
        clock.stop(loss)

        # None of what follows counts into the step time.
        done = step + 1
        traffic.step()
        record.advance(done)
        checkpoints.poll()
        evaluate_now = done % config.eval_every == 0 or done == config.steps
        save_now = checkpoints.due(done)
        if done % config.log_every == 0 or evaluate_now or save_now:
            record.extend(clock.read())
        if evaluate_now:
            record.held_out(done, held_out_loss(bare_model, held_out, place))
            recipe.evaluated(bare_model, done)
        if save_now:
            checkpoints.save(done)
    checkpoints.wait()
    record.finish()


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: list[tuple[Tensor, Tensor]], place: Place) -> float:
    """Mean loss over `batches`, which the ranks share out among themselves; the same number on every rank."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=place.device)
    for turn in range(0, len(batches), place.world_size):
        # A sharded model gathers parameters in every forward pass: all ranks make as many.
        mine = turn + place.rank
        tokens, targets = batches[min(mine, len(batches) - 1)]
        loss = model(tokens.to(place.device), targets.to(place.device))
        if mine < len(batches):
            total += loss
    model.train()
    dist.all_reduce(total)
    return float(total) / len(batches)


if __name__ == "__main__":
    main()
