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
@pytest.mark.parametrize("factor_dtype", ["fp32", "int8"])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("zero_steps", [1, 3])
def test_compression_recovers_after_a_phase_of_zero_gradients(cholesky, factor_dtype, rounds, zero_steps):
    """A layer behind a zero-initialised one, or an idle expert, has gradient zero for a while."""
    matrix = corner_matrix()
    given = [{"w": torch.zeros_like(matrix)}] * zero_steps + [{"w": matrix}] * 8
    method = LowRank(rank=RANK, rounds=rounds, factor_dtype=factor_dtype)
    result = outcome(Run(SHAPES, method, steps=len(given), given=given, cholesky=cholesky))
    for step in range(zero_steps):
        assert not result.decoded[step]["w"].any()
    assert all(decoded["w"].isfinite().all() for decoded in result.decoded)
    tolerance = 1e-4 if factor_dtype == "fp32" else 0.1
    assert relative_difference(result.decoded[-1]["w"], matrix) < tolerance
    delivered = sum(decoded["w"] for decoded in result.decoded)
    assert relative_difference(delivered, 8 * matrix) < tolerance


@pytest.mark.parametrize("cholesky", [False, True])
@pytest.mark.parametrize("rounds", [1, 2])
def test_compression_recovers_after_a_gradient_of_lower_rank(cholesky, rounds):
    """One step of rank 1 must not cost the other directions for good."""
    matrix = corner_matrix()
    poor = torch.zeros_like(matrix)
    poor[20] = matrix[20]
    given = [{"w": poor}] * 3 + [{"w": matrix}] * 9
    result = outcome(Run(SHAPES, LowRank(rank=RANK, rounds=rounds), steps=len(given), given=given, cholesky=cholesky))
    assert relative_difference(result.decoded[-1]["w"], matrix) < 1e-3


def relative_residual(factor_dtype: str, rounds: int, scale: float) -> float:
    """|residual| / |gradient| after six steps of one gradient of the given scale; infinite where not finite."""
    matrix = dense_matrix() * scale
    run = Run(SHAPES, LowRank(rank=RANK, rounds=rounds, factor_dtype=factor_dtype), steps=6, given=[{"w": matrix}] * 6)
    result = outcome(run)
    if not all(decoded["w"].isfinite().all() for decoded in result.decoded):
        return float("inf")
    return float(result.residual(0, "w").double().norm() / matrix.double().norm())


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1e2])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("factor_dtype", ["fp32", "bf16", "int8", "fp16"])
def test_quality_does_not_depend_on_the_gradients_scale(factor_dtype, rounds, scale):
    """Gradients of 1e-5 to 1e2 an element fit every format by themselves, so their factors must, too."""
    assert relative_residual(factor_dtype, rounds, scale) < 1.2 * relative_residual("fp32", rounds, 1.0)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("factor_dtype", ["fp32", "int8"])
def test_extreme_gradients_neither_vanish_nor_overflow(factor_dtype, rounds, scale):
    assert relative_residual(factor_dtype, rounds, scale) < 1.2 * relative_residual("fp32", rounds, 1.0)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("factor_dtype", ["fp16", "bf16", "int8"])
def test_a_factor_that_overflows_does_not_spoil_the_residual(num_ranks, rounds, factor_dtype):
    """One column of 12500s: every element fits fp16, the column's norm of 100000 does not."""
    calm = dense_matrix()
    spike = calm.clone()
    spike[:, 0] = 12_500.0
    given = [{"w": calm}, {"w": calm}, {"w": spike}, {"w": spike}, *[{"w": calm}] * 40]
    method = LowRank(rank=RANK, rounds=rounds, factor_dtype=factor_dtype)
    for own in run_ranks(perform, num_ranks, [Run(SHAPES, method, steps=len(given), given=given)]):
        for step, state in enumerate(own[0].states):
            for key, value in state.items():
                assert value.isfinite().all(), f"{key} after {step} steps"
        assert own[0].decoded[-1]["w"].isfinite().all()


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
