"""Beside torch's own PowerSGD where that is correct, and a real optimisation beside plain DDP."""

from __future__ import annotations

import copy
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_powersgd
from torch.nn.parallel import DistributedDataParallel

import commcomp
from commcomp import GradientSync, LowRank
from tests.ranks import run_ranks
from tests.reference.given_gradients import GivenGradients, Run, copy_state, gradients_of, relative_difference

SHAPES = {"a": (40, 30), "bias": (40,), "b": (40, 30), "conv": (24, 8, 3, 3), "c": (30, 50)}
RANK, DENSE_STEPS, STEPS = 3, 2, 8
"""Rank 3: below that torch's Gram-Schmidt divides by zero norms. One bucket: with two its hook hangs on gloo."""
NO_METHOD = Run(SHAPES)


def torch_steps(rank: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Decoded gradients of torch's hook, and the first Q that it drew for each matrix, [r, m] after orthogonalising."""
    model = DistributedDataParallel(GivenGradients(SHAPES))
    names = {id(value): name for name, value in model.module.named_parameters()}
    state = torch_powersgd.PowerSGDState(
        None, matrix_approximation_rank=RANK, start_powerSGD_iter=DENSE_STEPS, min_compression_rate=1
    )
    order: list[str] = []

    def hook(state, bucket):
        order[:] = [names[id(value)] for value in bucket.parameters()]
        return torch_powersgd.powerSGD_hook(state, bucket)

    model.register_comm_hook(state, hook)
    decoded = feed(rank, model)
    return decoded, first_factors(order)


def first_factors(order: list[str]) -> dict[str, torch.Tensor]:
    """What torch's hook draws: one seed from RandomState(0), then the matrices by shape in the bucket's order."""
    by_shape = defaultdict(list)
    for name in order:
        if len(SHAPES[name]) > 1:
            by_shape[SHAPES[name][0], torch.Size(SHAPES[name][1:]).numel()].append(name)
    generator = torch.Generator().manual_seed(int(np.random.RandomState(0).randint(1_000_000_000)))
    return {
        name: torch.randn(1, shape[1], RANK, generator=generator)[0].T.contiguous()
        for shape, names in by_shape.items()
        for name in names
    }


def feed(rank: int, model: DistributedDataParallel) -> list[dict]:
    decoded = []
    for step in range(STEPS):
        model.zero_grad()
        model(gradients_of(NO_METHOD, rank, step)).backward()
        decoded.append({name: value.grad.clone() for name, value in model.module.named_parameters()})
    return decoded


def both_hooks(rank: int) -> tuple[list[dict], list[dict], list[dict]]:
    expected, factors = torch_steps(rank)
    found = []
    for first in (factors, {}):
        model = DistributedDataParallel(GivenGradients(SHAPES))
        sync = GradientSync(model, LowRank(rank=RANK), start_step=DENSE_STEPS)
        state = copy_state(sync)
        for name, factor in first.items():
            assert state[f"warm_right/{name}"].shape == factor.shape
            state[f"warm_right/{name}"] = factor
        sync.load_state_dict(state)
        model.register_comm_hook(sync, commcomp.comm_hook)
        found.append(feed(rank, model))
    return expected, found[0], found[1]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_steps_equal_those_of_torchs_hook(num_ranks):
    """From the same first Q. The residuals differ by definition, their mean over ranks does not."""
    for expected, found, other_start in run_ranks(both_hooks, num_ranks):
        for step in range(STEPS):
            for name, value in expected[step].items():
                assert relative_difference(found[step][name], value) < 1e-4, (step, name)
        # The comparison has teeth: from another first Q the first compressed steps differ.
        assert relative_difference(other_start[DENSE_STEPS]["a"], expected[DENSE_STEPS]["a"]) > 1e-2


def make_problem() -> tuple[nn.Module, nn.Module]:
    """A teacher to be fitted and a student, equal on all ranks."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16))
    student = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16))
    return teacher, student


def train(rank: int, method: LowRank | None, steps: int) -> float:
    """The loss on common data after `steps` of momentum SGD on each rank's own."""
    teacher, student = make_problem()
    model = DistributedDataParallel(copy.deepcopy(student))
    if method is not None:
        model.register_comm_hook(GradientSync(model, method), commcomp.comm_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(100 + rank)
    for _ in range(steps):
        inputs = torch.randn(64, 24, generator=generator) + 0.5 * rank  # ranks see different data
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), teacher(inputs).detach())
        loss.backward()
        optimizer.step()
    inputs = torch.randn(1000, 24, generator=torch.Generator().manual_seed(1)) + 0.25
    with torch.no_grad():
        return float(nn.functional.mse_loss(model(inputs), teacher(inputs)))


def train_all(rank: int, methods: list[LowRank | None], steps: int) -> list[float]:
    return [train(rank, method, steps) for method in methods]


def losses(num_ranks: int) -> tuple[float, float, list[float]]:
    """Loss before training and of plain DDP, and of rank 2 with narrow factors."""
    methods = [LowRank(rank=2, factor_dtype=dtype, rounds=rounds) for dtype in ("int8", "bf16") for rounds in (2, 1)]
    runs = run_ranks(train_all, num_ranks, [None, *methods[: 2 if num_ranks > 2 else 4]], 150)
    assert all(run == runs[0] for run in runs)  # equal bits on all ranks give equal losses
    (start,) = run_ranks(train_all, 1, [None], 0)[0]
    return start, runs[0][0], runs[0][1:]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_training_at_rank_two_with_narrow_factors_reaches_plain_training(num_ranks):
    start, plain, compressed = losses(num_ranks)
    assert plain < 0.05 * start
    for loss in compressed:
        assert loss < 1.05 * plain, (start, plain, compressed)
