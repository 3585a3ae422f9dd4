"""The same numbers on a GPU as on the CPU, and no host synchronisation in the hook. Skipped without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from commcomp import LowRank, Quantized, Sparse
from commcomp.config import Method
from tests import ddp_training as t
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

METHODS = [
    LowRank(rank=2),
    LowRank(rank=2, rounds=1),
    LowRank(rank=2, factor_dtype="int8", dense_dtype="bf16"),
    Quantized(bits=8),
    Quantized(bits=4, rotate=True),
    Sparse(density=0.2, layers="all"),
    Sparse(density=0.05, layers="all", value_dtype="int8"),
]


def _train(
    rank: int, device: str, method: Method, bad_step: int | None, residual_dtype: str = "fp32"
) -> tuple[list[dict[str, Tensor]], Any]:
    module = t.Net().to(device)
    model, state = t.wrap(module, method, bucket_cap_mb=t.MANY, residual_dtype=residual_dtype)
    history = []
    for step in range(6):
        x = t.inputs(rank, step).to(device)
        if step == bad_step:
            x[0, 0] = float("nan")
        model.zero_grad()
        t.backward(model, x)
        history.append({name: value.cpu() for name, value in t.gradients(model).items()})
    return history, {key: value.cpu() for key, value in state.state_dict().items()}


@pytest.mark.parametrize("num_ranks", [1, 2])  # two ranks share the GPU over gloo: NCCL allows one rank a GPU
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_gradients_and_residuals_are_those_of_the_cpu(method: Method, num_ranks: int) -> None:
    on_cpu = run_ranks(_train, num_ranks, "cpu", method, None)
    on_gpu = run_ranks(_train, num_ranks, "cuda", method, None)
    for (cpu_steps, _), (gpu_steps, _) in zip(on_cpu, on_gpu, strict=True):
        for cpu, gpu in zip(cpu_steps, gpu_steps, strict=True):
            for name, value in cpu.items():
                assert (gpu[name] - value).norm() <= 0.02 * value.norm() + 1e-6, name


@pytest.mark.parametrize("residual_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_bad_step_changes_no_residual_on_a_gpu(method: Method, residual_dtype: str) -> None:
    ((history, state),) = run_ranks(_train, 1, "cuda", method, 3, residual_dtype)
    assert any(not value.isfinite().all() for value in history[3].values())
    assert all(value.isfinite().all() for value in history[4].values())
    assert all(value.isfinite().all() for value in state.values())


def _without_synchronisation(rank: int, method: Method) -> int:
    model, state = t.wrap(t.Net().cuda(), method)
    for step in range(3):  # allocations, bucket rebuilding and cached constants may synchronise
        t.backward(model, t.inputs(rank, step).cuda())
    x = t.inputs(rank, 3).cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    t.backward(model, x)
    torch.cuda.set_sync_debug_mode("default")
    return state.step


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_hook_never_waits_for_the_device(method: Method) -> None:
    assert run_ranks(_without_synchronisation, 1, method) == [4]
