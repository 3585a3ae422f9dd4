"""The lossless mode on states of real optimizers: every bit back, and the models that are meant to serve do."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commcomp.checkpoint import SnapshotStore
from commcomp.checkpoint.codec import float_tensor, matrices
from tests.checkpoint.codec.training import Training
from tests.checkpoint.states import assert_same


def _methods(store: SnapshotStore, step: int) -> dict[str, str]:
    """By name, what each tensor was coded by."""
    with store._files.open(step) as chain:
        headers = [tensor.header for tensor in chain[0].tensors.values()]
    return {header.name: header.settings.get("center", header.method) for header in headers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [("AdamW", {}), ("Adam", {"amsgrad": True}), ("SGD", {"momentum": 0.9}), ("RMSprop", {})],
)
def test_every_bit_comes_back_at_all_intervals(
    tmp_path: Path, optimizer: str, options: dict[str, float], dtype: torch.dtype
) -> None:
    training = Training(optimizer, dtype, **options)
    store, steps = SnapshotStore(tmp_path, threads=2), [10, 11, 20]
    done = 0
    for step in steps:
        training.step(step - done)
        done = step
        store.save(step, training.state())
        assert_same(training.state(), store.load(step))
    again = SnapshotStore(tmp_path)
    training = Training(optimizer, dtype, **options)
    done = 0
    for step in steps:
        training.step(step - done)
        done = step
        assert_same(training.state(), again.load(step))


def test_one_step_of_adam_is_replayed_and_longer_ones_are_modelled(tmp_path: Path) -> None:
    training, store = Training(), SnapshotStore(tmp_path, threads=1)
    training.step(50)
    reports = [store.save(50, training.state())]
    training.step(1)
    reports.append(store.save(51, training.state()))
    training.step(30)
    reports.append(store.save(81, training.state()))
    kinds = {step: Counter(_methods(store, step).values()) for step in (50, 51, 81)}
    assert kinds[50]["first growth"] >= 3
    assert kinds[51]["squared"] >= 3 and kinds[51]["adam"] >= 3 and kinds[51]["decayed"] >= 3, kinds[51]
    assert kinds[81]["previous"] >= 3 and kinds[81]["growth"] >= 3, kinds[81]
    assert reports[1].ratio > 2.5 and reports[0].ratio > 1.05 and reports[2].ratio > 1.1, [r.ratio for r in reports]


def test_amsgrads_largest_second_moment_is_told_by_what_it_was_and_the_second(tmp_path: Path) -> None:
    training, store = Training("AdamW", amsgrad=True), SnapshotStore(tmp_path, threads=1)
    training.step(50)
    store.save(50, training.state())
    training.step(1)
    store.save(51, training.state())
    training.step(30)
    store.save(81, training.state())
    for step, center in ((50, "second"), (51, "largest"), (81, "largest")):
        methods = _methods(store, step)
        assert [methods[f"optimizer/state/{n}/max_exp_avg_sq"] for n in range(3)] == [center] * 3, methods
    stored = {tensor.name: tensor.raw_bytes / max(1, tensor.stored_bytes) for tensor in store.info(51).tensors}
    for name in ("model/wide.weight", "optimizer/state/1/max_exp_avg_sq"):
        assert stored[name] > 10, stored  # whose root divides the step is replayed too
    assert_same(training.state(), store.load(81))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moving_averages_go_on_towards_their_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    training, store = Training(dtype=dtype), SnapshotStore(tmp_path, threads=2, verify_saves=True)
    averages = {name: value.float().clone() for name, value in training.model.state_dict().items()}
    second = copy.deepcopy(averages)
    for step in range(1, 82):
        training.step(1)
        for name, value in training.model.state_dict().items():
            averages[name].lerp_(value.float(), 0.01)
            second[name].lerp_(value.float(), 0.1)
        if step in (50, 51, 81):
            state = {**training.state(), "ema": {"slow": averages}, "swa": second}
            store.save(step, state)
            assert_same(state, store.load(step))
    name = "narrow.weight"
    of_one_step = {tensor.name: tensor.raw_bytes / max(1, tensor.stored_bytes) for tensor in store.info(51).tensors}
    for average in (f"ema/slow/{name}", f"swa/{name}"):
        assert [_methods(store, step)[average] for step in (51, 81)] == ["average"] * 2
        assert of_one_step[average] > 8, of_one_step
    with store._files.open(50) as chain:
        inputs = chain[0].tensors[f"swa/{name}"].header.inputs
    assert [source.tensor for source in inputs] == ([f"model/{name}"] if dtype == torch.float32 else [])


def test_averages_of_weights_that_stay_or_change_their_shape_come_back(tmp_path: Path) -> None:
    training, store = Training(), SnapshotStore(tmp_path, threads=1)
    training.step(3)
    state = training.state()
    state["ema"] = {name: value + 1e-3 * torch.randn_like(value) for name, value in state["model"].items()}
    store.save(1, state)
    state["ema"] = {name: value + 1e-4 * torch.randn_like(value) for name, value in state["ema"].items()}
    store.save(2, state)  # the weights are as they were
    assert_same(state, store.load(2))
    state["model"] = dict(state["model"], **{"wide.weight": torch.randn(160, 50)})
    state["model"]["narrow.weight"] = torch.full((48, 160), float("nan"))
    state["ema"] = {name: value * 1.01 for name, value in state["ema"].items()}
    store.save(3, state)
    assert_same(state, store.load(3))


def _with_steps(state: dict[str, Any], where: str) -> dict[str, Any]:
    """The step counts as other optimizers than torch's keep them."""
    optimizer = {
        "state": {key: dict(moments) for key, moments in state["optimizer"]["state"].items()},
        "param_groups": [dict(group) for group in state["optimizer"]["param_groups"]],
    }
    for key, moments in optimizer["state"].items():
        count = int(moments.pop("step"))
        if where == "state":
            moments["step"] = count
        elif where == "numpy":
            moments["step"] = np.int64(count)
        else:
            group = next(group for group in optimizer["param_groups"] if key in group["params"])
            group["step"] = count if where == "group" else torch.tensor(count)
    return {**state, "optimizer": optimizer}


@pytest.mark.parametrize("keep_reference", [True, False])
@pytest.mark.parametrize("where", ["state", "numpy", "group", "tensor of the group"])
def test_steps_are_counted_wherever_optimizers_keep_them(tmp_path: Path, where: str, keep_reference: bool) -> None:
    training = Training()
    store = SnapshotStore(tmp_path, threads=1, keep_reference=keep_reference)
    for step in (50, 51, 81):
        training.step(step - (store.steps() or [0])[-1])
        state = _with_steps(training.state(), where)
        report = store.save(step, state)
        assert_same(state, store.load(step))
        kinds = Counter(_methods(store, step).values())
        if step == 51:
            assert kinds["squared"] >= 3 and kinds["adam"] >= 3 and kinds["decayed"] >= 3, kinds
            assert report.ratio > 2.5
        if step == 81:
            assert kinds["growth"] >= 3, kinds


def test_steps_may_move_between_snapshots_and_be_no_numbers(tmp_path: Path) -> None:
    training, store = Training(), SnapshotStore(tmp_path, threads=1)
    training.step(50)
    store.save(50, training.state())
    training.step(1)
    state = _with_steps(training.state(), "group")
    store.save(51, state)
    assert "adam" in _methods(store, 51).values()
    for step, strange in ((52, 10**400), (53, float("nan")), (54, True), (55, "53")):
        for group in state["optimizer"]["param_groups"]:
            group["step"] = strange
        store.save(step, state)
        assert_same(state, store.load(step))


def test_each_parameter_has_the_steps_of_its_own_group(tmp_path: Path) -> None:
    training, store = Training(), SnapshotStore(tmp_path, threads=1)
    for step in (50, 51):
        training.step(50 if step == 50 else 1)
        state = _with_steps(training.state(), "group")
        state["optimizer"]["param_groups"].insert(0, {"params": [99], "step": 7 * step, "betas": (0.5, 0.6)})
        store.save(step, state)
    assert Counter(_methods(store, 51).values())["adam"] >= 3


def test_files_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    for threads in (1, 4):
        training, store = Training(), SnapshotStore(tmp_path / str(threads), threads=threads)
        for step in (5, 6, 20):
            training.step(1)
            store.save(step, training.state())
    for step in (5, 6, 20):
        name = f"step-{step:012d}.ccsnap"
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "4" / name).read_bytes()


def test_strange_values_and_changed_shapes_do_no_harm(tmp_path: Path) -> None:
    training, store = Training(), SnapshotStore(tmp_path, threads=1)
    training.step(3)
    store.save(3, training.state())
    training.step(1)
    state = training.state()
    moments = state["optimizer"]["state"]
    moments[0]["exp_avg_sq"][::3] = 0
    moments[0]["exp_avg"][1] = float("nan")
    moments[1]["exp_avg"] = torch.zeros_like(moments[1]["exp_avg"])
    moments[1]["exp_avg_sq"] = torch.zeros_like(moments[1]["exp_avg_sq"])
    moments[2]["exp_avg_sq"] = moments[2]["exp_avg_sq"][:5]
    state["model"]["norm.bias"] = torch.full((48,), -0.0)
    state["model"]["extra"] = torch.randn(7, 5, 3)
    store.save(4, state)
    assert_same(state, store.load(4))
    store.save(5, state)
    assert_same(state, store.load(5))
    assert store.verify() == []


def test_large_tensors_are_cut_into_chunks_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "CHUNK_VALUES", 700)
    training, store = Training(), SnapshotStore(tmp_path, threads=2)
    for step in (2, 3, 9):
        training.step(step - 2 or 1)
        store.save(step, training.state())
        assert_same(training.state(), store.load(step))
    whole = training.state()["optimizer"]["state"][1]["exp_avg"].flatten()
    assert torch.equal(store.load_tensor(9, "optimizer/state/1/exp_avg", 1234, 5678), whole[1234:5678])


@pytest.mark.parametrize("saved_with", [False, True])
def test_files_do_not_depend_on_how_denormals_are_treated(tmp_path: Path, saved_with: bool) -> None:
    training = Training()
    states = []
    for _ in range(3):
        training.step(1)
        state = copy.deepcopy(training.state())
        for moments in state["optimizer"]["state"].values():
            moments["exp_avg_sq"] *= 1e-35
            moments["exp_avg"] *= 1e-33
        states.append(state)
    try:
        torch.set_flush_denormal(saved_with)
        store = SnapshotStore(tmp_path, threads=2, verify_saves=True)
        for step, state in enumerate(states):
            store.save(step, state)
        still = float(torch.tensor(2.0**-140) * 1.0)
        torch.set_flush_denormal(not saved_with)
        loaded = [SnapshotStore(tmp_path).load(step) for step in range(3)]
    finally:
        torch.set_flush_denormal(False)
    assert (still == 0) == saved_with  # the caller's setting is as it was
    for state, back in zip(states, loaded):
        assert_same(state, back)


def test_moments_of_another_dtype_than_the_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for shape in ((33, 33), (48, 64)):
        weight, store = torch.randn(shape), SnapshotStore(tmp_path / str(shape[0]), threads=1)
        for step in (1, 2):  # one step apart, which is replayed
            moments = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.randn(shape).bfloat16(),
                "exp_avg_sq": torch.rand(shape).bfloat16(),
            }
            groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "params": [0]}]
            state = {"model": {"w": weight * step}, "optimizer": {"state": {0: moments}, "param_groups": groups}}
            store.save(step, state)
            assert_same(state, store.load(step))


def test_long_vectors_are_decoded_in_linear_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked = []
    real = float_tensor.unpack_side
    monkeypatch.setattr(float_tensor, "unpack_side", lambda *given: unpacked.append(1) or real(*given))
    monkeypatch.setattr(matrices, "CHUNK_VALUES", 1000)
    state = {"flat": torch.randn(20_001)}
    store = SnapshotStore(tmp_path, threads=2)
    store.save(1, state)
    assert_same(state, store.load(1))
    assert 1 <= len(unpacked) <= 2  # of 21 chunks; both threads may begin at once
