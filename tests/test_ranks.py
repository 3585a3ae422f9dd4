"""Which process groups a GradientSync uses, and that all ranks learn of what one of them cannot do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate

from commcomp import Dense, GradientSync, LowRank
from commcomp.complaint import warn
from tests import ddp_training as t
from tests import fsdp_training as f
from tests.ranks import run_ranks

METHOD = LowRank(rank=2, min_ratio=0)


def _num_groups() -> int:
    return len(dist.distributed_c10d._world.pg_names)


def _other_groups(rank: int) -> dict[str, str]:
    pair, all_ranks = dist.new_group([0, 1]), dist.new_group()
    sharded = f.shard(f.Net(), "hsdp")
    before = _num_groups()
    texts = {
        "fewer ranks": f.said(lambda: GradientSync(t.Net(), METHOD, exchange_group=pair)),
        "all shards": f.said(lambda: GradientSync(sharded, METHOD, exchange_group=all_ranks)),
        "given twice": f.said(lambda: GradientSync(sharded, METHOD, process_group=all_ranks)),
        "the same": f.said(lambda: GradientSync(t.Net(), METHOD, exchange_group=all_ranks).close()),
    }
    return {**texts, "groups left": str(_num_groups() - before)}


def test_an_exchange_group_of_other_ranks_is_refused_and_leaves_no_group() -> None:
    for rank, texts in enumerate(run_ranks(_other_groups, 4)):
        assert "exchange_group" in texts["fewer ranks"] and "[0, 1, 2, 3]" in texts["fewer ranks"], texts
        assert "exchange_group" in texts["all shards"], texts
        assert str([rank % 2, rank % 2 + 2]) in texts["all shards"] or "disagree" in texts["all shards"], texts
        assert "leave it out" in texts["given twice"], texts
        assert texts["the same"] == "accepted"
        assert texts["groups left"] == "0"


def _one_cannot(rank: int, odd_rank: int) -> str:
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float64 if rank == odd_rank else None)
    return f.said(lambda: GradientSync(f.shard(f.Net(), "hsdp", mp_policy=policy), METHOD))


@pytest.mark.parametrize("odd_rank", [0, 3])
def test_a_model_that_one_rank_of_replicas_and_shards_cannot_use_is_refused_by_all(odd_rank: int) -> None:
    for text in run_ranks(_one_cannot, 4, odd_rank, timeout=60):
        assert "float64" in text, text


def _one_more_group(rank: int) -> str:
    sharded = f.shard(f.Net(), "hsdp")
    if rank == 3:
        dist.new_group([3], use_local_synchronization=True)
    return f.said(lambda: GradientSync(sharded, METHOD))


def test_replicas_that_are_members_of_unequally_many_groups_find_out_together() -> None:
    for text in run_ranks(_one_more_group, 4, timeout=60):
        assert "before the device mesh" in text, text


def _means(rank: int, what: str) -> str:
    model, state = t.wrap(t.Net(), METHOD)
    t.train(model, rank, 1)
    if what == "another step" and rank == 1:
        state.step = 7
    if what == "failure" and rank == 1:
        state._runner.failure = RuntimeError("connection closed")
    if what == "closed":
        state.close()
    return f.said(lambda: state.state_dict(mean_residual=True), ValueError, RuntimeError)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("another step", ["step", "rank 1 has 7", "after the same step"]),
        ("failure", ["connection closed", "rank 1", "checkpoint before"]),
        ("closed", ["closed"]),
    ],
)
def test_ranks_that_cannot_save_a_mean_find_out_together(what: str, words: list[str]) -> None:
    left, right = run_ranks(_means, 2, what, timeout=60)
    assert left == right and all(word in left for word in words), (left, right)


def _other_pieces(rank: int, folder: str) -> str:
    model, state = f.wrap("hsdp", METHOD)
    assert state is not None
    f.train(model, rank, 0)
    saved = state.state_dict()
    key = next(key for key, value in saved.items() if f"rank_{state.rank}/residual/head.weight" in key)
    whole = DTensor.from_local(saved[key].full_tensor(), saved[key].device_mesh, [Replicate()] * 2, run_check=False)
    saved[key] = whole
    return f.said(lambda: state.load_state_dict(saved))


def test_residuals_of_other_pieces_are_refused_with_the_way_out(tmp_path: Any) -> None:
    for text in run_ranks(_other_pieces, 4, str(tmp_path)):
        assert "restore(" in text and "mean_residual" in text and "head.weight" in text, text


def _sizes_said(rank: int, parallel: str, residual: str) -> list[str]:
    with pytest.warns() as seen:
        f.wrap(parallel, METHOD, residual_dtype=residual)
        warn("the end")
    return [str(one.message) for one in seen]


def test_residuals_of_the_whole_models_size_are_said_under_full_sharding() -> None:
    for said in run_ranks(_sizes_said, 2, "fsdp2", "fp32"):
        assert len(said) == 2 and "whole model" in said[0] and "int8" in said[0], said
    for parallel, residual in (("fsdp2", "int8"), ("ddp", "fp32")):
        for said in run_ranks(_sizes_said, 2, parallel, residual):
            assert said == ["the end"]


def _unfrozen(rank: int) -> int:
    net = f.Net()
    net.blocks[1].requires_grad_(False)
    model, _ = f.wrap("fsdp2", Dense(), model=net, strict=False)
    with pytest.warns() as seen:
        for block in model.blocks:
            block.requires_grad_(True)
        f.train(model, rank, 0, 1)
        warn("the end")
    return sum("is trained now" in str(one.message) for one in seen)


def test_a_group_that_is_trained_after_all_is_said_once() -> None:
    assert run_ranks(_unfrozen, 2) == [1, 1]
