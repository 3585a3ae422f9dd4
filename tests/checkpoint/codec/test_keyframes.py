"""Lossy snapshots without a parent: how finely their weights are kept, and that they are kept so."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commcomp.checkpoint import SnapshotStore
from commcomp.checkpoint.codec.lossy import QUALITIES
from commcomp.checkpoint.codec.planes import decode_chunk
from commcomp.checkpoint.codec.steps import encode_in_steps
from commcomp.checkpoint.coded import HostTensor
from tests.checkpoint.codec.training import Training
from tests.checkpoint.states import assert_same

WEIGHTS = ("embedding.weight", "wide.weight", "narrow.weight")
MODES = ("cautious", "standard", "compact")


def _bounds(store: SnapshotStore, step: int) -> dict[str, float]:
    """Of the weights that are not exact; what is loaded must keep them."""
    bounds = {t.name.removeprefix("model/"): t.bound for t in store.info(step).tensors if t.name.startswith("model/")}
    return {name: float(bound["error"]) for name, bound in bounds.items() if bound is not None}


def _require_kept(store: SnapshotStore, step: int, state: dict[str, Any]) -> dict[str, float]:
    bounds, loaded = _bounds(store, step), store.load(step)["model"]
    for name, error in bounds.items():
        given = state["model"][name]
        assert ((given - loaded[name]).abs() <= 1.0001 * error + 1e-6 * given.abs()).all(), name
    return bounds


def _changes(store: SnapshotStore, step: int, state: dict[str, Any]) -> dict[str, float]:
    """Standard deviation of what separates each weight from a saved step's."""
    loaded = store.load(step)["model"]
    return {name: float((state["model"][name] - loaded[name]).double().std(correction=0)) for name in WEIGHTS}


def _steps_of_adam(training: Training) -> dict[str, float]:
    """Root mean square of the optimizer's last step, weight decay left out."""
    found = {}
    for group in training.optimizer.param_groups:
        for parameter in group["params"]:
            kept = training.optimizer.state[parameter]
            first = kept["exp_avg"] / (1 - group["betas"][0] ** kept["step"])
            second = kept["exp_avg_sq"] / (1 - group["betas"][1] ** kept["step"])
            change = group["lr"] * first / (second.sqrt() + group["eps"])
            name = next(name for name, other in training.model.named_parameters() if other is parameter)
            found[name] = float(change.square().mean().sqrt())
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("reopened", "keyframe_every", "keep_reference"),
    [(False, 3, True), (True, 3, True), (True, 3, False), (True, 1, True)],
)
def test_a_keyframe_in_a_run_is_no_coarser_than_a_delta(
    tmp_path: Path, mode: str, reopened: bool, keyframe_every: int, keep_reference: bool
) -> None:
    """Of the same state in a store of the same snapshots that goes on with deltas."""
    training, folders = Training(), (tmp_path / "keyframes", tmp_path / "deltas")

    def opened() -> list[SnapshotStore]:
        settings = {"keep_reference": keep_reference, "threads": 2}
        return [
            SnapshotStore(folders[0], mode, keyframe_every, **settings),
            SnapshotStore(folders[1], mode, 9, **settings),
        ]

    stores = opened()
    for step in (10, 20, 30):
        training.step(10)
        for store in stores:
            store.save(step, training.state())
    training.step(3)
    if reopened:
        stores = opened()
    changes = [_changes(store, 30, training.state()) for store in stores]
    reports = [store.save(33, training.state()) for store in stores]
    assert [report.keyframe for report in reports] == [True, False]
    keyframe, delta = (_require_kept(store, 33, training.state()) for store in stores)
    assert keyframe.keys() == delta.keys() == set(WEIGHTS)
    for name in WEIGHTS:
        most = QUALITIES[mode].weight
        assert keyframe[name] <= most * changes[0][name] * 1.0001
        assert delta[name] <= most * changes[1][name] * 1.0001
        assert keyframe[name] <= 1.1 * delta[name]


@pytest.mark.parametrize("mode", MODES)
def test_without_an_earlier_snapshot_a_step_of_the_optimizer_is_the_measure(tmp_path: Path, mode: str) -> None:
    """In a new store, and where the snapshot before is damaged; warmed up and at the first step."""
    training, most = Training(), QUALITIES[mode].weight
    store = SnapshotStore(tmp_path, mode)
    for count, step in ((1, 1), (20, 21)):
        training.step(count)
        if step > 1:
            Path(store._files.path_of(1)).write_bytes(b"damaged")
            store = SnapshotStore(tmp_path, mode)
            with pytest.warns(UserWarning, match="saved without a parent"):
                assert store.save(step, training.state()).keyframe
        else:
            assert store.save(step, training.state()).keyframe
        bounds = _require_kept(store, step, training.state())
        changes = _steps_of_adam(training)
        assert bounds.keys() == set(WEIGHTS)
        for name in WEIGHTS:
            assert 0.3 * most * changes[name] < bounds[name] < 1.01 * most * changes[name]


def test_weights_whose_steps_nothing_tells_are_exact(tmp_path: Path) -> None:
    """No learning rate, one of 0, moments of 0, or weights that are not finite."""
    training = Training()
    training.step(5)

    def without(change: str) -> dict[str, Any]:
        state = copy.deepcopy(training.state())
        for group in state["optimizer"]["param_groups"]:
            if change == "rate":
                del group["lr"]
            elif change == "zero rate":
                group["lr"] = 0.0
        if change == "moments":
            for kept in state["optimizer"]["state"].values():
                kept["exp_avg"].zero_()
        if change == "finite":
            for name in WEIGHTS:
                state["model"][name][3, 3] = float("nan")
        return state

    for change in ("rate", "zero rate", "moments", "finite"):
        store, state = SnapshotStore(tmp_path / change, "standard"), without(change)
        store.save(1, state)
        assert _bounds(store, 1) == {}
        for name in WEIGHTS:
            assert_same(state["model"][name], store.load(1)["model"][name])
        store.save(2, state)  # nothing changed since
        assert _bounds(store, 2) == {}
        for name in WEIGHTS:
            assert_same(state["model"][name], store.load(2)["model"][name])


@pytest.mark.parametrize("step", [1e-30, 1e-4, 0.37, 1e30])
def test_steps_come_back_within_half_of_one(step: float) -> None:
    random = np.random.default_rng(0)
    values = (random.normal(0, 300, 5000) * step).astype(np.float32)
    values[:4] = [0.0, -0.0, step * (1 << 19), -step * (1 << 19)]
    coded = encode_in_steps(HostTensor("w", "float32", (50, 100), values.view(np.uint8)), step)
    assert coded is not None and coded.bound is not None and coded.reconstruction is not None
    back = decode_chunk(coded.header, coded.side, coded.chunks[0], 0, 5000, [])
    assert back.tobytes() == coded.reconstruction.tobytes()
    error = np.abs(back.view(np.float32).astype(np.float64) - values)
    assert (error <= 0.5001 * step + 1.2e-7 * np.abs(values)).all() and coded.bound["error"] <= 0.5001 * step
    assert 8 * len(coded.chunks[0]) / 5000 < 11.6  # log2(300 sqrt(2 pi e)) is 10.3, and there are tables


@pytest.mark.parametrize("value", [np.inf, np.nan, 3e38])
def test_what_steps_do_not_reach_is_left_to_others(value: float) -> None:
    values = np.array([1, 2, value], np.float32)
    assert encode_in_steps(HostTensor("w", "float32", (3,), values.view(np.uint8)), 1e-3) is None


def test_forged_steps_are_refused() -> None:
    coded = encode_in_steps(HostTensor("w", "float32", (99,), np.ones(99, np.float32).view(np.uint8)), 0.25)
    assert coded is not None
    for dtype, step in (("int32", 0.25), ("float32", 0.0), ("float32", -1), ("float32", "x"), ("float32", None)):
        header = replace(coded.header, dtype=dtype, settings={"base": "none", "step": step})
        with pytest.raises(ValueError, match="steps of"):
            decode_chunk(header, b"", coded.chunks[0], 0, 99, [])


def test_unchanged_weights_cost_next_to_nothing(tmp_path: Path) -> None:
    training, store = Training(), SnapshotStore(tmp_path, "standard")
    training.step(5)
    store.save(1, training.state())
    training.load(store.load(1))
    training.optimizer.param_groups[0]["lr"] = 0.0
    assert torch.equal(training.model["wide"].weight, store.load(1)["model"]["wide.weight"])
    store.save(2, training.state())
    stored = {tensor.name: tensor for tensor in store.info(2).tensors}["model/wide.weight"]
    assert stored.stored_bytes < 0.02 * stored.raw_bytes
    assert_same(training.state()["model"]["wide.weight"], store.load(2)["model"]["wide.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learning_rate_may_be_a_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    """As compiled and capturable optimizers have it."""
    training, bounds = Training(), []
    training.step(20)
    for number, rate in enumerate((3e-3, torch.tensor(3e-3, dtype=dtype))):
        for group in training.optimizer.param_groups:
            group["lr"] = rate
        store = SnapshotStore(tmp_path / str(number), "standard", threads=1)
        store.save(1, training.state())
        bounds.append(_require_kept(store, 1, training.state()))
    assert bounds[0].keys() == set(WEIGHTS)
    assert bounds[1] == pytest.approx(bounds[0], rel=1e-5)
