"""States that do not fit: every one is named, and a refused state changes nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint

from commcomp import Dense, GradientSync, LowRank
from tests import ddp_training as t
from tests.ranks import run_ranks

NAME = "layers.1.weight"
OWN = f"rank_0/residual/{NAME}"


def _without(*keys: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key: value for key, value in state.items() if key not in keys}


def _with(**values: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {**state, **{key: torch.as_tensor(value) for key, value in values.items()}}


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], list[str]]] = {
    "no version": (_without("version"), ["version"]),
    "other version": (_with(version=99), ["version 99"]),
    "no step": (_without("step"), ["step"]),
    "no num_ranks": (_without("num_ranks"), ["num_ranks"]),
    "empty": (lambda state: {}, ["version"]),
    "residual missing": (_without(OWN), [NAME]),
    "only the other rank's residual": (
        lambda state: {key.replace("rank_0/", "rank_1/"): value for key, value in _with(num_ranks=2)(state).items()},
        ["rank_0/residual/", "restore"],
    ),
    "saved on two ranks, one given": (_with(num_ranks=2), ["rank_1/residual/", "restore"]),
    "misshapen": (lambda state: {**state, OWN: torch.zeros(3, 5)}, [NAME, "(3, 5)"]),
    "transposed": (
        lambda state: {**state, "rank_0/residual/head.weight": state["rank_0/residual/head.weight"].t().contiguous()},
        ["head.weight", f"({t.WIDTH}, {t.CLASSES})"],
    ),
    "unknown parameter": (lambda state: {**state, "rank_0/residual/ghost": torch.ones(2, 2)}, ["ghost", "model"]),
    "now dense": (
        lambda state: {**state, "rank_0/residual/norm.weight": torch.ones(t.WIDTH, 1)},
        ["norm.weight", "dense"],
    ),
}


def _load_damaged(rank: int) -> dict[str, Any]:
    module = t.Net()
    model, state = t.wrap(module)
    t.train(model, rank, 3)
    outcomes = {}
    for what, (damage, _) in DAMAGES.items():
        good = {key: value.clone() for key, value in state.state_dict().items()}
        # other values in what is whole, so that a half-applied state shows
        altered = {key: value + 1 if "/" in key else value for key, value in good.items()}
        try:
            state.load_state_dict(damage(altered))
            text = "accepted"
        except ValueError as error:
            text = str(error)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        untouched = all(torch.equal(value, good[key]) for key, value in state.state_dict().items())
        outcomes[what] = text, untouched
        state.load_state_dict(good)
    return outcomes


@pytest.fixture(scope="module")
def damaged() -> dict[str, Any]:
    return run_ranks(_load_damaged, 1)[0]


@pytest.mark.parametrize("what", DAMAGES)
def test_a_state_that_does_not_fit_is_refused_with_its_reason(damaged: dict[str, Any], what: str) -> None:
    text, _ = damaged[what]
    assert all(word in text for word in DAMAGES[what][1]), text


@pytest.mark.parametrize("what", DAMAGES)
def test_a_refused_state_changes_nothing(damaged: dict[str, Any], what: str) -> None:
    text, untouched = damaged[what]
    assert text == "accepted" or untouched


def _not_strict(rank: int) -> Any:
    _, state = t.wrap(t.Net(), strict=False)
    good = {key: value.clone() for key, value in state.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state.load_state_dict({**good, "rank_0/residual/ghost": torch.ones(2, 2)})
    return [str(one.message) for one in caught]


def test_without_strict_an_unknown_residual_is_dropped_with_a_warning() -> None:
    (text,) = run_ranks(_not_strict, 1)[0]
    assert "ghost" in text


def _policies(rank: int) -> Any:
    """A state saved compressed and loaded where `layers.1` travels dense, and the other way round."""
    dense_rule = [(NAME, Dense()), ("*", LowRank(rank=2))]
    model, state = t.wrap(t.Net())
    t.train(model, rank, 2)
    saved = state.state_dict()
    _, mixed = t.wrap(t.Net(), policy=dense_rule)
    try:
        mixed.load_state_dict(saved)
        text = "accepted"
    except ValueError as error:
        text = str(error)
    model, mixed = t.wrap(t.Net(), policy=dense_rule)
    t.train(model, rank, 2)
    later, state = t.wrap(t.Net())
    state.load_state_dict(mixed.state_dict())  # compressed from now on: nothing is owed yet
    owed = t.residuals(state)[NAME].norm().item(), t.residuals(state)["layers.2.weight"].norm().item()
    t.train(later, rank, 2)
    return text, owed, state.step


def test_changed_policies() -> None:
    for text, (newly, still), step in run_ranks(_policies, 2):
        assert NAME in text and "dense" in text
        assert newly == 0 and still > 0
        assert step == 4


def _other_ranks_state(rank: int, folder: str) -> list[str]:
    """Rank 1 is given rank 0's file, then each is given a state of three ranks; then folders without any."""
    model, state = t.wrap(t.Net())
    t.train(model, rank, 2)
    mine = {key: value.clone() for key, value in state.state_dict().items()}
    torch.save(mine, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    texts = []
    zeros = torch.load(f"{folder}/0.pt", weights_only=True)
    attempts: list[Callable[[], None]] = [
        lambda: state.load_state_dict(zeros),
        lambda: state.load_state_dict({**mine, "num_ranks": torch.tensor(3)}),
        lambda: state.restore(f"{folder}/other"),
        lambda: state.restore(f"{folder}/other", prefix="elsewhere"),
        lambda: state.restore(f"{folder}/nowhere"),
        state.restore,
        lambda: state.restore(storage_reader=checkpoint.FileSystemReader(f"{folder}/other")),
    ]
    checkpoint.save({"model": nn.Linear(2, 2).state_dict()}, checkpoint_id=f"{folder}/other")
    for attempt in attempts:
        try:
            attempt()
            texts.append("accepted")
        except (ValueError, FileNotFoundError) as error:
            texts.append(str(error))
    untouched = all(torch.equal(value, mine[key]) for key, value in state.state_dict().items())
    return [*texts, "untouched" if untouched else "changed"]


def test_the_state_of_another_rank_or_world_is_refused_naming_restore(tmp_path: Path) -> None:
    first, second = run_ranks(_other_ranks_state, 2, str(tmp_path))
    assert "disagree on states that do not fit" in first[0] and "rank 1" in first[0]  # its own, which would fit
    assert "rank_1/residual/" in second[0] and "restore" in second[0]
    for texts in (first, second):
        assert "restore" in texts[1] and "3 ranks" in texts[1]
        assert "gradient_sync" in texts[2] and "elsewhere" in texts[3]
        assert "nowhere" in texts[4] and "checkpoint.save" in texts[4]
        assert "either checkpoint_id=" in texts[5] and "storage_reader=" in texts[5]
        assert "other holds no gradient state" in texts[6]
        assert texts[7] == "untouched"


def _huge_seed(rank: int) -> str:
    try:
        model, state = t.wrap(t.Net(), seed=2**40)
        t.train(model, rank, 1)
        return f"trained {state.step}"
    except ValueError as error:
        return str(error)


def test_a_huge_seed_works_or_is_refused_at_construction() -> None:
    for text in run_ranks(_huge_seed, 2):
        assert text == "trained 1" or "seed" in text


def _aliasing(rank: int) -> bool:
    """A loaded dictionary is copied: training on does not write into it."""
    model, state = t.wrap(t.Net())
    t.train(model, rank, 2)
    saved = {key: value.clone() for key, value in state.state_dict().items()}
    copy = {key: value.clone() for key, value in saved.items()}
    fresh, other = t.wrap(t.Net())
    assert isinstance(other, GradientSync)
    other.load_state_dict(saved)
    t.train(fresh, rank, 2, first=2)
    return all(torch.equal(saved[key], copy[key]) for key in saved)


def test_a_loaded_dictionary_is_not_written_to() -> None:
    assert run_ranks(_aliasing, 2) == [True, True]
