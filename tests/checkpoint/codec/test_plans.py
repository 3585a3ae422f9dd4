"""Numbers by which tensors are predicted: what states say of them may be anything."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch

from commcomp.checkpoint import SnapshotStore
from tests.checkpoint.codec.training import Training
from tests.checkpoint.states import assert_same


@pytest.mark.parametrize("mode", ["lossless", "standard"])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("betas", (0.9, 2.0)),
        ("betas", (-0.9, -2.0)),
        ("betas", (0.9, float("nan"))),
        ("betas", (10**400, 0.999)),
        ("eps", 10**400),
        ("eps", 1e300),
        ("lr", 10**400),
        ("lr", float("inf")),
    ],
    ids=lambda value: str(value)[:20],
)
def test_settings_that_no_optimizer_takes_do_no_harm(tmp_path: Path, mode: str, setting: str, value: object) -> None:
    training, store = Training(), SnapshotStore(tmp_path, mode=mode, threads=1)
    for step in (3, 4, 9004):
        training.step(1)
        state = copy.deepcopy(training.state())
        for group in state["optimizer"]["param_groups"]:
            group[setting] = value
        for moments in state["optimizer"]["state"].values():
            moments["step"] = float(step)
        store.save(step, state)
        if mode == "lossless":
            assert_same(state, store.load(step))
    assert store.verify() == []


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_an_average_of_denormals_that_is_suddenly_large_comes_back(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path, threads=1)
    for step in (1, 2):
        tiny = {"a": torch.rand(40, 40) * 1e-40}
        state = {"model": tiny, "ema": {"a": torch.rand(40, 40) * (1e-40 if step == 1 else 1.0)}}
        store.save(step, state)
        assert_same(state, store.load(step))


@pytest.mark.filterwarnings("ignore:this state is kept exactly")
@pytest.mark.parametrize("mode", ["lossless", "standard"])
@pytest.mark.parametrize("others", [["momentum_buffer"], ["exp_avg"], []])
def test_a_largest_second_moment_without_the_second_is_kept_exactly(
    tmp_path: Path, mode: str, others: list[str]
) -> None:
    store = SnapshotStore(tmp_path, mode=mode, threads=1)
    for step in (1, 2):
        moments = {name: torch.randn(40, 40) for name in others} | {"max_exp_avg_sq": torch.rand(40, 40)}
        state = {"model": {"w": torch.randn(40, 40)}, "optimizer": {"state": {0: moments}}}
        store.save(step, state)
        loaded = store.load(step)
        assert_same(loaded["optimizer"]["state"][0]["max_exp_avg_sq"], moments["max_exp_avg_sq"])


@pytest.mark.filterwarnings("ignore:this state is kept exactly")
@pytest.mark.parametrize("mode", ["lossless", "standard"])
@pytest.mark.parametrize("roles", list(itertools.combinations(["w", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"], 2)))
def test_one_tensor_in_two_roles_comes_back(tmp_path: Path, mode: str, roles: tuple[str, str]) -> None:
    store = SnapshotStore(tmp_path, mode=mode, threads=1)
    tensors = {name: torch.rand(40, 40) for name in ("w", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
    tensors[roles[0]] = tensors[roles[1]]
    for step in (1, 2):
        for tensor in tensors.values():
            tensor *= 1 + 1e-3 * torch.rand(40, 40)
        weight, moments = {"w": tensors["w"]}, {name: value for name, value in tensors.items() if name != "w"}
        state = {"model": weight, "optimizer": {"state": {"w": {**moments, "step": step}}}}
        store.save(step, state)
        if mode == "lossless":
            assert_same(store.load(step), state)
    assert store.verify() == []
