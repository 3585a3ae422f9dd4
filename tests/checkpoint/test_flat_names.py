"""Moments are found among flattened, sharded names as they are in nested states."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from commcomp.checkpoint.coded import HostTensor, TreeInfo
from commcomp.checkpoint.flat_names import Owners
from commcomp.checkpoint.host_copy import host_views
from commcomp.checkpoint.roles import Moments, find_moments
from commcomp.checkpoint.state_tree import split


def _found(tree: dict) -> list[Moments]:
    state = split(tree)
    tensors: dict[str, HostTensor] = host_views(state.tensors)
    return find_moments(tensors, TreeInfo(1, state.skeleton, state.paths))


def _array(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def _weight(name: str, optimizer: str, *offset: int, model: str = "model.") -> dict:
    return {
        f"{model}{name}": {offset: _array(4, 3)},
        f"{optimizer}state.{name}.step": {(): _array()},
        f"{optimizer}state.{name}.exp_avg": {offset: _array(4, 3)},
        f"{optimizer}state.{name}.exp_avg_sq": {offset: _array(4, 3)},
    }


@pytest.mark.parametrize("optimizer", ["optim.", "train.optimizer.", ""])
def test_a_weight_meets_the_moments_of_its_own_shard(optimizer: str) -> None:
    tree = {**_weight("layers.0.state.proj", optimizer, 4, 0), **_weight("b.w", optimizer, 0, 0)}
    for key, value in _weight("b.w", optimizer, 8, 0).items():
        tree[key].update(value)
    tree[f"{optimizer}param_groups.0.params"] = {"value": ["b.w"]}
    tree[f"{optimizer}param_groups.0.betas"] = {"value": (0.8, 0.95)}
    tree[f"{optimizer}param_groups.0.lr"] = {"value": 0.5}
    found = {moments.first: moments for moments in _found(tree)}
    assert len(found) == 3
    for name, offset, rate in (("layers.0.state.proj", "(4, 0)", None), ("b.w", "(0, 0)", 0.5), ("b.w", "(8, 0)", 0.5)):
        moments = found[f"{optimizer}state.{name}.exp_avg/{offset}"]
        assert moments.weight == f"model.{name}/{offset}"
        assert moments.second == f"{optimizer}state.{name}.exp_avg_sq/{offset}"
        assert moments.step == f"{optimizer}state.{name}.step/()"
        if rate is not None:
            assert (moments.rate, moments.beta1, moments.beta2) == (rate, 0.8, 0.95)


def test_groups_that_are_flattened_by_weight_are_read() -> None:
    tree = {**_weight("a.w", "optim.", 0, 0), **_weight("b.w", "optim.", 0, 0)}
    for name, rate in (("a.w", 0.1), ("b.w", 0.2)):
        tree[f"optim.param_groups.{name}.lr"] = {"value": rate}
        tree[f"optim.param_groups.{name}.betas"] = {"value": (0.9, 0.9)}
    rates = {moments.weight: (moments.rate, moments.beta2) for moments in _found(tree)}
    assert rates == {"model.a.w/(0, 0)": (0.1, 0.9), "model.b.w/(0, 0)": (0.2, 0.9)}


def test_numbered_states_go_by_shape_and_order() -> None:
    tree = {f"model.{name}": {(0, 0): _array(4, 3)} for name in ("z", "a")}
    for number in (1, 0):
        tree.update(_weight(str(number), "optim.", 0, 0, model="unused."))
    tree = {key: value for key, value in tree.items() if not key.startswith("unused.")}
    tree["optim.param_groups.0.params"] = {"value": [0, 1]}
    weights = {moments.first: moments.weight for moments in _found(tree)}
    numbered = {"0": "z", "1": "a"}
    assert weights == {f"optim.state.{k}.exp_avg/(0, 0)": f"model.{v}/(0, 0)" for k, v in numbered.items()}


def test_a_second_copy_of_the_weights_is_nobodys() -> None:
    tree = {**_weight("w", "optim.", 0, 0), "ema.w": {(0, 0): _array(4, 3)}}
    assert [moments.weight for moments in _found(tree)] == ["model.w/(0, 0)"]


def test_families_have_one_name() -> None:
    keys = ["model.a.b", "optim.state.a.b.exp_avg", "optim.state.a.b.step", "other"]
    owners = Owners(iter(keys))
    assert [owners.family_of(key) for key in keys] == ["a.b", "a.b", "a.b", "other"]


def test_steps_that_are_plain_values_are_read() -> None:
    tree = {**_weight("a.w", "optim.", 0, 0), **_weight("b.w", "optim.", 0, 0)}
    del tree["optim.state.b.w.step"]
    tree["optim.state.a.w.step"] = {"value": 7}
    tree["optim.param_groups.0.params"] = {"value": ["a.w", "b.w"]}
    tree["optim.param_groups.0.step"] = {"value": 8}
    assert {moments.weight: moments.step for moments in _found(tree)} == {
        "model.a.w/(0, 0)": 7.0,
        "model.b.w/(0, 0)": 8.0,
    }


def test_the_largest_second_moment_is_found_at_its_shard() -> None:
    tree = _weight("b.w", "optim.", 8, 0)
    tree["optim.state.b.w.max_exp_avg_sq"] = {(8, 0): _array(4, 3), (0, 0): _array(4, 3)}
    assert next(moments.largest for moments in _found(tree)) == "optim.state.b.w.max_exp_avg_sq/(8, 0)"


def test_names_that_could_be_read_in_very_many_ways_take_little_memory() -> None:
    keys = [f"{number}.{'state.' * 90}{'x' * 3000}.exp_avg" for number in range(200)]
    keys += [f"{number}.{'y.' * 90}{'x' * 3000}" for number in range(200)]
    tracemalloc.start()
    try:
        owners = Owners(iter(keys))
        assert tracemalloc.get_traced_memory()[1] < 20 * sum(map(len, keys))
    finally:
        tracemalloc.stop()
    assert owners[keys[0]][2] == "exp_avg" and keys[-1] not in owners
