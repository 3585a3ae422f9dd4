"""Ranks that disagree find out together: one error, the same on all, that names what differs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from commcomp import Dense, GradientSync, LowRank
from commcomp.exchange.agreement import require_agreement
from tests.ranks import run_ranks

SAME = {"version": "1", "settings": {"policy": [{"rank": 4, "params": "*"}], "seed": 0}, "sizes": [[1, 2], [3]]}


def agree(rank: int, facts_by_rank: list[dict]) -> str:
    """The error's text, or "" where the ranks agree."""
    try:
        require_agreement(facts_by_rank[rank], dist.group.WORLD, torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return ""


def changed(path: list, value) -> dict:
    """SAME with one entry replaced."""
    import copy

    facts = copy.deepcopy(SAME)
    target = facts
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return facts


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_equal_facts_pass(num_ranks):
    assert run_ranks(agree, num_ranks, [SAME] * num_ranks) == [""] * num_ranks


def test_the_order_in_which_settings_were_written_does_not_matter():
    reordered = dict(reversed(SAME.items()))
    assert run_ranks(agree, 2, [SAME, reordered]) == ["", ""]


@pytest.mark.parametrize(
    ("facts", "odd_rank", "parts"),
    [
        ([SAME, changed(["version"], "2")], 1, ["version", "1", "2"]),
        ([changed(["settings", "seed"], 7), SAME], 1, ["settings", "seed", "7", "0"]),
        ([SAME, SAME, changed(["settings", "policy", 0, "rank"], 8)], 2, ["settings", "rank", "4", "8"]),
        ([SAME, changed(["sizes", 0, 1], 5), SAME], 1, ["sizes", "2", "5"]),
        ([SAME, changed(["sizes"], [[1, 2]])], 1, ["sizes", "[3]", "None"]),
        ([SAME, changed(["settings", "extra"], "x" * 3000)], 1, ["settings", "extra", "xxx"]),
        ([SAME, {**SAME, "more": 1}], 1, []),
        ([{**SAME, "more": 1}, SAME], 1, ["more", "1", "None"]),
    ],
)
def test_different_facts_raise_one_error_on_every_rank(facts, odd_rank, parts):
    texts = run_ranks(agree, len(facts), facts)
    assert texts[0] and texts == [texts[0]] * len(facts)
    if parts:
        assert "rank 0" in texts[0] and f"rank {odd_rank}" in texts[0]
    for part in parts:
        assert part in texts[0]


def test_the_group_is_fit_for_use_after_a_disagreement():
    assert run_ranks(disagree_then_agree, 2) == ["", ""]


def disagree_then_agree(rank: int) -> str:
    assert agree(rank, [SAME, changed(["version"], "2")])
    return agree(rank, [SAME, SAME])


class TwoLayers(nn.Module):
    """Two layers of one shape, registered in either order; and a third of a given width."""

    def __init__(self, names: tuple[str, ...], width: int) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(32, 32))
        self.add_module("last", nn.Linear(32, width))


def construct(rank: int, variants: list[tuple[tuple[str, ...], int, object, dict]]) -> str:
    names, width, method, settings = variants[rank]
    try:
        GradientSync(TwoLayers(names, width), method, **settings)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("odd", "parts"),
    [
        ((("a", "b"), 32, LowRank(rank=4), {}), None),
        ((("a", "b"), 32, LowRank(rank=2), {}), ["settings", "rank", "2", "4"]),
        ((("a", "b"), 32, LowRank(rank=4, factor_dtype="int8"), {}), ["settings", "factor_dtype", "int8", "fp32"]),
        ((("a", "b"), 32, Dense(), {}), ["settings", "policy"]),
        ((("a", "b"), 32, LowRank(rank=4), {"start_step": 3}), ["settings", "start_step", "3", "0"]),
        ((("a", "b"), 32, LowRank(rank=4), {"residual_dtype": "bf16"}), ["settings", "residual_dtype", "bf16"]),
        ((("a", "b"), 32, LowRank(rank=4), {"seed": 1}), ["settings", "seed"]),
        ((("a", "b"), 33, LowRank(rank=4), {}), ["parameters", "last.", "32", "33"]),
        ((("a",), 32, LowRank(rank=4), {}), ["parameters", "b."]),
        ((("a", "c"), 32, LowRank(rank=4), {}), ["parameters"]),
        ((("b", "a"), 32, LowRank(rank=4), {}), ["parameters"]),
    ],
)
def test_gradient_sync_checks_settings_and_parameters_on_every_rank(odd, parts):
    texts = run_ranks(construct, 2, [(("a", "b"), 32, LowRank(rank=4), {}), odd])
    assert texts[0] == texts[1]
    if parts is None:
        assert texts[0] == ""
        return
    assert texts[0], "ranks disagree, and nobody noticed"
    for part in parts:
        assert part in texts[0]
