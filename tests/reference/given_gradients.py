"""Real DDP steps whose gradients are known: a model whose parameters' gradients are whatever the caller passes."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commcomp
from commcomp import Dense, GradientSync, LowRank, Rule
from commcomp.compressors import low_rank, native
from commcomp.reduction import CompressedReduction

Tensors = dict[str, Tensor]


class GivenGradients(nn.Module):
    """`model(gradients).backward()` gives each parameter exactly its entry of `gradients` as gradient."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, gradients: Tensors) -> Tensor:
        return sum((value * gradients[name]).sum() for name, value in self.named_parameters())


def make_gradients(shapes: Mapping[str, tuple[int, ...]], rank: int, step: int) -> Tensors:
    """Rank-3 signal that all ranks share, plus a rank's own offset and noise; fixed by name, rank and step."""

    def normal(*key: object, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(repr(key).encode())))

    gradients = {}
    for name, shape in shapes.items():
        rows, columns = (*shape, 1)[0], torch.Size(shape[1:]).numel()
        signal = normal(name, "left", shape=(rows, 3)) @ normal(name, "right", shape=(3, columns))
        offset = normal(name, "offset", rank, shape=(rows, columns))
        noise = normal(name, "noise", rank, step, shape=(rows, columns))
        gradients[name] = (signal + 0.5 * offset + 0.5 * noise).view(shape)
    return gradients


@dataclass(frozen=True)
class Run:
    """A training run without an optimizer: `steps` backward passes with the gradients of `make_gradients`."""

    shapes: dict[str, tuple[int, ...]]
    method: LowRank | Dense | None = None
    """None: plain DDP, without a hook."""
    policy: tuple[Rule | tuple[str, LowRank | Dense], ...] | None = None
    steps: int = 4
    settings: dict[str, Any] = field(default_factory=dict)
    bucket_cap_mb: float = 25
    spoil: dict[int, tuple[int, str, float]] = field(default_factory=dict)
    """Step to (rank, parameter, value): one element of that gradient on that rank only is the value."""
    reload_at: int | None = None
    """Before this step a new model and a new `GradientSync` take over, from the state dict of the old."""
    reload_bucket_cap_mb: float = 25
    left_out: tuple[int, ...] = ()
    """Steps that do not happen."""
    given: list[Tensors] | None = None
    """Gradients by step, the same on every rank, instead of those of `make_gradients`."""
    cholesky: bool = False
    """Take the basis by the Cholesky route, as on a GPU."""
    native: bool = True
    """Take commcomp._native's passes where they can be used, not torch's operations."""
    threads: int = 1
    flag_as_tensor: bool = False
    """Whether a step is finite reaches the reductions as a tensor, as on a GPU, and not as a bool."""


@dataclass
class Outcome:
    """What one rank saw."""

    decoded: list[Tensors]
    """By step: what the parameters' .grad held after the backward pass."""
    states: list[Tensors]
    """Copies of the state dict: before the first step, then after each."""
    buckets: list[list[int]]
    """By step: the number of parameters of each bucket, in the order in which the hook got them."""
    stats: dict[str, Any]

    def residual(self, rank: int, name: str, step: int = -1) -> Tensor:
        return self.states[step][f"rank_{rank}/residual/{name}"]


def gradients_of(run: Run, rank: int, step: int) -> Tensors:
    """The gradients that rank `rank` feeds into step `step`."""
    if run.given is not None:
        return {name: value.clone() for name, value in run.given[step].items()}
    gradients = make_gradients(run.shapes, rank, step)
    where = run.spoil.get(step)
    if where is not None and where[0] == rank:
        gradients[where[1]].view(-1)[-1] = where[2]
    return gradients


def mean_gradients(run: Run, num_ranks: int, step: int) -> Tensors:
    """The mean over ranks, in fp64."""
    everyone = [gradients_of(run, rank, step) for rank in range(num_ranks)]
    return {name: sum(own[name].double() for own in everyone) / num_ranks for name in run.shapes}


def perform(rank: int, runs: list[Run]) -> list[Outcome]:
    """Do the runs one after another; the function to hand to `run_ranks`."""
    return [_perform_as_on_gpu(rank, run) for run in runs]


def _perform_as_on_gpu(rank: int, run: Run) -> Outcome:
    with ExitStack() as patches:
        if run.cholesky:
            route = low_rank.cholesky_orthonormal_rows
            patches.enter_context(mock.patch.object(low_rank, "orthonormal_rows", route))
        patches.enter_context(mock.patch.object(native, "available", run.native))
        if run.threads > 1:
            patches.enter_context(mock.patch.object(native, "VALUES_A_THREAD", 1))
            patches.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(run.threads)
        if run.flag_as_tensor:
            for method in ("start_second", "finish"):
                original = getattr(CompressedReduction, method)
                patched = functools.partialmethod(_with_tensor, original)
                patches.enter_context(mock.patch.object(CompressedReduction, method, patched))
        return _perform_one(rank, run)


def _with_tensor(reduction, original, step_is_finite):
    return original(reduction, torch.tensor(step_is_finite))


def _recording_hook(state, bucket):
    sync, buckets = state
    buckets.append(len(bucket.gradients()))
    return commcomp.comm_hook(sync, bucket)


def _attach(run: Run, bucket_cap_mb: float, buckets: list[int]) -> tuple[DistributedDataParallel, GradientSync | None]:
    model = DistributedDataParallel(GivenGradients(run.shapes), bucket_cap_mb=bucket_cap_mb)
    if run.method is None and run.policy is None:
        return model, None
    sync = GradientSync(model, run.method, policy=run.policy, **run.settings)
    model.register_comm_hook((sync, buckets), _recording_hook)
    return model, sync


def _perform_one(rank: int, run: Run) -> Outcome:
    seen: list[int] = []
    model, sync = _attach(run, run.bucket_cap_mb, seen)
    outcome = Outcome([], [copy_state(sync)], [], {})
    for step in range(run.steps):
        if step in run.left_out:
            continue
        if step == run.reload_at:
            saved = copy_state(sync)
            model, sync = _attach(run, run.reload_bucket_cap_mb, seen)
            sync.load_state_dict(saved)
        seen.clear()
        model.zero_grad()
        model(gradients_of(run, rank, step)).backward()
        outcome.decoded.append({name: value.grad.clone() for name, value in model.module.named_parameters()})
        outcome.states.append(copy_state(sync))
        outcome.buckets.append(list(seen))
    outcome.stats = sync.stats() if sync is not None else {}
    return outcome


def copy_state(sync: GradientSync | None) -> Tensors:
    """A copy of `sync.state_dict()`, whose values are live."""
    return {} if sync is None else {key: value.clone() for key, value in sync.state_dict().items()}


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal to the bit, NaN included."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(_as_integers(left), _as_integers(right))


def _as_integers(values: Tensor) -> Tensor:
    # A tensor of length 1 may count as contiguous whatever its stride, and then cannot be viewed as bytes.
    return torch.empty(values.numel(), dtype=values.dtype).copy_(values.reshape(-1)).view(torch.uint8)


def relative_difference(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected|, in fp64 (infinite where something is not finite)."""
    difference = float((value.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))
    return difference if difference == difference else float("inf")
