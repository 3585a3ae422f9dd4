"""Residuals move between DDP, FSDP1, FSDP2 and HSDP through a checkpoint: what the optimizer is owed stays the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor

from commcomp import LowRank, Quantized, Sparse
from commcomp.checkpoint import DeltaStorageReader, DeltaStorageWriter
from tests import fsdp_training as f
from tests.ranks import run_ranks

METHODS: dict[str, Any] = {
    "low rank": LowRank(rank=2, min_ratio=0),
    "alternating": LowRank(rank=2, min_ratio=0, rounds=1),
    "8 bits": Quantized(block=16),
    "4 bits, rotated": Quantized(bits=4, block=16, rotate=True),
    "8 bits, at random": Quantized(block=16, rounding="stochastic"),
    "sparse": Sparse(density=0.1),
}


def owed(state: Any) -> dict[str, torch.Tensor]:
    """The mean over (compressing) ranks of the residuals, by parameter."""
    means = {}
    for key, value in state.state_dict().items():
        if f"rank_{state.rank}/residual/" in key:
            own = value.full_tensor() if isinstance(value, DTensor) else value
            mean = own.float().clone().contiguous() / state.num_ranks
            dist.all_reduce(mean, group=state.sharded.process_group if state.sharded else None)
            means[key.split("/residual/")[1]] = mean
    return means


def _save(rank: int, parallel: str, folder: str, mean: bool) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for what, method in METHODS.items():
        model, state = f.wrap(parallel, method)
        assert state is not None
        f.train(model, rank, 0, 1, 2)
        saved = state.state_dict(mean_residual=mean)
        assert {key.split("/")[0] for key in saved if "/residual/" in key} == {f"rank_{0 if mean else state.rank}"}
        assert int(saved["num_ranks"]) == (1 if mean else state.num_ranks)
        dcp.save({"gradient_sync": saved}, checkpoint_id=f"{folder}/{what}")
        found[what] = owed(state)
    return found


def _load(rank: int, parallel: str, folder: str) -> dict[str, tuple[dict[str, torch.Tensor], int, bool]]:
    found = {}
    for what, method in METHODS.items():
        model, state = f.wrap(parallel, method)
        assert state is not None
        state.restore(f"{folder}/{what}")
        means = owed(state)
        model.zero_grad()
        f.backward(model, rank, 3)
        finite = all(value.isfinite().all() for value in f.gradients(model).values())
        found[what] = (means, state.step, finite)
    return found


@pytest.mark.parametrize(
    ("before", "after", "mean"),
    [
        (("ddp", 2), ("fsdp2", 2), False),
        (("fsdp2", 2), ("ddp", 3), False),
        (("fsdp2", 3), ("fsdp2", 2), False),
        (("fsdp2", 2), ("hsdp", 4), False),
        (("hsdp", 4), ("fsdp2", 2), False),
        (("hsdp", 4), ("hsdp", 2), False),
        (("ddp", 3), ("hsdp", 4), False),
        (("ddp", 3), ("fsdp1", 2), False),
        (("fsdp1", 2), ("fsdp2", 3), False),
        (("hsdp", 4), ("fsdp1", 2), False),
        (("fsdp1", 2), ("ddp", 2), False),
        (("fsdp2", 3), ("hsdp", 4), True),
        (("hsdp", 4), ("fsdp1", 2), True),
        (("ddp", 3), ("fsdp2", 2), True),
    ],
    ids=str,
)
def test_what_is_owed_survives_another_layout(before, after, mean, tmp_path: Path):
    saved = run_ranks(_save, before[1], before[0], str(tmp_path), mean)[0]
    for own in run_ranks(_load, after[1], after[0], str(tmp_path)):
        for what, (means, step, finite) in own.items():
            assert step == 4 and finite
            assert means.keys() == saved[what].keys() and len(means) >= 9
            for name, mean in means.items():
                assert mean.any()
                assert torch.allclose(mean, saved[what][name], atol=1e-5), (what, name)


def _save_coded(rank: int, parallel: str, folder: str) -> list[dict[str, torch.Tensor]]:
    """Two steps apart, the second against the first."""
    model, state = f.wrap(parallel, METHODS["low rank"])
    assert state is not None
    found = []
    for step in (1, 2):
        f.train(model, rank, step)
        writer = DeltaStorageWriter(folder, step, "standard", threads=1)
        dcp.save({"gradient_sync": state.state_dict()}, storage_writer=writer)
        found.append(owed(state))
    return found


def _load_coded(rank: int, parallel: str, folder: str) -> list[dict[str, torch.Tensor]]:
    _, state = f.wrap(parallel, METHODS["low rank"])
    assert state is not None
    found = []
    for step in (1, 2):
        state.restore(storage_reader=DeltaStorageReader(folder, step, threads=1))
        found.append(owed(state))
    return found


@pytest.mark.parametrize(("before", "after"), [(("ddp", 2), ("ddp", 2)), (("hsdp", 4), ("fsdp2", 3))], ids=str)
def test_what_is_owed_is_exact_in_a_lossy_storage(before, after, tmp_path: Path):
    saved = run_ranks(_save_coded, before[1], before[0], str(tmp_path))[0]
    for loaded in run_ranks(_load_coded, after[1], after[0], str(tmp_path)):
        for was, now in zip(saved, loaded, strict=True):
            assert was.keys() == now.keys() and len(now) >= 9
            for name, mean in now.items():
                if before == after:
                    assert torch.equal(mean, was[name]), name
                assert mean.any() and torch.allclose(mean, was[name], atol=1e-6), name


def _resume(rank: int, parallel: str, folder: str) -> dict[str, float]:
    """Straight on, against going on from a checkpoint with new objects: the largest distance of a gradient."""
    found = {}
    for what, method in METHODS.items():
        model, state = f.wrap(parallel, method)
        assert state is not None
        f.train(model, rank, 0, 1)
        dcp.save({"gradient_sync": state.state_dict()}, checkpoint_id=f"{folder}/{what}")
        again, new_state = f.wrap(parallel, method)
        assert new_state is not None
        loaded = new_state.state_dict()
        dcp.load({"gradient_sync": loaded}, checkpoint_id=f"{folder}/{what}")
        new_state.load_state_dict(loaded)
        straight, resumed = (f.train(one, rank, 2, 3) for one in (model, again))
        found[what] = max(f.difference(left, right) for left, right in zip(resumed, straight, strict=True))
    return found


@pytest.mark.parametrize(("parallel", "num_ranks"), [("fsdp2", 3), ("hsdp", 4), ("fsdp1", 3)])
def test_the_same_layout_goes_on_as_if_nothing_had_been(parallel, num_ranks, tmp_path: Path):
    for found in run_ranks(_resume, num_ranks, parallel, str(tmp_path)):
        assert all(error < 1e-6 for error in found.values()), found


def _restore_on_some(rank: int, folder: str) -> list[str]:
    """Of two replicas of two shards: the ranks of the first shard restore, the others do not."""
    _, state = f.wrap("hsdp", METHODS["8 bits"])
    model, late = f.wrap("hsdp", METHODS["8 bits"])
    assert state is not None and late is not None
    state.step = 5
    dcp.save({"gradient_sync": state.state_dict()}, checkpoint_id=folder)
    if rank % 2 == 0:
        late.restore(folder)
    started = f.said(lambda: f.backward(model, rank, 0), RuntimeError)
    model, running = f.wrap("hsdp", METHODS["8 bits"])
    assert running is not None
    f.backward(model, rank, 0)
    damaged = {} if rank % 2 == 0 else running.state_dict()
    return [started, f.said(lambda: running.load_state_dict(damaged))]


def test_shards_that_start_elsewhere_find_out(tmp_path: Path):
    for started, loaded in run_ranks(_restore_on_some, 4, str(tmp_path)):
        assert "disagree on step" in started and "restore on every rank" in started
        assert "disagree" in loaded and "version" in loaded


def _by_one_file(rank: int, path: str) -> list[tuple[float, bool]]:
    """Two replicas of two shards: of every method, how far what is owed moves through rank 0's torch.save."""
    found = []
    for method in METHODS.values():
        model, state = f.wrap("hsdp", method, residual_dtype="bf16")
        assert state is not None
        f.train(model, rank, 0, 1, 2)
        saved = state.state_dict(mean_residual=True)
        if rank == 0:
            torch.save(saved, path)
        dist.barrier()
        _, again = f.wrap("hsdp", method, residual_dtype="bf16")
        assert again is not None
        again.load_state_dict(torch.load(path, weights_only=True))
        dist.barrier()
        before, after = owed(state), owed(again)
        found.append((f.difference(after, before), all(value.any() for value in after.values())))
    return found


def test_one_ranks_file_of_the_mean_serves_shards_and_replicas(tmp_path: Path):
    for found in run_ranks(_by_one_file, 4, str(tmp_path / "state.pt")):
        for error, owes in found:
            assert owes and error < 2**-8, found
