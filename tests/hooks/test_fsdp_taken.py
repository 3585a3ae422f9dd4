"""One hook a model: a second one, and users' own in its place, are refused by name on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

import commcomp
from commcomp import Dense, GradientSync, Quantized
from tests import fsdp_training as f
from tests.ranks import run_ranks

EIGHT = Quantized(block=16)
LAYOUTS = pytest.mark.parametrize(("parallel", "num_ranks"), [("fsdp2", 2), ("hsdp", 4)])


def _twice(rank: int, parallel: str) -> tuple[dict[str, str], float]:
    """What is said to a second hook; the distance from torch's gradients after it."""
    model, texts = f.shard(f.Net(), parallel), {}
    state, other = GradientSync(model, EIGHT), GradientSync(model, Dense())
    commcomp.fsdp.register_comm_hook(model, state)
    texts["same state"] = f.said(lambda: commcomp.fsdp.register_comm_hook(model, state))
    texts["other state"] = f.said(lambda: commcomp.fsdp.register_comm_hook(model, other))
    texts["new state"] = f.said(lambda: GradientSync(model, EIGHT))
    texts["new state of a block"] = f.said(lambda: GradientSync(model.blocks[1], EIGHT))
    seen = f.train(model, rank, 0)[0]
    texts["new state after a step"] = f.said(lambda: GradientSync(torch.compile(model), EIGHT))
    state.close()
    texts["after closing"] = f.said(lambda: GradientSync(model, EIGHT))
    return texts, f.difference(seen, f.true_mean(dist.get_world_size(), 0))


@LAYOUTS
def test_a_model_takes_one_hook(parallel, num_ranks):
    for texts, error in run_ranks(_twice, num_ranks, parallel):
        for what, text in texts.items():
            assert "has the communication hook of a GradientSync already" in text and "fully_shard anew" in text, texts
            assert ("'the root module'" in text) or "block" in what, texts
        assert error < 0.02


class _OwnReduceScatter(DefaultReduceScatter):
    """A user's."""


def _in_its_place(rank: int, parallel: str) -> dict[str, str]:
    texts = {}

    def attempt(what: str, prepare: Callable[[Any], Any], **options: Any) -> None:
        model = f.shard(f.Net(), parallel, **options)
        prepare(model)
        texts[what] = f.said(lambda: f.hook(model, EIGHT))
        if texts[what] != "accepted":  # nothing was registered half-way
            assert not any(hasattr(group, "_commcomp_hook") for group in _param_groups(model))

    attempt("all-reduce hook", lambda model: model.blocks[1].set_all_reduce_hook(lambda reduced: None))
    attempt("reduce-scatter", lambda model: model.blocks[1].set_custom_reduce_scatter(_OwnReduceScatter()))
    attempt("gradient hook", lambda model: model.head.weight.register_post_accumulate_grad_hook(lambda value: None))
    attempt("fp64", lambda model: None, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float64))
    return texts


def _param_groups(model: nn.Module) -> list[Any]:
    modules = [module for module in model.modules() if hasattr(module, "_get_fsdp_state")]
    return [group for module in modules for group in module._get_fsdp_state()._fsdp_param_groups]


@LAYOUTS
def test_what_is_in_the_hooks_place_is_refused(parallel, num_ranks):
    for texts in run_ranks(_in_its_place, num_ranks, parallel):
        assert "'blocks.1'" in texts["all-reduce hook"] and "set_all_reduce_hook" in texts["all-reduce hook"]
        if parallel == "hsdp":  # torch's own reduce-scatter within the shards stays
            assert texts["reduce-scatter"] == "accepted"
        else:
            assert "'blocks.1'" in texts["reduce-scatter"] and "_OwnReduceScatter" in texts["reduce-scatter"]
        assert "'head.weight'" in texts["gradient hook"] and "zeros" in texts["gradient hook"]
        assert "float64" in texts["fp64"] and "reduce_dtype" in texts["fp64"]
