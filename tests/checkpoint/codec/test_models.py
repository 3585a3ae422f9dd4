"""Models of weights and moments: what is packed comes back, and rows alone decode as they do among all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commcomp.checkpoint.codec.blocks import join_blocks, pack_int16, split_blocks, unpack_int16
from commcomp.checkpoint.codec.factors import Aim, fit_factors, unpack_factors
from commcomp.checkpoint.codec.fitting import fit
from commcomp.checkpoint.codec.matrices import matrix_shape
from commcomp.checkpoint.codec.models import CENTERS, REFERENCES, Model, known_from, look, model_of, unpack_side

NUMBERS = {
    "decay": 0.95, "decay2": 0.9, "step": -1e-3, "correction": 0.4, "epsilon": 1e-8, "rest": 0.1, "rest2": 1e-3,
    "rate": 0.02, "rate_before": -1e-3
}  # fmt: skip


_OF_SQUARES = ("growth", "first growth", "second", "largest")
"""Centers that the reference "growth" goes with."""


@given(st.lists(st.integers(-15000, 15000), max_size=300))
@settings(max_examples=50, deadline=None)
def test_small_integers_come_back(values: list[int]) -> None:
    array = np.array(values, np.int32)
    assert (unpack_int16(pack_int16(array), len(values)) == array).all()


def test_blocks_come_back_and_damage_is_told() -> None:
    data = join_blocks([b"one", b"", b"three"])
    assert split_blocks(data, 3) == [b"one", b"", b"three"]
    for spoiled in (data[:-1], data + b"x", data[:2], b"\xff\xff\xff\xff" + data[4:]):
        with pytest.raises(ValueError):
            split_blocks(spoiled, 3)


def _low_rank(random: np.random.Generator, rows: int, columns: int, rank: int, noise: float) -> np.ndarray:
    left, right = random.normal(size=(rows, rank)), random.normal(size=(columns, rank))
    return (left @ right.T + noise * random.normal(size=(rows, columns))).astype(np.float32)


def test_factors_find_what_is_of_low_rank_and_leave_noise_alone() -> None:
    random = np.random.default_rng(0)
    matrix = _low_rank(random, 300, 200, 5, 0.1)
    factors = fit_factors(matrix, Aim(32))
    assert factors.left.shape[1] == 5
    rest = matrix - factors.product(slice(0, 300))
    assert np.square(rest).mean() < 1.1 * 0.1**2
    again = unpack_factors(factors.pack(), matrix.shape)
    assert (again.left == factors.left).all() and (again.right == factors.right).all() and again.unit == factors.unit
    assert fit_factors(random.normal(size=(300, 200)).astype(np.float32), Aim(32)).left.shape[1] == 0


def test_products_of_factors_are_exact_whatever_the_rows() -> None:
    """Every row alone, and the sums of products in 64-bit integers."""
    random = np.random.default_rng(0)
    factors = fit_factors(_low_rank(random, 97, 131, 20, 0.01), Aim(64))
    exact = factors.left.astype(np.int64) @ factors.right.astype(np.int64).T
    assert (factors.integers(slice(0, 97)) == exact).all()
    for row in range(97):
        assert (factors.integers(slice(row, row + 1)) == exact[row]).all()


def _matrices(rows: int, columns: int, seed: int, strange: bool) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    previous = _low_rank(random, rows, columns, 3, 1.0) * np.float32(1e-2)
    roles = ("previous", "first", "second", "previous first", "previous second", "weight", "previous weight")
    others = {role: previous + np.float32(1e-3) * _low_rank(random, rows, columns, 3, 1.0) for role in roles}
    for role in ("second", "previous second"):
        others[role] = np.square(others[role])
    if strange:
        for matrix in others.values():
            flat = matrix.reshape(-1)
            flat[random.integers(0, flat.size, 5)] = [np.nan, np.inf, -np.inf, 0.0, 1e38]
    return others


@pytest.mark.parametrize("strange", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (60, 1), (1, 60), (40, 33), (33, 90)])
@pytest.mark.parametrize(
    ("center", "reference"),
    [(c, r) for c in CENTERS for r in REFERENCES if (r == "growth") == (c in _OF_SQUARES) or r == "root"],
)
def test_rows_alone_are_known_as_they_are_among_all(
    center: str, reference: str, shape: tuple[int, int], strange: bool
) -> None:
    others = _matrices(*shape, 0, strange)
    values = np.square(others["previous"]) if center in _OF_SQUARES else others["previous"] * np.float32(1.01)
    model = model_of(Model(center, reference, "linear", 3, NUMBERS).to_settings())
    side, predictions, scatter = fit(model, np.ascontiguousarray(values), others, Aim(16))
    whole = known_from(model, side, slice(0, shape[0]), predictions, scatter)
    packed = side.pack()
    again = unpack_side(packed, shape)
    assert again.pack() == packed
    for row in range(0, shape[0], 7):
        rows = slice(row, min(row + 3, shape[0]))
        part = look(model, again, rows, {role: matrix[rows] for role, matrix in others.items()})
        place = slice(rows.start * shape[1], rows.stop * shape[1])
        for mine, all_of_it in ((part.predictions, whole.predictions), (part.scales, whole.scales)):
            assert (mine is None) == (all_of_it is None)
            if mine is not None and all_of_it is not None:
                assert mine.tobytes() == all_of_it[place].tobytes()


def test_settings_that_are_not_understood_are_named() -> None:
    settings = Model("previous", "constant", "linear", 3).to_settings()
    for spoiled in (
        {**settings, "center": "sideways"},
        {**settings, "reference": "moon"},
        {**settings, "resolution": "x"},
        {key: value for key, value in settings.items() if key != "numbers"},
        {**settings, "numbers": {"decay": "many"}},
    ):
        with pytest.raises(ValueError, match=r"sideways|moon|numbers|many|x"):
            model_of(spoiled)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), (1, 1)),
        ((7,), (7, 1)),
        ((3, 4), (3, 4)),
        ((64, 32, 3, 3), (64, 288)),
        ((2, 3, 500), (6, 500)),
        ((0, 4), (0, 1)),
    ],
)
def test_tensors_are_seen_as_the_most_nearly_square_matrix(shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    assert matrix_shape(shape) == expected
