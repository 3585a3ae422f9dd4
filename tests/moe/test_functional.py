"""torch's all-to-all and ours in its place: the same rows, the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh

from commcomp.moe import Quantized, RowAllToAll
from tests.ranks import run_ranks

SPLITS = [[2, 0, 3], [1, 4, 0], [0, 0, 5]]
"""Rows from rank i to rank j."""


def _both(rank: int, dtype: str, shape: tuple[int, ...], even: bool, kind: str) -> Any:
    sent, received = SPLITS[rank], [of_rank[rank] for of_rank in SPLITS]
    rows = 6 if even else sum(sent)
    values = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(rank))
    groups = {"group": dist.group.WORLD, "name": dist.group.WORLD.group_name}
    group = init_device_mesh("cpu", (3,)) if kind == "mesh" else groups[kind]
    ours = RowAllToAll(Quantized(dtype=dtype, block=8))
    results = []
    for function in (all_to_all_single_autograd, ours):
        given = values.clone().requires_grad_()
        made = function(given, None if even else received, None if even else sent, group)
        (made * torch.arange(made.numel()).view_as(made)).sum().backward()
        results.append((made.detach() + 0, given.grad))
    return results, ours.traffic.wire_bytes, ours.traffic.dense_bytes


@pytest.mark.parametrize("kind", ["group", "name", "mesh"])
@pytest.mark.parametrize("even", [False, True])
def test_fp32_is_torchs_to_the_bit(kind, even):
    for (theirs, ours), wire, dense in run_ranks(_both, 3, "fp32", (8,), even, kind):
        assert all(torch.equal(one, other) for one, other in zip(theirs, ours, strict=True))
        assert wire == dense


@pytest.mark.parametrize(("dtype", "error"), [("bf16", 0.01), ("fp8", 0.1), ("int8", 0.02), ("int4", 0.2)])
@pytest.mark.parametrize("shape", [(16,), (4, 8), ()], ids=str)
def test_fewer_bits_come_near(dtype, error, shape):
    for (theirs, ours), wire, dense in run_ranks(_both, 3, dtype, shape, False, "group"):
        for one, other in zip(theirs, ours, strict=True):
            assert other.shape == one.shape
            assert (one - other).norm() <= error * one.norm() + 1e-6
        assert shape == () or wire <= 0.6 * dense


def _refused(rank: int) -> None:
    ours = RowAllToAll(Quantized())
    with pytest.raises(ValueError, match="5 rows cannot be split evenly over 2 ranks"):
        ours(torch.zeros(5, 2), None, None, dist.group.WORLD)
    with pytest.raises(ValueError, match="expected both or neither"):
        ours(torch.zeros(4, 2), [2, 2], None, dist.group.WORLD)
    with pytest.raises(ValueError, match="expected 2 each, the first adding to the number of rows"):
        ours(torch.zeros(4, 2), [2, 2], [2, 3], dist.group.WORLD)
    with pytest.raises(TypeError, match=r"rows of torch\.int64; expected floating point"):
        ours(torch.zeros(4, 2, dtype=torch.int64), [2, 2], [2, 2], dist.group.WORLD)
    ours.enabled = False
    rows = torch.randn(4, 2)
    assert torch.equal(ours(rows, [2, 2], [2, 2], dist.group.WORLD)[2 * rank :][:2], rows[2 * rank :][:2])


def test_what_does_not_fit_is_refused():
    run_ranks(_refused, 2)
    with pytest.raises(TypeError, match=r"expected commcomp\.moe\.Quantized"):
        RowAllToAll("int8")
