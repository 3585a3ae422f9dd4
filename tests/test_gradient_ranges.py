"""Gradients of any size, zeros included: what is delivered must not depend on the unit in which they are measured."""

from __future__ import annotations

import pytest
import torch

from commcomp import LowRank
from tests.ranks import run_ranks
from tests.reference.given_gradients import Run, make_gradients, perform, relative_difference

SHAPES = {"w": (64, 48)}
RANK = 4


def corner_matrix() -> torch.Tensor:
    """Rank 4, its first 8 rows and columns zero: like an embedding whose first tokens never occur."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.zeros(64, 48)
    matrix[8:, 8:] = torch.randn(56, RANK, generator=generator) @ torch.randn(RANK, 40, generator=generator)
    return matrix


def dense_matrix() -> torch.Tensor:
    return make_gradients(SHAPES, 0, 0)["w"]


def outcome(run: Run, num_ranks: int = 1):
    return run_ranks(perform, num_ranks, [run])[0][0]


@pytest.mark.parametrize("cholesky", [False, True])
@pytest.mark.parametrize("rounds", [1, 2])
def test_compression_recovers_after_a_phase_of_zero_gradients(cholesky, rounds):
    """A layer behind a zero-initialised one, or an idle expert, has gradient zero for a while."""
    matrix = corner_matrix()
    runs = []
    for factor_dtype in ("fp32", "int8"):
        for zero_steps in (1, 3):
            given = [{"w": torch.zeros_like(matrix)}] * zero_steps + [{"w": matrix}] * 8
            method = LowRank(rank=RANK, rounds=rounds, factor_dtype=factor_dtype)
            runs.append(Run(SHAPES, method, steps=len(given), given=given, cholesky=cholesky))
    for run, result in zip(runs, run_ranks(perform, 1, runs)[0], strict=True):
        assert not result.decoded[run.steps - 9]["w"].any()
        assert all(decoded["w"].isfinite().all() for decoded in result.decoded)
        assert_recovered(result, matrix, exact=rounds == 2 and run.method.factor_dtype == "fp32")


def assert_recovered(result, matrix: torch.Tensor, *, exact: bool) -> None:
    """`exact`: two rounds in fp32 find a rank-4 matrix again; else within what an undisturbed run keeps owing."""
    assert relative_difference(result.decoded[-1]["w"], matrix) < (1e-4 if exact else 0.3)
    assert float(result.residual(0, "w").norm() / matrix.norm()) < (1e-4 if exact else 0.3)


@pytest.mark.parametrize("cholesky", [False, True])
@pytest.mark.parametrize("rounds", [1, 2])
def test_compression_recovers_after_a_gradient_of_lower_rank(cholesky, rounds):
    """One step of rank 1 must not cost the other directions for good."""
    matrix = corner_matrix()
    poor = torch.zeros_like(matrix)
    poor[20] = matrix[20]
    given = [{"w": poor}] * 3 + [{"w": matrix}] * 12
    result = outcome(Run(SHAPES, LowRank(rank=RANK, rounds=rounds), steps=len(given), given=given, cholesky=cholesky))
    assert_recovered(result, matrix, exact=rounds == 2)


def nearly_rank_four() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    left, right, noise = (torch.randn(shape, generator=generator) for shape in ((64, RANK), (RANK, 48), (64, 48)))
    return left @ right / 2 + 0.02 * noise


def assert_quality_is_that_of_fp32(factor_dtype: str, rounds: int, scales: tuple[float, ...]) -> None:
    """|decoded - gradient| / |gradient| at the last of eight steps of one gradient, against fp32 at scale 1."""
    cases = [("fp32", 1.0), *((factor_dtype, scale) for scale in scales)]
    matrices = [nearly_rank_four() * scale for _, scale in cases]
    runs = [
        Run(SHAPES, LowRank(rank=RANK, rounds=rounds, factor_dtype=dtype), steps=8, given=[{"w": matrix}] * 8)
        for (dtype, _), matrix in zip(cases, matrices, strict=True)
    ]
    found = {}
    for case, result, matrix in zip(cases, run_ranks(perform, 1, runs)[0], matrices, strict=True):
        finite = all(decoded["w"].isfinite().all() for decoded in result.decoded)
        found[case] = relative_difference(result.decoded[-1]["w"], matrix) if finite else float("inf")
    expected = found["fp32", 1.0]
    assert expected < 0.3
    assert all(error < 1.5 * expected for error in found.values()), found


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("factor_dtype", ["fp32", "bf16", "int8", "fp16"])
def test_quality_does_not_depend_on_the_gradients_scale(factor_dtype, rounds):
    """Gradients of 1e-5 to 1e2 an element fit every format by themselves, so their factors must, too."""
    assert_quality_is_that_of_fp32(factor_dtype, rounds, (1e-5, 1e-4, 1e-3, 1e-2, 1.0, 1e1, 1e2))


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("factor_dtype", ["fp32", "bf16", "int8"])
def test_extreme_gradients_neither_vanish_nor_overflow(factor_dtype, rounds):
    assert_quality_is_that_of_fp32(factor_dtype, rounds, (1e-25, 1e-20, 1e20, 1e25))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_factor_that_overflows_does_not_spoil_the_residual(num_ranks):
    """A column of 12500s: every element fits fp16, the column's norm of 100000, which Q holds, does not."""
    calm = dense_matrix()
    spike = calm.clone()
    spike[:, 0] = 12_500.0
    given = [{"w": spike}, {"w": spike}, *[{"w": calm}] * 6]
    methods = [
        LowRank(rank=RANK, rounds=rounds, factor_dtype=factor_dtype)
        for rounds in (1, 2)
        for factor_dtype in ("fp16", "bf16", "int8")
    ]
    runs = [Run(SHAPES, method, steps=len(given), given=given) for method in methods]
    for own in run_ranks(perform, num_ranks, runs):
        for method, result in zip(methods, own, strict=True):
            for step, state in enumerate(result.states):
                for key, value in state.items():
                    assert value.isfinite().all(), f"{method}: {key} after {step} steps"
            assert result.decoded[-1]["w"].isfinite().all(), method


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_finite_gradient_whose_factors_overflow_spoils_one_step_only(num_ranks):
    """A column of 1e38s: P holds it, Q, which would hold its norm of 8e38, does not."""
    calm = dense_matrix()
    spike = calm.clone()
    spike[:, 0] = 1e38
    given = [{"w": calm}, {"w": spike}, *[{"w": calm}] * 3]
    ways = [{}, {"native": False}, {"flag_as_tensor": True}]
    ways += [{"settings": {"residual_dtype": dtype}} for dtype in ("bf16", "int8")]
    methods = [LowRank(rank=RANK, rounds=rounds, factor_dtype=dtype) for rounds in (1, 2) for dtype in ("fp32", "int8")]
    runs = [Run(SHAPES, method, steps=len(given), given=given, **way) for method in methods for way in ways]
    for run, result in zip(runs, run_ranks(perform, num_ranks, runs)[0], strict=True):
        for state in result.states:
            assert all(value.isfinite().all() for value in state.values()), run
        assert all(decoded["w"].isfinite().all() for decoded in result.decoded[2:]), run
        if run.method.rounds == 2:
            assert not result.decoded[1]["w"].isfinite().all(), run  # it must not look finite to the optimizer
            before, after = (result.residual(0, "w", step) for step in (1, 2))
            assert torch.allclose(before[:, 1:], after[:, 1:], atol=1e-6), run
            assert after[:, 0].abs().max() < 1e3, run


def test_a_finite_gradient_of_large_elements_counts_as_finite():
    """Vectors travel dense; the sum of these is beyond fp32, each of them is not."""
    matrix, vector = dense_matrix(), torch.full((16,), 1e38)
    shapes = {"w": (64, 48), "bias": (16,)}
    given = [{"w": matrix, "bias": vector}] * 2
    result = outcome(Run(shapes, LowRank(rank=RANK), steps=2, given=given))
    assert all(torch.equal(decoded["bias"], vector) for decoded in result.decoded)
    assert result.stats["skipped_steps"] == 0
    owed = sum(decoded["w"] for decoded in result.decoded) + result.residual(0, "w")
    assert relative_difference(owed, 2 * matrix) < 1e-5
