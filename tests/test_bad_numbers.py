"""Inf and NaN on one rank pass through to all ranks and do no harm: residuals and warm starts stay to the bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from commcomp import Dense, LowRank, Quantized, Sparse
from tests.ranks import run_ranks
from tests.reference.given_gradients import Outcome, Run, perform, same_bits

SHAPES = {
    "first": (20, 16),
    "first_bias": (20,),
    "twin": (20, 16),
    "conv": (12, 4, 3, 3),
    "last": (20, 16),
    "tail": (9,),
}
MANY_BUCKETS = 0.001
NAN, INF = float("nan"), float("inf")
POLICY = (("first", LowRank(rank=2, factor_dtype="int8")), ("twin", Dense("bf16")), ("*", LowRank(rank=2, rounds=1)))
CODED = (Quantized(block=16), Quantized(bits=4, block=16, rotate=True), Sparse(density=0.1))
FLAGS = pytest.mark.parametrize("flag_as_tensor", [False, True])


def plans(num_ranks: int, *, flag_as_tensor: bool, bucket_cap_mb: float) -> list[Run]:
    """Two good steps, two bad ones, two good ones; NaN and Inf, on either end of the model, on any rank."""
    bad_places = [
        ("first", NAN, 0),
        ("tail", INF, num_ranks - 1),
        ("last", -INF, 0),
        ("first_bias", NAN, num_ranks - 1),
    ]
    runs = []
    low_rank = [LowRank(rank=2, rounds=rounds, factor_dtype=dtype) for dtype in ("fp32", "int8") for rounds in (2, 1)]
    for index, method in enumerate((*low_rank, None, *CODED)):
        for name, value, rank in bad_places[index // 2 % 2 :: 2] if method in low_rank else bad_places:
            # Two bad steps: with one round a step's number decides which factor is sent.
            spoil = {2: (rank, name, value), 3: (rank, name, value)}
            runs.append(
                Run(
                    SHAPES,
                    method,
                    policy=None if method else POLICY,
                    steps=6,
                    spoil=spoil,
                    bucket_cap_mb=bucket_cap_mb,
                    flag_as_tensor=flag_as_tensor,
                )
            )
    return runs


def kept(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if "residual" in key or "warm" in key}


def without_bad_steps(run: Run) -> Run:
    """The same gradients in the same order, as if steps 2 and 3 had never been."""
    return dataclasses.replace(run, spoil={}, left_out=(2, 3))


@pytest.mark.parametrize(
    ("num_ranks", "bucket_cap_mb", "flag_as_tensor"),
    [(2, 25, False), (2, MANY_BUCKETS, True), (3, MANY_BUCKETS, False), (3, 25, True)],
)
def test_bad_steps_reach_every_rank_and_leave_no_trace(num_ranks, bucket_cap_mb, flag_as_tensor):
    runs = plans(num_ranks, flag_as_tensor=flag_as_tensor, bucket_cap_mb=bucket_cap_mb)
    clean = {}
    for run in runs:
        clean.setdefault((run.method, run.policy), without_bad_steps(run))
    everyone = run_ranks(perform, num_ranks, runs + list(clean.values()))
    for rank, own in enumerate(everyone):
        undisturbed = dict(zip(clean, own[len(runs) :], strict=True))
        for index, run in enumerate(runs):
            what = (run.method, run.spoil, rank)
            outcome, expected = own[index], undisturbed[run.method, run.policy]
            assert_bad_gradient_arrives(outcome, everyone[0][index], run, what)
            assert_nothing_changed(outcome, what)
            assert_goes_on_as_if_nothing_had_been(outcome, expected, what)
            assert outcome.stats["skipped_steps"] == 2, what
            assert all((len(buckets) > 2) == (bucket_cap_mb < 1) for buckets in outcome.buckets[1:]), what


def assert_bad_gradient_arrives(outcome: Outcome, first: Outcome, run: Run, what: tuple) -> None:
    for step, (_, name, _) in run.spoil.items():
        assert not outcome.decoded[step][name].isfinite().all(), what
        for other, value in outcome.decoded[step].items():
            # Values that share a scale or a row share their fate, also those of a neighbouring parameter.
            assert other == name or run.method in CODED or value.isfinite().all(), (*what, other)
            finite = value.isfinite()
            assert torch.equal(finite, first.decoded[step][other].isfinite()), (*what, other)
            assert same_bits(value[finite], first.decoded[step][other][finite]), (*what, other)


def assert_nothing_changed(outcome: Outcome, what: tuple) -> None:
    before = kept(outcome.states[2])
    assert any(value.any() for key, value in before.items() if "residual" in key), what
    for state in outcome.states[3:5]:
        assert all(same_bits(kept(state)[key], value) for key, value in before.items()), what


def assert_goes_on_as_if_nothing_had_been(outcome: Outcome, expected: Outcome, what: tuple) -> None:
    for step, other in ((4, 2), (5, 3)):
        for name, value in expected.decoded[other].items():
            assert same_bits(outcome.decoded[step][name], value), (*what, step, name)
        for key, value in kept(expected.states[other + 1]).items():
            assert same_bits(outcome.states[step + 1][key], value), (*what, step, key)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("bad_name", ["first", "tail"])
def test_plain_ddp_and_dense_hooks_agree_on_what_a_bad_gradient_looks_like(value, bad_name):
    spoil = {1: (1, bad_name, value)}
    runs = [Run(SHAPES, method, steps=3, spoil=spoil) for method in (None, Dense(), Dense("fp16"), Dense("bf16"))]
    for plain, *hooks in run_ranks(perform, 2, runs):
        for outcome in hooks:
            for step in range(3):
                for name, expected in plain.decoded[step].items():
                    found = outcome.decoded[step][name]
                    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())


@FLAGS
def test_a_bad_first_step_leaves_zero_residuals_and_first_factors(flag_as_tensor):
    spoil = {0: (0, "last", NAN), 1: (1, "first", INF)}
    runs = [
        Run(SHAPES, LowRank(rank=2, rounds=rounds), steps=4, spoil=spoil, flag_as_tensor=flag_as_tensor)
        for rounds in (1, 2)
    ]
    for own in run_ranks(perform, 2, runs):
        for outcome in own:
            for state in outcome.states[1:3]:
                for key, value in kept(state).items():
                    assert same_bits(value, outcome.states[0][key]), key
            assert all(value.isfinite().all() for value in outcome.decoded[2].values())
            assert all(value.isfinite().all() for value in outcome.states[-1].values())


def test_inf_of_opposite_signs_on_two_ranks_is_bad_too():
    """Inf - Inf is NaN: neither rank sees it in its own gradient."""
    for outcome in run_ranks(opposite_infinities, 2):
        assert not outcome.decoded[1]["last"].isfinite().all()
        for key, value in kept(outcome.states[1]).items():
            assert same_bits(value, outcome.states[2][key])


def opposite_infinities(rank: int) -> Outcome:
    sign = 1.0 if rank == 0 else -1.0
    run = Run(SHAPES, LowRank(rank=2), steps=3, spoil={1: (rank, "last", sign * INF)})
    return perform(rank, [run])[0]
