"""The lossy modes: bounds that are declared and kept, second moments above 0, and runs that go on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from commcomp.checkpoint import SnapshotStore
from commcomp.checkpoint.codec.lossy import QUALITIES, LossyEncoder
from tests.checkpoint.codec.bounds import require_within
from tests.checkpoint.codec.training import Training
from tests.checkpoint.states import assert_same

MODES = ("cautious", "standard", "compact")


def _leaves(state: Any, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return {path: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {name: leaf for key, item in items for name, leaf in _leaves(item, f"{path}/{key}".lstrip("/")).items()}


def _bounds(store: SnapshotStore, step: int) -> dict[str, dict[str, Any]]:
    with store._files.open(step) as chain:
        headers = [tensor.header for tensor in chain[0].tensors.values()]
    return {header.name: dict(header.bound) for header in headers if header.bound is not None}


def _require_bounds(store: SnapshotStore, step: int, state: Any) -> None:
    bounds, given, loaded = _bounds(store, step), _leaves(state), _leaves(store.load(step))
    assert len(bounds) == 9, bounds  # three matrices with their moments; vectors and counters are exact
    assert given.pop("model/head.weight") is not None  # the embedding once more
    for name, value in given.items():
        other = loaded[name]
        if name not in bounds:
            assert_same(value, other)
            continue
        require_within(name, bounds[name], value, other, loaded.get(name.replace("exp_avg", "exp_avg_sq")))


@pytest.mark.parametrize("mode", MODES)
def test_declared_bounds_hold_along_a_chain_and_after_reopening(tmp_path: Path, mode: str) -> None:
    training, store = Training(), SnapshotStore(tmp_path, mode=mode, keyframe_every=5, threads=2)
    reports = []
    for step in range(1, 9):
        training.step(10)
        if step == 4:
            store = SnapshotStore(tmp_path, mode=mode, keyframe_every=5, threads=1)
        reports.append(store.save(10 * step, training.state()))
        _require_bounds(store, 10 * step, training.state())
    assert [report.keyframe for report in reports] == [True] + [False] * 4 + [True] + [False] * 2
    assert store.verify() == []
    least = {"cautious": 5, "standard": 7, "compact": 8}[mode]  # of so small matrices much is headers
    assert all(report.ratio > least for report in reports[1:5]), [report.ratio for report in reports]


def test_second_moments_of_zero_and_strange_values_come_back_as_promised(tmp_path: Path) -> None:
    training, store = Training(), SnapshotStore(tmp_path, mode="standard")
    training.step(5)
    state = training.state()
    moments = state["optimizer"]["state"]
    moments[0]["exp_avg_sq"][:7] = 0
    moments[0]["exp_avg"][:7] = 0
    moments[1]["exp_avg"][3, 5] = float("nan")
    moments[1]["exp_avg_sq"][2, 2] = float("inf")
    state["model"]["wide.weight"][9, 1] = float("-inf")
    state["model"]["wide.weight"][9, 2] = 1e30
    for step in (5, 6):
        store.save(step, state)
        loaded = store.load(step)
        back = loaded["optimizer"]["state"]
        assert (back[0]["exp_avg_sq"] > 0).all() and back[0]["exp_avg_sq"][:7].max() < 1e-30
        assert (back[0]["exp_avg"][:7] == 0).all()
        assert math.isnan(back[1]["exp_avg"][3, 5]) and back[1]["exp_avg_sq"][2, 2] == float("inf")
        assert loaded["model"]["wide.weight"][9, 1] == float("-inf")
        assert loaded["model"]["wide.weight"][9, 2] == torch.tensor(1e30)


def _restored_loss(path: Path, **settings: Any) -> float:
    """Of a run that is restored four times on the way, early enough to be far from its end."""
    training, store = Training(), SnapshotStore(path, **settings)
    recent = []
    for step in range(1, 6):
        training.step(4)
        recent = [training.step(1) for _ in range(4)]
        store.save(step, training.state())
        training.load(store.load(step))
    return sum(recent) / len(recent)


def test_training_goes_on_from_what_was_kept(tmp_path: Path) -> None:
    losses = {mode: _restored_loss(tmp_path / mode, mode=mode) for mode in ("lossless", *MODES)}
    right = losses["lossless"]
    assert right > 0.5
    assert losses["cautious"] < 1.15 * right and losses["standard"] < 1.15 * right, losses
    assert losses["compact"] < 2 * right, losses
    for wrong in ({"weight": 6.0}, {"first": 30.0}):  # what such losses would tell
        encoder = LossyEncoder(replace(QUALITIES["standard"], components=0, **wrong))
        assert _restored_loss(tmp_path / str(wrong), encoder=encoder) > 3 * right


def test_values_beyond_all_bounds_are_kept_as_they_are(tmp_path: Path) -> None:
    training, store = Training(), SnapshotStore(tmp_path, mode="standard", threads=1)
    training.step(3)
    store.save(1, training.state())
    training.step(3)
    state = training.state()
    first, second = "optimizer/state/1/exp_avg", "optimizer/state/1/exp_avg_sq"
    kept = {"model/wide.weight": 3.4e38, first: math.inf}
    leaves = _leaves(state)
    for name, value in {**kept, second: 2.0**127}.items():
        leaves[name][3, 5] = value
    store.save(2, state)
    loaded = _leaves(store.load())
    for name, value in kept.items():
        assert float(loaded[name][3, 5]) == pytest.approx(value), name
    assert abs(math.log2(float(loaded[second][3, 5])) - 127) < 2.5


def test_a_change_that_is_no_number_of_steps_comes_back(tmp_path: Path) -> None:
    training, store = Training(), SnapshotStore(tmp_path, mode="standard", threads=1)
    training.step(3)
    state = training.state()
    state["model"]["wide.weight"][0, 0] = 0.0
    store.save(1, state)
    first = store.load()
    again = {**first, "model": {key: value.clone() for key, value in first["model"].items()}}
    again["model"]["wide.weight"][0, 0] += 1e-44
    store.save(2, again)
    assert_same(store.load(2)["model"]["wide.weight"], again["model"]["wide.weight"])


def test_a_rate_that_is_no_measure_of_weights_does_not_wipe_them_out(tmp_path: Path) -> None:
    training, store = Training(), SnapshotStore(tmp_path, mode="compact", threads=1)
    training.step(3)
    for group in training.optimizer.param_groups:
        group["lr"] = 1.0  # as Prodigy has it
    state = training.state()
    store.save(1, state)
    loaded = store.load()
    for name in ("embedding.weight", "wide.weight"):
        given = state["model"][name]
        assert (loaded["model"][name] - given).pow(2).mean().sqrt() < 0.02 * given.std(), name


@pytest.mark.parametrize("mode", ["lossless", "standard"])
def test_the_coder_max_gives_smaller_files_of_the_same_state(tmp_path: Path, mode: str) -> None:
    training = Training()
    stores = {coder: SnapshotStore(tmp_path / coder, mode=mode, threads=2, coder=coder) for coder in ("fast", "max")}
    for step in (1, 2):
        training.step(5)
        saved = {coder: store.save(step, training.state()) for coder, store in stores.items()}
    assert saved["max"].bytes < saved["fast"].bytes
    assert_same(stores["max"].load(), stores["fast"].load())
    assert SnapshotStore(tmp_path / "max").verify() == []
    with pytest.raises(ValueError, match="coder='best'; expected one of 'fast', 'max'"):
        SnapshotStore(tmp_path / "other", coder="best")


def test_a_delta_takes_over_the_memory_of_its_parent(tmp_path: Path) -> None:
    """What is kept for the next save is as large as the state; after a save that failed the store knows what is."""
    training, store = Training(), SnapshotStore(tmp_path, mode="standard", threads=2)
    kept: list[dict[str, int]] = []
    for step in (5, 10, 15):
        training.step(5)
        report = store.save(step, training.state())
        assert report.kept_bytes == report.raw_bytes
        reference = store._saver._reference
        assert reference is not None and reference.is_whole
        kept.append({name: array.ctypes.data for name, array in reference.arrays.items()})
    assert kept[0] == kept[1] == kept[2]
    loaded = _leaves(store.load(15))
    for name, array in reference.arrays.items():
        assert array.tobytes() == loaded[name].numpy().tobytes(), name


def test_after_a_save_that_failed_the_parent_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, store = Training(), SnapshotStore(tmp_path, mode="standard", threads=1)
    training.step(5)
    store.save(5, training.state())
    training.step(5)
    with monkeypatch.context() as patched:
        patched.setattr("commcomp.checkpoint.container_writer.os.fsync", _full)
        with pytest.raises(OSError, match="store is as before"):
            store.save(10, training.state())
    assert store.steps() == [5]
    assert not store.save(10, training.state()).keyframe
    _require_bounds(store, 10, training.state())
    assert store.verify() == []


@pytest.mark.parametrize("mode", MODES)
def test_amsgrads_largest_second_moment_is_bounded_and_goes_on(tmp_path: Path, mode: str) -> None:
    training, store = Training(amsgrad=True), SnapshotStore(tmp_path, mode=mode, keyframe_every=3, threads=1)
    for step in range(1, 6):
        training.step(10)
        report = store.save(step, training.state())
        given, loaded, bounds = _leaves(training.state()), _leaves(store.load(step)), _bounds(store, step)
        for number in range(3):
            name = f"optimizer/state/{number}/max_exp_avg_sq"
            share = bounds[name]["error"] / bounds[name.replace("max_", "")]["error"]
            assert bounds[name]["kind"] == "octaves" and share == pytest.approx(0.25)
            assert (loaded[name] > 0).all()
            require_within(name, bounds[name], given[name], loaded[name], None)
    assert store.verify() == [] and report.ratio > 6
    loss = training.step(40)
    training.load(store.load())
    assert training.step(40) < 1.1 * loss + 0.05


def test_a_largest_second_moment_of_zero_or_another_shape_does_no_harm(tmp_path: Path) -> None:
    training, store = Training(amsgrad=True), SnapshotStore(tmp_path, mode="standard", threads=1)
    training.step(5)
    state = training.state()
    moments = state["optimizer"]["state"]
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        moments[0][name][:7] = 0
    moments[1]["max_exp_avg_sq"] = moments[1]["max_exp_avg_sq"][:40].clone()
    moments[2]["exp_avg_sq"] = moments[2]["exp_avg_sq"][:20].clone()
    for step in (1, 2):
        store.save(step, state)
        back = store.load(step)["optimizer"]["state"]
        assert back[0]["max_exp_avg_sq"][:7].min() > 0 and back[0]["max_exp_avg_sq"][:7].max() < 1e-30
        for number, name in ((1, "max_exp_avg_sq"), (2, "exp_avg_sq"), (2, "exp_avg")):
            assert_same(back[number][name], moments[number][name])


def _full(file: int) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("mode", MODES)
def test_sgd_with_momentum_is_lossy_too_and_goes_on(tmp_path: Path, mode: str) -> None:
    training, store = Training("SGD", momentum=0.9), SnapshotStore(tmp_path, mode=mode, threads=1)
    training.step(30)
    store.save(1, training.state())
    training.step(10)
    state = training.state()
    store.save(2, state)
    loaded, bounds = store.load(), _bounds(store, 2)
    momentum = {name: bound for name, bound in bounds.items() if name.endswith("momentum_buffer")}
    assert momentum and all(bound["kind"] == "even" for bound in bounds.values())
    given, found = _leaves(state), _leaves(loaded)
    for name, bound in bounds.items():
        error = (given[name] - found[name]).abs().max()
        assert 0 < error <= 1.001 * bound["error"], name
        if name in momentum:
            share = bound["error"] / given[name].double().std(unbiased=False)
            assert share == pytest.approx({"cautious": 0.2, "standard": 0.6, "compact": 0.8}[mode], rel=1e-3)
    loss = training.step(40)
    training.load(loaded)
    assert training.step(40) < 1.1 * loss + 0.05


def test_which_weight_moments_belong_to_is_not_guessed(tmp_path: Path) -> None:
    training = Training()
    training.step(5)
    state = training.state()
    moments = state["optimizer"]["state"][1]  # of wide.weight
    named = {"state": {"wide.weight": moments}, "param_groups": []}
    weight = state["model"]["wide.weight"]
    copy = weight + 1
    store = SnapshotStore(tmp_path / "average", mode="standard")
    for step in (1, 2):
        store.save(step, {"model": {"wide.weight": weight * step}, "ema": {"wide.weight": copy * step}, "o": named})
    bounds = _bounds(store, 2)
    assert "model/wide.weight" in bounds and "ema/wide.weight" not in bounds
    store = SnapshotStore(tmp_path / "two", mode="standard")
    for step in (1, 2):
        store.save(step, {"a": {"wide.weight": weight * step}, "b": {"wide.weight": copy * step}, "o": named})
    assert not any(name.endswith("wide.weight") for name in _bounds(store, 2))
    assert_same(store.load(2)["a"]["wide.weight"], weight * 2)


def test_pruning_keeps_what_lossy_snapshots_need_until_the_next_keyframe(tmp_path: Path) -> None:
    training, store = Training(), SnapshotStore(tmp_path, mode="standard", keyframe_every=3, threads=1)
    loaded = {}
    for step in range(1, 5):
        training.step(20)
        store.save(step, training.state())
        loaded[step] = store.load(step)
        before = sum(file.stat().st_size for file in tmp_path.iterdir())
        report = store.prune(keep=1)
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= before
        if step == 3:
            assert report.kept == (1, 2) and report.recoded == () and store.steps() == [1, 2, 3]
    assert report.removed == (1, 2, 3) and report.kept == () and store.steps() == [4]
    assert_same(store.load(4), loaded[4])
