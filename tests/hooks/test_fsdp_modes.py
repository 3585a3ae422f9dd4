"""FSDP2 and HSDP in training: precision, offload, clipping, loss scaling, against torch without a hook."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from commcomp import Dense, LowRank, Quantized
from tests import fsdp_training as f
from tests.ranks import run_ranks

EIGHT = Quantized(block=16)
FULL_RANK = LowRank(rank=64, min_ratio=0)
LAYOUTS = pytest.mark.parametrize(("parallel", "num_ranks"), [("fsdp2", 2), ("hsdp", 4)])
LOW_PRECISION = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)


def _whole(value: Any) -> torch.Tensor:
    found: torch.Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return found.detach().clone()


def _trained(
    rank: int, parallel: str, method: Any, *, clip: float | None = None, accumulate: int = 1, **fsdp: Any
) -> dict[str, torch.Tensor]:
    """The parameters after three steps of AdamW, of `accumulate` micro-batches each."""
    model, _ = f.wrap(parallel, method, fsdp=fsdp, **({} if method is None else {"strict": False}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        for micro in range(accumulate):
            model.set_requires_gradient_sync(micro == accumulate - 1)
            f.backward(model, rank, 10 * step + micro)
        if clip is not None:
            assert float(_whole(nn.utils.clip_grad_norm_(model.parameters(), clip))) > clip
        optimizer.step()
    return {name: _whole(value).float() for name, value in model.named_parameters()}


TRAININGS: dict[str, dict[str, Any]] = {
    "clipped": {"clip": 0.5},
    "kept gathered": {"reshard_after_forward": False},
    "offloaded, accumulated, clipped": {
        "offload_policy": CPUOffloadPolicy(pin_memory=False), "accumulate": 2, "clip": 0.5
    },
    "bf16, reduced in fp32": {"mp_policy": LOW_PRECISION},
    "bf16, reduced in fp32, accumulated, kept gathered": {
        "mp_policy": LOW_PRECISION, "accumulate": 2, "reshard_after_forward": False
    },
}

OF_FOUR: dict[str, dict[str, Any]] = {"resharded to two": {"reshard_after_forward": 2}}


def _train_all(rank: int, parallel: str, trainings: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """By training: how far the parameters are from torch's with Dense, full rank, and 8 bits."""
    found = {}
    for what, options in trainings.items():
        plain = _trained(rank, parallel, None, **options)
        runs = [_trained(rank, parallel, method, **options) for method in (Dense(), FULL_RANK, EIGHT)]
        found[what] = [f.difference(run, plain) for run in runs]
    return found


@pytest.mark.parametrize(
    ("parallel", "num_ranks", "trainings"), [("fsdp2", 2, TRAININGS), ("hsdp", 4, TRAININGS), ("fsdp2", 4, OF_FOUR)]
)
def test_trained_parameters_are_those_of_torch(parallel, num_ranks, trainings):
    for found in run_ranks(_train_all, num_ranks, parallel, trainings, timeout=120):
        for what, (dense, *others) in found.items():
            bounds = (2e-3, 0.1) if "bf16" in what else (1e-3, 0.1)
            assert dense < 1e-5, (what, found)
            assert all(error < bound for error, bound in zip(others, bounds)), (what, found)


def _divided(rank: int, parallel: str, method: Any) -> list[float]:
    """Against torch with divisors of the user's own, summed by force, since gloo has no PREMUL_SUM."""
    errors = []
    for divisor in (2.0, 6.0):
        seen = []
        for used in (None, method):
            model, _ = f.wrap(parallel, used)
            for module in model.modules():
                if hasattr(module, "set_gradient_divide_factor"):
                    module.set_gradient_divide_factor(divisor)
                    module.set_force_sum_reduction_for_comms(True)
            seen.append(f.train(model, rank, 0, 1))
        errors.append(max(map(f.difference, seen[1], seen[0])))
    return errors


@LAYOUTS
def test_divisors_are_those_of_torch(parallel, num_ranks):
    for errors in run_ranks(_divided, num_ranks, parallel, EIGHT):
        assert all(error < 0.02 for error in errors), errors


def _half(rank: int, parallel: str) -> list[float]:
    """How far torch's own reduction in bf16, and ours, is from that of the same gradients in fp32."""
    plain, _ = f.wrap(parallel, fsdp={"mp_policy": LOW_PRECISION})
    true, found = f.train(plain, rank, 0, 1), []
    for method in (None, Dense(), EIGHT):
        seen = f.run(parallel, rank, method, steps=2, fsdp={"mp_policy": HALF})
        found.append(max(map(f.difference, seen, true)))
    return found


@LAYOUTS
def test_reducing_in_bf16_is_as_good_as_torchs_own(parallel, num_ranks):
    for torchs_own, ours, eight in run_ranks(_half, num_ranks, parallel):
        assert ours <= torchs_own < 0.01 and eight < 0.02, (torchs_own, ours, eight)


def _scaled(rank: int, parallel: str) -> dict[str, Any]:
    """Five steps of SGD under a GradScaler; in the third, one rank's loss is Inf."""
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(3)]
    plain, exact, lossy = f.wrap(parallel)[0], *(
        f.wrap(parallel, method, grad_scaler=scaler, strict=False)
        for method, scaler in zip((FULL_RANK, EIGHT), scalers[1:], strict=True)
    )
    models, state = [plain, exact[0], lossy[0]], lossy[1]
    assert state is not None
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in models]
    residuals, weights, scales = [], [], []
    for step in range(5):
        for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            loss = model(f.inputs(rank, step)).square().sum()
            scaler.scale(loss * float("inf") if step == 2 and rank == 1 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
        residuals.append({key: f.local(value) / state.loss_scale for key, value in _residuals(state).items()})
        weights.append([{name: _whole(value) for name, value in model.named_parameters()} for model in models])
        scales.append([scaler.get_scale() for scaler in scalers])
    before, after = weights[1], weights[2]
    return {
        "scales": scales,
        "skipped": all(f.difference(*pair) == 0 for pair in zip(after, before, strict=True)),
        "moved": f.difference(weights[4][2], after[2]) > 1e-4,
        "residuals kept": all(torch.equal(value, residuals[1][key]) for key, value in residuals[2].items()),
        "residuals move": all(not torch.equal(value, residuals[2][key]) for key, value in residuals[3].items()),
        "errors": [f.difference(weights[4][index], weights[4][0]) for index in (1, 2)],
    }


def _residuals(state: Any) -> dict[str, Any]:
    found = {key: value for key, value in state.state_dict().items() if f"rank_{state.rank}/residual/" in key}
    assert found
    return {key: value for key, value in found.items() if f.local(value).numel()}


@LAYOUTS
def test_an_infinite_step_under_a_scaler_is_skipped_on_all_ranks_and_residuals_stay(parallel, num_ranks):
    for found in run_ranks(_scaled, num_ranks, parallel):
        # The scale doubles after two good steps, halves with Inf, and then it takes two good ones again.
        assert found["scales"] == [[2.0**10] * 3, [2.0**11] * 3, [2.0**10] * 3, [2.0**10] * 3, [2.0**11] * 3]
        assert found["skipped"] and found["moved"] and found["residuals kept"] and found["residuals move"], found
        assert found["errors"][0] < 1e-5 and found["errors"][1] < 1e-3, found


def _interrupted(rank: int, parallel: str) -> list[float]:
    """A backward pass that raises half-way on all ranks, then `reset_iter_state` and steps as if nothing had been.

    Against torch's gradients after the same: the distance for Dense, and what is lost with 8 bits.
    """
    runs = []
    for method in (None, Dense(), EIGHT):
        net = f.Net()
        model, state = f.wrap(parallel, method, model=net)
        seen = f.train(model, rank, 0)
        failing = net.blocks[0].register_forward_hook(_fail_in_backward)
        with pytest.raises(ZeroDivisionError):
            f.backward(model, rank, 7)
        net.reset_iter_state()
        failing.remove()
        runs.append(seen + f.train(model, rank, 1, 2))
        assert state is None or state.step == 3
    assert state is not None
    true, dense, eight = runs
    return [max(map(f.difference, dense, true)), f.conservation_error(eight, state, true)]


class _Chain(nn.Sequential):
    """A root without parameters of its own."""


def _abandoned_shards(rank: int) -> float:
    """A micro-batch kept in the shards, a pass that raises, `reset_iter_state`: torch's gradients after it."""
    runs = []
    for method in (None, Dense()):
        net, mesh = _Chain(*f.Net().blocks), f.mesh_of("hsdp")
        for block in net:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
        if method is not None:
            f.hook(net, method)
        net.set_requires_all_reduce(False)
        f.backward(net, rank, 0)
        failing = net[0].register_forward_hook(_fail_in_backward)
        with pytest.raises(ZeroDivisionError):
            f.backward(net, rank, 7)
        failing.remove()
        net.reset_iter_state()
        net.zero_grad()
        net.set_requires_all_reduce(True)
        f.backward(net, rank, 1)
        runs.append(f.gradients(net))
    return f.difference(runs[1], runs[0])


def test_a_root_without_parameters_forgets_too():
    assert all(error < 1e-6 for error in run_ranks(_abandoned_shards, 4))


def _fail_in_backward(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    output.register_hook(_raise)


def _raise(gradient: torch.Tensor) -> None:
    raise ZeroDivisionError


@LAYOUTS
def test_a_backward_pass_that_raised_is_forgotten(parallel, num_ranks):
    for error, lost in run_ranks(_interrupted, num_ranks, parallel):
        assert error < 1e-6 and lost < 2e-5, (error, lost)


def _alone(rank: int, parallel: str) -> list[float]:
    """One rank, or one shard a replica: the hook runs and strict training goes on. For Dense and 8 bits."""
    seen = []
    for method in (None, Dense(), EIGHT):
        one, _ = f.wrap(parallel, method)
        optimizer = torch.optim.SGD(one.parameters(), lr=1e-3)
        for step in range(4):
            optimizer.zero_grad()
            f.backward(one, rank, step)
            optimizer.step()
        seen.append({name: _whole(value) for name, value in one.named_parameters()})
    return [f.difference(other, seen[0]) for other in seen[1:]]


@pytest.mark.parametrize(("parallel", "num_ranks"), [("fsdp2", 1), ("hsdp", 2)])
def test_one_rank_or_one_shard_works(parallel, num_ranks):
    for dense, eight in run_ranks(_alone, num_ranks, parallel):
        assert dense < 1e-5 and eight < 0.02
