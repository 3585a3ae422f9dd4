"""Compressed parameter all-gathers: what the passes see, what stays exact, bytes, and training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import commcomp
from commcomp import Quantized
from tests import fsdp_training as f
from tests.ranks import run_ranks

LAYOUTS = pytest.mark.parametrize(("parallel", "num_ranks"), [("fsdp2", 3), ("hsdp", 4)])
EIGHT, FOUR = Quantized(bits=8, block=16), Quantized(bits=4, block=16)


def _seen(rank: int, parallel: str, method: Any, difference: bool) -> tuple[list[float], bool, bool, float]:
    """By forward pass: the largest error of a gathered matrix; whether vectors and masters were exact; bytes saved."""
    model, _ = f.wrap(parallel)
    sent = commcomp.fsdp.compress_all_gathers(model, method, difference=difference)
    exact = dict(f.Net().named_parameters())
    masters = [value.to_local().clone() for value in model.parameters()]
    errors, vectors = [], True
    for module in (*model.blocks, model):
        module.set_reshard_after_forward(False)
    for _ in range(4):
        model(f.inputs(rank, 0))
        worst = 0.0
        for name, value in model.named_parameters():
            if value.dim() > 1:
                worst = max(worst, float((value - exact[name]).abs().max() / exact[name].abs().max()))
            else:
                vectors &= torch.equal(value, exact[name])
        errors.append(worst)
        gathered = torch.cat([value.detach().reshape(-1) for value in model.parameters()])
        everyone = [torch.empty_like(gathered) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, gathered)
        assert all(torch.equal(other, gathered) for other in everyone)
        for module in (*model.blocks, model):
            module.reshard()
    kept = all(torch.equal(value.to_local(), master) for value, master in zip(model.parameters(), masters))
    return errors, vectors, kept, sent.plain_wire_bytes / sent.wire_bytes


@LAYOUTS
def test_all_ranks_see_the_same_rounded_matrices_and_exact_vectors(parallel, num_ranks):
    for method, bound in ((EIGHT, 0.01), (FOUR, 0.15)):
        for errors, vectors, kept, ratio in run_ranks(_seen, num_ranks, parallel, method, False):
            assert all(0 < error < bound for error in errors)
            assert vectors and kept
            assert ratio > 2.5


@LAYOUTS
def test_differences_leave_no_lasting_error(parallel, num_ranks):
    for errors, vectors, kept, _ in run_ranks(_seen, num_ranks, parallel, FOUR, True):
        assert errors[0] == 0 and max(errors) < 1e-6  # constant weights: there is no difference
        assert vectors and kept


def _train(rank: int, parallel: str, gathers: Any, difference: bool) -> float:
    """The loss after some steps on one batch."""
    model, _ = f.wrap(parallel, Quantized(block=16), fsdp={})
    if gathers is not None:
        commcomp.fsdp.compress_all_gathers(model, gathers, difference=difference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    target = torch.randn(6, 5, generator=torch.Generator().manual_seed(rank))
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(f.inputs(rank, 0)), target)
        loss.backward()
        optimizer.step()
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return float(mean)


def _train_all(rank: int, parallel: str) -> list[float]:
    cases = [(None, False), (EIGHT, False), (EIGHT, True), (FOUR, True)]
    return [_train(rank, parallel, *case) for case in cases]


@pytest.mark.parametrize(("parallel", "num_ranks"), [("fsdp2", 2), ("hsdp", 4)])
def test_training_reaches_the_loss_of_exact_gathers(parallel, num_ranks):
    exact, *others = run_ranks(_train_all, num_ranks, parallel)[0]
    assert exact < 0.2
    assert all(loss < 1.25 * exact + 0.01 for loss in others), (exact, others)


def _odd_cases(rank: int) -> tuple[str, float]:
    try:
        commcomp.fsdp.compress_all_gathers(f.Net(), EIGHT)
        text = "accepted"
    except ValueError as error:
        text = str(error)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, _ = f.wrap("fsdp2", Quantized(block=16), fsdp={"mp_policy": policy})
    commcomp.fsdp.compress_all_gathers(model, EIGHT)
    f.backward(model, rank, 0)
    return text, f.difference(f.gradients(model), f.true_mean(dist.get_world_size(), 0))


def test_whole_models_are_refused_and_low_precision_works():
    for text, error in run_ranks(_odd_cases, 2):
        assert "fully_shard" in text
        assert error < 0.1
