"""ExCP's recipe: k-means against brute force, the masks by hand, and streams that hold what the reconstruction says."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch

from benchmarks.checkpoint_excp import CENTRES, ExcpChain, Recipe, decode, encode, kept
from benchmarks.checkpoint_training import State, adam_tensors
from benchmarks.scalar_kmeans import centres_of, nearest


def state_of(seed: int) -> State:
    """A matrix of an odd number of values, a vector, and their moments."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (41, 63), "vector": (9,)}
    draw = lambda shape: torch.randn(shape, generator=generator)  # noqa: E731
    moments = {
        index: {"step": torch.tensor(7.0), "exp_avg": 1e-3 * draw(shape), "exp_avg_sq": 1e-6 * draw(shape).exp()}
        for index, shape in enumerate(shapes.values())
    }
    model = {name: draw(shape) for name, shape in shapes.items()}
    return {"step": 7, "model": model, "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3}]}}


def near(state: State, seed: int) -> State:
    """The state some steps on: weights a little off, other moments."""
    after = state_of(seed)
    for name, value in state["model"].items():
        after["model"][name] = value + 1e-2 * after["model"][name]
    return after


def loss_of(values: np.ndarray, centres: np.ndarray) -> float:
    return float(np.square(values[:, None] - centres).min(axis=1).sum())


def test_kmeans_is_a_fixed_point_and_near_the_best() -> None:
    values = np.random.default_rng(0).standard_normal(14).astype(np.float32)
    centres = centres_of(values, 3)
    groups = nearest(values, centres)
    for index, centre in enumerate(centres):
        assert centre == pytest.approx(values[groups == index].mean(dtype=np.float64), rel=1e-6)
    ascending = np.sort(values).astype(np.float64)
    best = min(
        sum(np.square(part - part.mean()).sum() for part in np.split(ascending, cuts))
        for cuts in itertools.combinations(range(1, 14), 2)
    )
    assert loss_of(values, centres) <= 1.3 * best


def test_kmeans_of_fewer_distinct_values_than_centres() -> None:
    values = np.array([3, 1, 1, 3, 3], np.float32)
    assert list(centres_of(values, 15)) == [1, 3]
    assert centres_of(np.empty(0, np.float32), 15).size == 0


def test_kmeans_refuses_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="expected finite"):
        centres_of(np.array([1, np.inf], np.float32), 2)


def test_nearest_is_nearest() -> None:
    rng = np.random.default_rng(1)
    values, centres = rng.standard_normal(500).astype(np.float32), np.sort(rng.standard_normal(15))
    np.testing.assert_array_equal(nearest(values, centres), np.abs(values[:, None] - centres).argmin(axis=1))


def test_masks_follow_the_recipe() -> None:
    residual = np.array([1, -2, 3, -4, 5], np.float32)
    first = np.array([9, 1, 1, 1, -9], np.float32)
    second = np.full(5, 4e-10, np.float32)  # alpha / sqrt(4e-10) = 2.5
    weights, moments = kept(residual, first, second, Recipe())
    assert not weights.any(), "nothing exceeds 2.5 medians of 3"
    weights, moments = kept(residual, first, second * 100, Recipe())  # 0.25 medians = 0.75
    assert weights.all()
    assert list(moments) == [True, False, False, False, True]  # above 2 means of 4.2
    weights, moments = kept(residual, first, second * 100 / 16, Recipe())  # 1 median
    assert list(weights) == [False, False, False, True, True]
    assert list(moments) == [False, False, False, False, True]


def test_reconstruction_is_zero_or_a_centre() -> None:
    before, after = state_of(1), near(state_of(1), 2)
    encoded = encode(after, before)
    rebuilt = decode(encoded, after, before)
    (w0, _, _), (w, m, _), (w1, m1, v1) = (adam_tensors(state)["matrix"] for state in (before, after, rebuilt))
    assert len(torch.unique(m1)) <= CENTRES + 1
    assert len(torch.unique(v1)) <= CENTRES + 1
    assert torch.equal(m1 == 0, v1 == 0)
    residual = w - w0
    assert (w1 - w).abs().max() < residual.abs().max() / 4
    assert torch.nn.functional.mse_loss(w1, w) < 0.05 * residual.square().mean()
    assert ((m1 - m)[m1 != 0].abs() < 0.2 * m.abs().max()).all()


def test_small_tensors_are_exact_where_kept() -> None:
    before, after = state_of(1), near(state_of(1), 2)
    rebuilt = decode(encode(after, before), after, before)
    _, _, v = adam_tensors(after)["vector"]
    _, m1, v1 = adam_tensors(rebuilt)["vector"]
    assert torch.equal(v1[m1 != 0], v[m1 != 0])


def test_streams_alone_carry_the_tensors() -> None:
    before, after = state_of(1), near(state_of(1), 2)
    encoded = encode(after, before)
    empty = copy.deepcopy(after)
    for tensors in adam_tensors(empty).values():
        for tensor in tensors:
            tensor.zero_()
    one, other = decode(encoded, after, before), decode(encoded, empty, before)
    for name, tensors in adam_tensors(one).items():
        assert all(map(torch.equal, tensors, adam_tensors(other)[name])), name
    assert encoded.bytes() == {kind: len(stream) for kind, stream in encoded.streams.items()}


def test_fp32_centres_keep_small_second_moments() -> None:
    before, after = state_of(1), near(state_of(1), 2)
    for _, _, v in adam_tensors(after).values():
        v.mul_(1e-4)  # to 1e-10, far below the least fp16
    lost = adam_tensors(decode(encode(after, before), after, before))["matrix"]
    wide = Recipe(centre_dtype="float32")
    whole = adam_tensors(decode(encode(after, before, wide), after, before))["matrix"]
    assert (lost[2] == 0).all()
    assert torch.equal(whole[1] == 0, whole[2] == 0) and (whole[2] != 0).any()
    filled = Recipe(centre_dtype="float32", median_in_place_of_zero_v=True)
    assert all((v > 0).all() for _, _, v in adam_tensors(decode(encode(after, before, filled), after, before)).values())


def test_chain_codes_against_its_own_reconstructions() -> None:
    states = [state_of(1)]
    for seed in (2, 3):
        states.append(near(states[-1], seed))
    chain = ExcpChain()
    rebuilt = [chain(state) for state in states]
    assert torch.equal(rebuilt[0]["model"]["matrix"], states[0]["model"]["matrix"])
    expected = decode(encode(states[2], rebuilt[1]), states[2], rebuilt[1])
    assert torch.equal(rebuilt[2]["model"]["matrix"], expected["model"]["matrix"])
    assert len(chain.sizes) == 2
