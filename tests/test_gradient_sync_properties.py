"""The hook in real DDP processes: parity with the paper, conservation, equal bits, and lossless settings."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from commcomp import Dense, LowRank, Quantized, Sparse
from commcomp.config import FACTOR_DTYPES, Method
from tests.ranks import run_ranks
from tests.reference.given_gradients import (
    Outcome,
    Run,
    gradients_of,
    mean_gradients,
    perform,
    relative_difference,
    same_bits,
)
from tests.reference.powersgd import ReferencePowerSGD

SHAPES = {
    "a": (24, 18),
    "a_bias": (24,),
    "b": (24, 18),
    "b_bias": (24,),
    "conv": (12, 4, 3, 3),
    "c": (24, 18),
    "wide": (2, 40),
    "one": (1, 30),
    "scale": (),
    "d": (18, 24),
}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) > 1]
MANY_BUCKETS = 0.002
KEPT_DTYPES = ("fp32", "bf16", "int8")
KEPT_ERROR = {"bf16": 2.0**-8, "int8": 2.0**-5}
"""Share of a residual that is lost each time it is kept; of fp32 nothing to speak of."""
CODED = (
    Quantized(block=16),
    Quantized(bits=4, block=32, rotate=True),
    Quantized(bits=4, block=16, rounding="stochastic"),
    Sparse(density=0.1, value_dtype="fp32"),
    Sparse(density=0.3),
    Sparse(density=0.02, value_dtype="int8"),
)
METHODS = [LowRank(rank=3, rounds=rounds, min_ratio=0) for rounds in (1, 2)]
SEVERAL_RANKS = pytest.mark.parametrize("num_ranks", [2, 3])


@functools.cache
def fp32_runs(num_ranks: int) -> list[list[Outcome]]:
    return run_ranks(perform, num_ranks, list(fp32_plans()))


def fp32_plans() -> tuple[Run, ...]:
    """Both numbers of rounds, in one bucket and in many; by native passes, also on threads, and by torch's."""
    loose = {"strict": False, "measure_every": 1}
    plans = tuple(
        Run(SHAPES, method, steps=7, settings=loose, bucket_cap_mb=cap)
        for method in METHODS
        for cap in (25, MANY_BUCKETS)
    )
    return (*plans, *(replace(plan, native=False) for plan in plans), *(replace(plan, threads=3) for plan in plans))


def matrix_of(value: torch.Tensor) -> torch.Tensor:
    return value.flatten(1)


def reference_run(run: Run, num_ranks: int, start: dict[str, torch.Tensor]) -> tuple[list, ReferencePowerSGD]:
    reference = ReferencePowerSGD(
        num_ranks,
        [start[f"warm_right/{name}"].T for name in MATRICES],
        [start[f"warm_left/{name}"].T for name in MATRICES] if run.method.rounds == 1 else (),
        rounds=run.method.rounds,
    )
    decoded = []
    for step in range(run.steps):
        everyone = [gradients_of(run, rank, step) for rank in range(num_ranks)]
        decoded.append(reference.step([[matrix_of(own[name]) for name in MATRICES] for own in everyone]))
    return decoded, reference


@SEVERAL_RANKS
@pytest.mark.parametrize("index", range(4))
def test_steps_equal_the_papers_algorithm(num_ranks, index):
    run = fp32_plans()[index]
    outcomes = [own[index] for own in fp32_runs(num_ranks)]
    expected, reference = reference_run(run, num_ranks, outcomes[0].states[0])
    for outcome in outcomes:
        for step in range(run.steps):
            for name, value in zip(MATRICES, expected[step], strict=True):
                assert relative_difference(matrix_of(outcome.decoded[step][name]), value) < 1e-4, (step, name)
            for name, mean in mean_gradients(run, num_ranks, step).items():
                if name not in MATRICES:
                    assert torch.allclose(outcome.decoded[step][name].double(), mean, rtol=1e-5, atol=1e-6)
    for rank, outcome in enumerate(outcomes):
        for number, name in enumerate(MATRICES):
            total = sum(matrix_of(gradients_of(run, rank, step)[name]).double() for step in range(run.steps))
            owed = reference.residuals[rank][number]
            assert torch.allclose(owed, total - reference.delivered[rank][number], atol=1e-9)
            assert (matrix_of(outcome.residual(rank, name)) - owed).norm() < 1e-4 * total.norm(), (rank, name)


@SEVERAL_RANKS
@pytest.mark.parametrize("index", range(4))
def test_every_rank_gets_the_same_bits(num_ranks, index):
    first, *others = [own[index] for own in fp32_runs(num_ranks)]
    for other in others:
        for step, decoded in enumerate(first.decoded):
            assert all(same_bits(value, other.decoded[step][name]) for name, value in decoded.items())
        for name, value in first.states[-1].items():
            assert name.startswith("rank_0/") or same_bits(value, other.states[-1][name]), name


def test_the_small_bucket_size_makes_several_buckets():
    for own in fp32_runs(2):
        assert [len(buckets) for buckets in own[0].buckets] == [1] * 7
        assert all(len(buckets) >= 3 for buckets in own[1].buckets[1:])
        assert all(sum(buckets) == len(SHAPES) for outcome in own for buckets in outcome.buckets)


def conservation_plans() -> list[Run]:
    """Every combination, fewer formats of factors with rounded residuals; with a reload into other buckets half-way."""

    def methods(residual_dtype: str) -> list[Method]:
        factor_dtypes = FACTOR_DTYPES if residual_dtype == "fp32" else ("fp32", "int8")
        both = [(rounds, factor_dtype) for rounds in (1, 2) for factor_dtype in factor_dtypes]
        return [*(LowRank(rank=2, rounds=rounds, factor_dtype=factor_dtype) for rounds, factor_dtype in both), *CODED]

    return [
        Run(
            SHAPES,
            method,
            steps=6,
            settings={"residual_dtype": residual_dtype},
            bucket_cap_mb=MANY_BUCKETS,
            reload_at=3,
            native=native,
        )
        for residual_dtype in KEPT_DTYPES
        for native in (True, False)
        for method in methods(residual_dtype)
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_what_was_decoded_and_what_is_owed_are_the_gradients(num_ranks):
    """Rule 1; on one rank it is the rule for each rank, on several for their mean."""
    plans = conservation_plans()
    everyone = run_ranks(perform, num_ranks, plans)
    for index, run in enumerate(plans):
        outcomes = [own[index] for own in everyone]
        factored = [name for name in MATRICES if f"rank_0/residual/{name}" in outcomes[0].states[-1]]
        assert len(factored) >= 4
        for name in factored:
            decoded, gradients = torch.zeros(SHAPES[name]).double(), torch.zeros(SHAPES[name]).double()
            rounding = 1e-5 * len(outcomes[0].decoded)
            for step in range(run.steps):
                decoded += outcomes[0].decoded[step][name]
                gradients += mean_gradients(run, num_ranks, step)[name]
                owed = sum(outcome.residual(rank, name, step + 1).double() for rank, outcome in enumerate(outcomes))
                owed = owed.view(SHAPES[name]) / num_ranks
                if kept_error := KEPT_ERROR.get(run.settings["residual_dtype"]):
                    largest = max(
                        float(outcome.residual(rank, name, step + 1).norm()) for rank, outcome in enumerate(outcomes)
                    )
                    rounding += kept_error * largest / float(gradients.norm())
                assert (decoded + owed - gradients).norm() < rounding * max(1.0, float(gradients.norm())), (run, name)


def test_a_reload_changes_nothing():
    """Not so for values coded in rows: DDP's first buckets after a start are others, and so are blocks and rows."""
    methods = [LowRank(rank=2, rounds=rounds, factor_dtype=dtype) for rounds in (1, 2) for dtype in ("fp32", "int8")]
    plans = [
        Run(SHAPES, method, steps=6, bucket_cap_mb=cap, reload_at=reload_at, reload_bucket_cap_mb=cap)
        for cap in (25, MANY_BUCKETS)
        for method in methods
        for reload_at in (None, 3)
    ]
    for own in run_ranks(perform, 2, plans):
        for straight, reloaded in zip(own[::2], own[1::2], strict=True):
            for step in range(6):
                for name, value in straight.decoded[step].items():
                    assert relative_difference(reloaded.decoded[step][name], value) < 1e-5
            assert straight.states[-1].keys() == reloaded.states[-1].keys()


SQUARE = {"a": (20, 20), "a_bias": (20,), "b": (20, 20), "c": (16, 4, 2, 2)}
"""With one round only square matrices are sent whole at full rank: min(n, m) columns span the longer side in part."""


@SEVERAL_RANKS
def test_full_rank_equals_all_reduce(num_ranks):
    plans = [
        Run(
            shapes, LowRank(rank=64, min_ratio=0, rounds=rounds), steps=5, settings={"strict": False}, bucket_cap_mb=cap
        )
        for rounds, shapes in ((1, SQUARE), (2, SHAPES))
        for cap in (25, MANY_BUCKETS)
    ]
    for own in run_ranks(perform, num_ranks, plans):
        for run, outcome in zip(plans, own, strict=True):
            for step in range(run.steps):
                for name, mean in mean_gradients(run, num_ranks, step).items():
                    error = (outcome.decoded[step][name] - mean).norm() / mean.norm()
                    assert error < 3e-5, (run.method, step, name, float(error))


def dense_plans(**settings) -> list[Run]:
    return [
        Run(SHAPES, method, steps=3, bucket_cap_mb=cap, settings=settings if method else {})
        for cap in (25, MANY_BUCKETS)
        for method in (None, Dense(), Dense("fp16"), Dense("bf16"))
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_dense_equals_plain_ddp(num_ranks):
    """In fp32 to the bit where dividing by N is exact: DDP divides before it adds, we do after."""
    for own in run_ranks(perform, num_ranks, dense_plans()):
        for offset in (0, 4):
            plain, fp32, fp16, bf16 = own[offset : offset + 4]
            for step in range(3):
                for name, value in plain.decoded[step].items():
                    if num_ranks != 3:
                        assert same_bits(fp32.decoded[step][name], value), (step, name)
                    scale = value.abs().max() + 3
                    for outcome, unit in ((fp32, 2.0**-22), (fp16, 2.0**-10), (bf16, 2.0**-7)):
                        assert ((outcome.decoded[step][name] - value).abs() <= unit * scale).all(), (step, name, unit)
            assert not fp32.stats["skipped_steps"] and not any("residual" in key for key in fp16.states[-1])


@SEVERAL_RANKS
def test_steps_before_the_start_are_plain_ones(num_ranks):
    plans = [Run(SHAPES, steps=4), Run(SHAPES, LowRank(rank=2), steps=4, settings={"start_step": 2})]
    for plain, late in run_ranks(perform, num_ranks, plans):
        for step in range(2):
            for name, value in plain.decoded[step].items():
                assert torch.allclose(late.decoded[step][name], value, rtol=1e-5, atol=1e-6)
            assert not any(value.any() for key, value in late.states[step + 1].items() if "residual" in key)
        assert relative_difference(late.decoded[2]["a"], plain.decoded[2]["a"]) > 0.01
        assert late.stats["compressed_steps"] == 2


@SEVERAL_RANKS
def test_the_way_of_a_gpu_gives_the_same_numbers(num_ranks):
    """There the finite flag is a tensor and the basis comes from a Cholesky factorisation."""
    plans = []
    for rounds in (1, 2):
        for residual_dtype in KEPT_DTYPES:
            for on_gpu in (False, True):
                settings = {"residual_dtype": residual_dtype}
                method = LowRank(rank=2, rounds=rounds)
                plans.append(Run(SHAPES, method, steps=5, settings=settings, cholesky=on_gpu, flag_as_tensor=on_gpu))
    tolerance = {"fp32": 1e-4, "bf16": 0.02, "int8": 0.05}
    for own in run_ranks(perform, num_ranks, plans):
        for run, host, device in zip(plans[::2], own[::2], own[1::2], strict=True):
            for step in range(5):
                for name, value in host.decoded[step].items():
                    allowed = tolerance[run.settings["residual_dtype"]]
                    assert relative_difference(device.decoded[step][name], value) < allowed, (run.method, step, name)
