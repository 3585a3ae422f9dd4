"""Stopping and going on: the state through dictionaries, torch.save and torch.distributed.checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint

from commcomp import LowRank, Quantized
from commcomp.config import Method
from tests import ddp_training as t
from tests.ranks import run_ranks

METHODS = {
    "published": LowRank(rank=2),
    "alternating": LowRank(rank=2, rounds=1),
    "int8": LowRank(rank=2, rounds=1, factor_dtype="int8"),
}


def _parts(method: Method, cap: float = t.MANY, **options: Any) -> Any:
    module = t.Net()
    return module, *t.wrap(module, method, bucket_cap_mb=cap, **options)


def _first_half(rank: int, folder: str, method: LowRank, how: str, options: dict[str, Any], goes_on: int) -> Any:
    """Three steps (an odd number), save, then `goes_on` more as the uninterrupted run."""
    module, model, state = _parts(method, **options)
    t.train(model, rank, 3)
    everything = {"model": module.state_dict(), "gradient_sync": state.state_dict()}
    if how == "dcp":
        checkpoint.save(everything, checkpoint_id=folder)
    elif how == "async":
        future = checkpoint.async_save(everything, checkpoint_id=folder)
    else:
        torch.save(everything, f"{folder}/rank{rank}.pt")
    saved = t.residuals(state), t.warm_starts(state)
    history = t.train(model, rank, goes_on, first=3)
    if how == "async":  # the values saved are those at the call although training went on
        future.result()
    return history, *saved


def _second_half(rank: int, folder: str, method: LowRank, how: str, options: dict[str, Any], goes_on: int) -> Any:
    """A new process: load (before or after a first backward pass), then the same steps."""
    module, model, state = _parts(method, **options)
    everything = {"model": module.state_dict(), "gradient_sync": state.state_dict()}
    if how == "torch.save":
        everything = torch.load(f"{folder}/rank{rank}.pt", weights_only=True)
    else:
        checkpoint.load(everything, checkpoint_id=folder)
    module.load_state_dict(everything["model"])
    state.load_state_dict(everything["gradient_sync"])
    loaded = t.residuals(state), t.warm_starts(state)
    assert state.step == 3
    return t.train(model, rank, goes_on, first=3), *loaded


@pytest.mark.parametrize(
    ("method", "how", "cap", "residual_dtype"),
    [
        ("published", "dcp", t.ONE, "fp32"),
        ("published", "torch.save", t.MANY, "fp32"),
        ("published", "async", t.ONE, "bf16"),
        ("alternating", "dcp", t.MANY, "fp32"),
        ("alternating", "torch.save", t.ONE, "bf16"),
        ("int8", "dcp", t.MANY, "bf16"),
        ("int8", "dcp", t.ONE, "fp32"),
        ("int8", "async", t.MANY, "fp32"),
        ("published", "dcp", t.ONE, "int8"),
    ],
)
def test_a_resumed_run_gives_the_gradients_of_the_uninterrupted_one(
    tmp_path: Path, method: str, how: str, cap: float, residual_dtype: str
) -> None:
    options = {"cap": cap, "residual_dtype": residual_dtype}
    before = run_ranks(_first_half, 2, str(tmp_path), METHODS[method], how, options, 4)
    after = run_ranks(_second_half, 2, str(tmp_path), METHODS[method], how, options, 4)
    for rank, ((old, *saved), (new, *loaded)) in enumerate(zip(before, after, strict=True)):
        for was, now in zip(saved, loaded, strict=True):
            assert was.keys() == now.keys()
            assert all(torch.equal(was[name], now[name]) for name in was), f"rank {rank} got other values back"
        for step, (left, right) in enumerate(zip(old, new, strict=True)):
            # the resumed process has other buckets in its first step, hence other batches: equal to rounding there
            t.assert_close(right, left, 1e-5 if step == 0 else 1e-3)
    name = "layers.1.weight"
    assert not torch.equal(before[0][1][name], before[1][1][name]), "ranks' residuals should differ"


def _bit_equal(rank: int, folder: str, method: Method, resumed: bool) -> Any:
    """find_unused_parameters keeps the first buckets for good, so both runs have the same ones."""
    module, model, state = _parts(method, ddp={"find_unused_parameters": True})
    if resumed:
        everything = {"model": module.state_dict(), "gradient_sync": state.state_dict()}
        checkpoint.load(everything, checkpoint_id=folder)
        module.load_state_dict(everything["model"])
        state.load_state_dict(everything["gradient_sync"])
    else:
        t.train(model, rank, 3)
        checkpoint.save({"model": module.state_dict(), "gradient_sync": state.state_dict()}, checkpoint_id=folder)
    return t.train(model, rank, 3, first=3)


@pytest.mark.parametrize("method", [LowRank(rank=2), Quantized(bits=4, rounding="stochastic")], ids=str)
def test_with_equal_buckets_a_resumed_run_is_equal_to_the_bit(tmp_path: Path, method: Method) -> None:
    before = run_ranks(_bit_equal, 2, str(tmp_path), method, False)
    after = run_ranks(_bit_equal, 2, str(tmp_path), method, True)
    for left, right in zip(before[0] + before[1], after[0] + after[1], strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)


def _unmoved(rank: int, folder: str) -> Any:
    """Gradients of fixed weights in six steps; the state is saved after three."""
    _, model, state = _parts(LowRank(rank=1, rounds=1))
    history = []
    for step in range(6):
        model.zero_grad()
        t.backward(model, t.inputs(rank, step))
        history.append(t.gradients(model))
        if step == 2:
            torch.save(state.state_dict(), f"{folder}/rank{rank}.pt")
            checkpoint.save({"gradient_sync": state.state_dict()}, checkpoint_id=folder)
    return history


@pytest.mark.parametrize("how", ["load_state_dict", "restore"])
def test_loading_after_steps_of_its_own_replaces_everything(tmp_path: Path, how: str) -> None:
    reference = run_ranks(_unmoved, 2, str(tmp_path))
    for wanted, (got, step) in zip(reference, run_ranks(_rewound, 2, str(tmp_path), how), strict=True):
        assert step == 6
        for left, right in zip(got, wanted[3:], strict=True):
            t.assert_close(left, right, 1e-4)


def _rewound(rank: int, folder: str, how: str) -> Any:
    """Five steps on other data (buckets rebuilt, residuals bound), then the saved state and steps 3 to 5 again."""
    _, model, state = _parts(LowRank(rank=1, rounds=1))
    for step in range(5):
        t.backward(model, t.inputs(rank, 100 + step))
        model.zero_grad()
    if how == "restore":
        state.restore(folder)
    else:
        state.load_state_dict(torch.load(f"{folder}/rank{rank}.pt", weights_only=True))
    history = []
    for step in range(3, 6):
        model.zero_grad()
        t.backward(model, t.inputs(rank, step))
        history.append(t.gradients(model))
    return history, state.step


def _save(rank: int, folder: str, method: LowRank, steps: int) -> Any:
    _, model, state = _parts(method)
    t.train(model, rank, steps)
    checkpoint.save({"gradient_sync": state.state_dict()}, checkpoint_id=folder)
    return t.residuals(state), t.warm_starts(state), state.step


def _restore(rank: int, folder: str, method: LowRank, before_first_step: bool) -> Any:
    _, model, state = _parts(method)
    if not before_first_step:
        t.train(model, rank, 2)
    state.restore(folder)
    outcome = t.residuals(state), t.warm_starts(state), state.step
    t.train(model, rank, 2)  # ranks agree on what comes next, or this hangs
    return *outcome, state.step


@pytest.mark.parametrize("before_first_step", [True, False], ids=["fresh", "used"])
@pytest.mark.parametrize(("old", "new"), [(2, 1), (2, 2), (2, 3), (2, 4), (3, 2), (4, 1)])
def test_another_number_of_ranks_keeps_the_mean_of_the_residuals(
    tmp_path: Path, old: int, new: int, before_first_step: bool
) -> None:
    method = METHODS["int8"]
    saved = run_ranks(_save, old, str(tmp_path), method, 3)
    restored = run_ranks(_restore, new, str(tmp_path), method, before_first_step)
    for name, value in saved[0][0].items():
        owed = t.mean_of([residuals[name] for residuals, _, _ in saved])
        kept = t.mean_of([residuals[name] for residuals, *_ in restored])
        assert value.norm() > 0
        assert (owed - kept).abs().max() < 1e-6 * owed.abs().max().clamp_min(1e-3)
    for _, warm, step, later in restored:
        assert (step, later) == (3, 5)
        assert warm.keys() == saved[0][1].keys()
        assert all(torch.equal(value, saved[0][1][key]) for key, value in warm.items())
    if old == new:
        for (was, _, _), (now, *_) in zip(saved, restored, strict=True):
            assert all(torch.equal(was[name], now[name]) for name in was)


def _save_mean(rank: int, path: str, method: LowRank) -> Any:
    _, model, state = _parts(method)
    t.train(model, rank, 3)
    before = t.residuals(state)
    saved = state.state_dict(mean_residual=True)
    if rank == 0:
        torch.save(saved, path)
    after = t.residuals(state)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    return before, saved


def _load_mean(rank: int, path: str, method: LowRank) -> Any:
    _, model, state = _parts(method)
    state.load_state_dict(torch.load(path, weights_only=True))
    residuals = t.residuals(state)
    t.train(model, rank, 2)
    return residuals, state.step


@pytest.mark.parametrize("new", [1, 2, 3])
def test_the_mean_residual_in_the_file_of_one_rank_serves_any_number(tmp_path: Path, new: int) -> None:
    method, path = METHODS["int8"], f"{tmp_path}/state.pt"
    saved = run_ranks(_save_mean, 2, path, method)
    first, second = (state for _, state in saved)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert {key.partition("/")[0] for key in first if "/residual/" in key} == {"rank_0"}
    for residuals, step in run_ranks(_load_mean, new, path, method):
        assert step == 5 and residuals
        for name, value in residuals.items():
            owed = t.mean_of([own[name] for own, _ in saved])
            assert owed.norm() > 0 and torch.allclose(value.double(), owed, rtol=1e-5, atol=1e-7)


def _before_the_first_step(rank: int) -> Any:
    _, model, state = _parts(METHODS["alternating"])
    empty = {key: value.clone() for key, value in state.state_dict().items()}
    history = t.train(model, rank, 3)
    _, other, again = _parts(METHODS["alternating"])
    again.load_state_dict(empty)
    return history, t.train(other, rank, 3), empty


def test_the_state_before_the_first_step_is_whole() -> None:
    for rank, (plain, loaded, empty) in enumerate(run_ranks(_before_the_first_step, 2)):
        assert int(empty["step"]) == 0 and int(empty["num_ranks"]) == 2
        assert {key for key in empty if key.startswith("rank_")} == {
            f"rank_{rank}/residual/{name}.weight" for name in ("head", *(f"layers.{i}" for i in range(4)))
        }
        assert all(isinstance(value, torch.Tensor) for value in empty.values())
        for left, right in zip(plain, loaded, strict=True):
            assert all(torch.equal(left[name], right[name]) for name in left)


def _changed_rank(rank: int, old: int, new: int, rounds: int) -> Any:
    _, model, state = _parts(LowRank(rank=old, rounds=rounds))
    t.train(model, rank, 3)
    saved = {key: value.clone() for key, value in state.state_dict().items()}
    _, other, again = _parts(LowRank(rank=new, rounds=rounds))
    again.load_state_dict(saved)
    loaded = {key: value.clone() for key, value in again.state_dict().items()}
    t.train(other, rank, 1)
    return saved, loaded, again.step


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize(("old", "new"), [(1, 3), (3, 1)])
def test_another_rank_keeps_the_residual_and_the_leading_columns(old: int, new: int, rounds: int) -> None:
    for saved, loaded, step in run_ranks(_changed_rank, 2, old, new, rounds):
        assert step == 4
        for key, value in loaded.items():
            if "residual" in key:
                assert torch.equal(value, saved[key])
            elif key.startswith("warm_"):
                common = min(old, new)
                assert len(value) == new
                assert torch.equal(value[:common], saved[key][:common])
                assert torch.linalg.matrix_rank(value) == new


def _unscaled(rank: int, to_scaler: bool) -> Any:
    """A state kept at loss scale 1024, moved to a run with a scale of 64 or without any; what is owed there."""
    module = t.Net()
    ledger = t.Ledger(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, state = t.wrap(module, LowRank(rank=1), grad_scaler=scaler)
    ledger.expect(t.inputs(rank, 0))
    scaler.scale(t.loss_of(model(t.inputs(rank, 0)))).backward()
    for parameter in model.parameters():
        parameter.grad /= 1024
    ledger.receive(model)
    assert state.loss_scale == 1024 == float(state.state_dict()["loss_scale"])
    scale = 64.0 if to_scaler else 1.0
    other = torch.amp.GradScaler("cpu", init_scale=scale) if to_scaler else None
    model, moved = t.wrap(t.Net(), LowRank(rank=1), grad_scaler=other)
    moved.load_state_dict(state.state_dict())
    for step in range(1, 3):
        ledger.expect(t.inputs(rank, step))
        t.backward(model, t.inputs(rank, step), factor=scale)
        if to_scaler:
            other.scale(torch.ones(()))
        for parameter in model.parameters():
            parameter.grad /= scale
        ledger.receive(model)
    account = ledger.account(moved)
    account["residual"] = {name: value / scale for name, value in account["residual"].items()}
    return account


@pytest.mark.parametrize("to_scaler", [True, False], ids=["another scale", "no scaler"])
def test_a_state_saved_under_a_loss_scale_is_owed_the_same_elsewhere(to_scaler: bool) -> None:
    t.assert_conserved(run_ranks(_unscaled, 2, to_scaler))
