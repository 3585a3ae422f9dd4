"""Tokens of DeepSpeed's MoE layers, compressed, in DeepSpeed's engines."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.deepspeed.moe_cases import STAGES, all_cases, in_pairs
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(all_cases, 2)


@pytest.mark.parametrize(("stage", "k"), STAGES)
def test_whole_rows_train_as_plain_deepspeed(ranks, stage, k):
    for of_rank in ranks:
        (losses, weights), (ours, our_weights) = of_rank["equal"][stage, k]
        assert ours == pytest.approx(losses, rel=1e-6)
        for one, other in zip(weights, our_weights, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_fewer_bits_and_clusters_train_nearly_as_well(ranks):
    (plain, *_), (int8, _, quantized), (half, _, clusters) = ranks[0]["compressed"]
    end = sum(plain[-8:]) / 8
    assert end < 0.7 * plain[0]
    assert int8[:3] == pytest.approx(plain[:3], rel=1e-3)
    assert sum(int8[-8:]) / 8 == pytest.approx(end, rel=0.01)
    assert sum(half[-8:]) / 8 == pytest.approx(end, rel=0.05)
    assert quantized["ratio"] > 3
    assert clusters["ratio"] > 1.5 * quantized["ratio"]
    (layer,) = clusters["layers"].values()
    assert layer["rate"] == pytest.approx(0.5, abs=0.1)


def test_gradients_travel_in_fewer_bits_too(ranks):
    for of_rank in ranks:
        plain, int8, int4_back = of_rank["first step"]
        assert 0 < (int8 - plain).norm() < 0.02 * plain.norm()
        assert 0.005 * plain.norm() < (int4_back - plain).norm() < 0.2 * plain.norm()


def test_experts_that_get_no_tokens(ranks):
    dropping, plain, whole_dropping, whole, half_dropping, half = ranks[0]["idle"]
    assert whole_dropping == pytest.approx(dropping, rel=1e-6)
    assert whole == pytest.approx(plain, rel=1e-6)
    assert half_dropping == pytest.approx(dropping, rel=1e-2)
    assert half == pytest.approx(plain, rel=1e-2)


def test_bf16_engines(ranks):
    plain, whole, int8 = ranks[0]["bf16"]
    assert whole[0] == pytest.approx(plain[0], rel=1e-3)
    assert int8[0] == pytest.approx(plain[0], rel=1e-2)
    assert 1 < whole[2]["ratio"] < int8[2]["ratio"]


def test_activation_checkpointing_changes_nothing(ranks):
    once, twice = ranks[0]["recomputed"]
    assert once == twice


def test_bytes_are_those_of_the_gates_choices(ranks):
    for of_rank in ranks:
        stats, wire, plain = of_rank["counted"]
        assert stats["wire_bytes"] == wire
        assert stats["plain_bytes"] == plain
        assert stats["ratio"] == plain / wire


def test_evaluation_is_deepspeeds_own_to_the_bit(ranks):
    for of_rank in ranks:
        (plain, ours, compressed), (before, evaluated, after) = of_rank["evaluated"]
        assert torch.equal(ours, plain)
        assert not torch.equal(compressed, plain)
        assert evaluated == before
        assert after["wire_bytes"] > before["wire_bytes"]


def test_an_engine_beside_is_left_alone(ranks):
    (compressed, plain), (ours, theirs), layers = ranks[0]["two engines"]
    assert theirs == plain
    assert ours == compressed != plain
    assert list(layers) == ["module.blocks.0.deepspeed_moe", "module.blocks.1.deepspeed_moe"]
    assert all(one["ratio"] > 3 for one in layers.values())


def test_attaching_again_changes_nothing_or_is_refused(ranks):
    same, losses, expected = ranks[0]["repeated"]
    assert same
    assert losses == expected


@pytest.mark.parametrize("stage", [0, 1])
def test_a_resumed_run_goes_on_as_if_uninterrupted(ranks, stage):
    for of_rank in ranks:
        expected, found, (before, after) = of_rank[f"resumed {stage}"]
        assert found == pytest.approx(expected, rel=1e-6)
        assert before == after


def test_a_run_without_compression_can_be_gone_on_from(ranks):
    ours, plain, warned = ranks[0]["from plain"]
    assert ours == pytest.approx(plain, rel=0.05)
    assert [one for one in warned if "blocks.0.deepspeed_moe.token_compressor._extra_state" in one]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_token_sees_a_later_one(ranks, k):
    for of_rank in ranks:
        equal, joined = of_rank[f"later {k}"]
        assert joined
        assert all(equal)


def test_what_is_refused_is_named(ranks):
    assert ranks[0]["refusals"] is None
    assert ranks[0]["lacking"] == [None, "deepspeed.moe.sharded_moe._AllToAll"]


def test_what_the_page_shows_runs(ranks):
    assert ranks[0]["page"] > 3


def test_expert_parallel_groups_that_are_parts_of_the_world():
    (plain, _), (whole, sent), (half, of_half) = run_ranks(in_pairs, 4)[3]
    assert whole == pytest.approx(plain, rel=1e-6)
    assert half == pytest.approx(plain, rel=0.05)
    assert 1 < sent["ratio"] < 0.5 * of_half["ratio"]
