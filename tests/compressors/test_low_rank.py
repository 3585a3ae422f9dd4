"""The linear algebra of PowerSGD: products on strided views, and bases of any factor however degenerate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commcomp.compressors.low_rank import (
    cholesky_orthonormal_rows,
    folded_shape,
    initial_factor,
    left_factor,
    orthonormal_rows,
    reconstruct_into,
    right_factor,
    subtract_product,
)

ROUTES = pytest.mark.parametrize("basis_of", [orthonormal_rows, cholesky_orthonormal_rows])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_orthonormal(rows: torch.Tensor, tolerance: float = 1e-5) -> None:
    gram = rows.double() @ rows.double().mT
    assert (gram - torch.eye(rows.shape[-2], dtype=torch.float64)).abs().max() < tolerance


def outside_span(factor: torch.Tensor, basis: torch.Tensor) -> float:
    """Largest part of a unit row of `factor` that lies outside the span of `basis`' rows."""
    largest = factor.abs().amax(dim=-1, keepdim=True).double()
    unit = torch.nn.functional.normalize(factor.double() / torch.where(largest > 0, largest, 1.0), dim=-1)
    rest = unit - unit @ basis.double().mT @ basis.double()
    return float(rest.norm(dim=-1).max())


def relative_error(decoded: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(decoded - exact) / torch.linalg.matrix_norm(exact)


def amplification(matrices: torch.Tensor, right: torch.Tensor, true_rank: int) -> torch.Tensor:
    """How much P = M Q enlarges relative errors: Q may be nearly orthogonal to a part of M's row space, and P's weakest
    column then drowns in the product's rounding (first term) or in the nudge that the basis adds (second term)."""
    matrices, right = matrices.double() / matrices.abs().max(), right.double() / right.abs().max()
    left = left_factor(matrices, right)
    weakest = torch.linalg.svdvals(left)[:, true_rank - 1]
    unit = torch.linalg.svdvals(torch.nn.functional.normalize(left, dim=-1, eps=1e-300))
    product = torch.linalg.matrix_norm(matrices) * torch.linalg.matrix_norm(right)
    return product / weakest + unit[:, 0] / unit[:, true_rank - 1]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((), None), ((5,), None), ((3, 4), (3, 4)), ((64, 3, 7, 7), (64, 147)), ((1, 9), (1, 9)), ((4, 0, 2), (4, 0))],
)
def test_folded_shape_is_first_by_rest(shape, expected):
    assert folded_shape(shape) == expected
    assert folded_shape(torch.Size(shape)) == expected


@ROUTES
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_one_iteration_recovers_a_matrix_of_the_rank_exactly(basis_of, data):
    batch, rows, columns = (data.draw(st.integers(1, high)) for high in (4, 30, 30))
    rank = data.draw(st.integers(1, min(rows, columns)))
    true_rank = data.draw(st.integers(1, rank))
    scale = data.draw(st.sampled_from([1e-6, 1.0, 1e6]))
    seed = data.draw(st.integers(0, 1000))
    exact = scale * normal(batch, rows, true_rank, seed=seed) @ normal(batch, true_rank, columns, seed=seed + 1)
    first = normal(batch, rank, columns, seed=seed + 2)
    basis = basis_of(left_factor(exact, first))
    decoded = torch.empty_like(exact)
    reconstruct_into(decoded, basis, right_factor(exact, basis))
    assert (relative_error(decoded, exact) <= 3e-6 * amplification(exact, first, true_rank)).all()
    basis = basis_of(left_factor(exact, right_factor(exact, basis)))
    reconstruct_into(decoded, basis, right_factor(exact, basis))
    assert (relative_error(decoded, exact) <= 2e-4).all()  # of 40 000 drawn cases the worst is 5e-5, most are 1e-6


@ROUTES
@pytest.mark.parametrize("spectrum", [(1.0, 0.9, 0.8, 1e-3, 1e-3), (1.0, 1e-1, 1e-2, 1e-5, 1e-5)])
def test_iterations_find_the_best_approximation(basis_of, spectrum):
    left, right = (torch.linalg.qr(normal(40, 5, seed=seed)).Q for seed in (1, 2))
    matrix = (left * torch.tensor(spectrum)) @ right.T
    factor = normal(1, 3, 40, seed=3)
    for _ in range(5):
        basis = basis_of(left_factor(matrix[None], factor))
        factor = right_factor(matrix[None], basis)
    decoded = torch.empty(1, 40, 40)
    reconstruct_into(decoded, basis, factor)
    best = sum(value**2 for value in spectrum[3:]) ** 0.5  # Eckart and Young: the singular values that do not fit
    assert (decoded[0] - matrix).norm() < 1.05 * best


def test_products_equal_the_plain_ones_on_strided_views_and_write_nothing_else():
    flat = normal(200)
    before = flat.clone()
    view = flat.as_strided((2, 5, 7), (60, 7, 1), 11)
    left, right = normal(2, 3, 5, seed=1), normal(2, 3, 7, seed=2)
    matrices = view.clone()
    assert torch.allclose(left_factor(view, right), (matrices @ right.mT).mT, atol=1e-5)
    assert torch.allclose(right_factor(view, left), (matrices.mT @ left.mT).mT, atol=1e-5)
    assert torch.equal(flat, before)
    subtract_product(view, left, right)
    assert torch.allclose(view, matrices - left.mT @ right, atol=1e-5)
    reconstruct_into(view, left, right)
    assert torch.allclose(view, left.mT @ right, atol=1e-5)
    outside = torch.ones(200, dtype=torch.bool)
    outside.as_strided((2, 5, 7), (60, 7, 1), 11).fill_(False)
    assert torch.equal(flat[outside], before[outside])


@ROUTES
@pytest.mark.parametrize(
    "kind", ["zero", "tiny", "denormal", "huge", "one zero row", "repeated", "rank one", "mixed scales", "ones"]
)
@pytest.mark.parametrize(("rank", "length"), [(1, 1), (1, 9), (2, 2), (4, 4), (4, 33), (16, 16), (8, 100)])
def test_degenerate_factors_give_a_full_orthonormal_basis(basis_of, kind, rank, length):
    factor = normal(3, rank, length)
    if kind == "zero":
        factor.zero_()
    elif kind == "tiny":
        factor *= 1e-30
    elif kind == "denormal":
        factor = factor.sign() * 1e-42
    elif kind == "huge":
        factor *= 1e30
    elif kind == "one zero row":
        factor[:, 0] = 0
    elif kind == "repeated":
        factor[:, :] = factor[:, :1].clone()
    elif kind == "rank one":
        factor = factor[:, :, :1] * factor[:, :1].clone()
    elif kind == "mixed scales":
        factor *= torch.logspace(-25, 25, rank)[:, None]
    else:
        factor.fill_(1.0)
    basis = basis_of(factor)
    assert basis.shape == factor.shape and basis.dtype == torch.float32
    assert_orthonormal(basis)
    if kind == "repeated" or kind == "ones":
        assert outside_span(factor, basis) < 1e-4


@ROUTES
@pytest.mark.parametrize("rank", [3, 5])
def test_full_rank_with_repeated_columns_is_not_left_to_chance(basis_of, rank):
    """With as many columns as rows the nudge of one in some thousands is nearly parallel to what is there already."""
    factor = normal(20_000, rank, rank)
    factor[:, -1] = factor[:, 0]
    assert_orthonormal(basis_of(factor))


@ROUTES
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_finite_factor_gives_an_orthonormal_basis_of_its_span(basis_of, data):
    rank = data.draw(st.integers(1, 8))
    length = data.draw(st.integers(rank, 24))
    factor = normal(1, rank, length, seed=data.draw(st.integers(0, 1000)))
    for row in range(rank):
        what = data.draw(st.sampled_from(["keep", "keep", "zero", "copy", "scale"]))
        if what == "zero":
            factor[0, row] = 0
        elif what == "copy":
            factor[0, row] = factor[0, 0]
        elif what == "scale":
            factor[0, row] *= 10.0 ** data.draw(st.integers(-30, 28))
    basis = basis_of(factor)
    assert_orthonormal(basis)
    assert outside_span(factor, basis) < 2e-3


@ROUTES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_factors_do_not_raise_nor_reach_their_neighbours(basis_of, bad):
    factor = normal(3, 4, 10)
    clean = basis_of(factor)
    factor[1, 2, 3] = bad
    basis = basis_of(factor)
    assert torch.equal(basis[0], clean[0]) and torch.equal(basis[2], clean[2])
    assert not basis[1].isfinite().all()
    assert basis_of(torch.full((1, 2, 5), bad)).shape == (1, 2, 5)


def test_both_routes_span_the_same_space():
    factor = normal(5, 4, 60)
    assert outside_span(orthonormal_rows(factor), cholesky_orthonormal_rows(factor)) < 1e-4


def test_first_factors_depend_on_name_and_seed_alone():
    factor = initial_factor("a.weight", 3, 50, seed=7)
    torch.manual_seed(1)
    assert torch.equal(factor, initial_factor("a.weight", 3, 50, seed=7))
    assert not torch.equal(factor, initial_factor("b.weight", 3, 50, seed=7))
    assert not torch.equal(factor, initial_factor("a.weight", 3, 50, seed=8))
    state = torch.get_rng_state()
    initial_factor("a.weight", 3, 50, seed=7)
    assert torch.equal(state, torch.get_rng_state())  # the user's random numbers stay as they were
    assert factor.dtype == torch.float32 and abs(float(factor.std()) - 1) < 0.2
