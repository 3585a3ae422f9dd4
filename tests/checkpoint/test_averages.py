"""Moving averages of weights are found, whatever wraps their names, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from commcomp.checkpoint import SnapshotStore
from commcomp.checkpoint.averages import find_averages
from commcomp.checkpoint.coded import TreeInfo
from commcomp.checkpoint.state_tree import split
from tests.checkpoint.states import assert_same


def _found(state: Any) -> dict[str, str]:
    parts = split(state)
    return find_averages(list(parts.tensors), TreeInfo(1, parts.skeleton, parts.paths))


@pytest.mark.parametrize("key", ["ema", "model_ema", "swa_model", "Averaged", "shadow", "teacher"])
def test_an_average_is_told_by_the_key_above_it(key: str) -> None:
    state = {"model": {"a.weight": torch.zeros(2)}, key: {"a.weight": torch.ones(2), "b": torch.ones(2)}}
    assert _found(state) == {f"{key}/a.weight": "model/a.weight"}


def test_wrappers_before_a_name_do_not_matter() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    average = AveragedModel(model)
    found = _found({"net": {"model": model.state_dict(), "ema": average.state_dict()}})
    assert found == {f"net/ema/module.{name}": f"net/model/{name}" for name in model.state_dict()}
    wrapped = {f"_orig_mod.module.{name}": value for name, value in model.state_dict().items()}
    found = _found({"model": wrapped, "ema": average.state_dict()})
    assert found == {f"ema/module.{name}": f"model/_orig_mod.module.{name}" for name in model.state_dict()}


def test_flattened_names_go_by_shard() -> None:
    one, two = torch.zeros(2), torch.zeros(2)
    state = {
        "model.a.w": {(0, 0): one, (4, 0): two},
        "ema.a.w": {(0, 0): torch.ones(2), (8, 0): torch.ones(2)},
    }
    assert _found(state) == {"ema.a.w/(0, 0)": "model.a.w/(0, 0)"}


def test_what_is_no_average_or_two_weights_could_have_is_left_out() -> None:
    weights = {"w": torch.zeros(2)}
    assert _found({"model": weights, "copy": {"w": torch.ones(2)}}) == {}
    assert _found({"a": weights, "b": {"w": torch.ones(2)}, "ema": {"w": torch.ones(2)}}) == {}
    assert _found({"ema": [torch.ones(2)], "model": [torch.zeros(2)], "ema.w": torch.ones(2)}) == {}
    assert _found([torch.ones(2), (torch.ones(3),)]) == {} and _found(torch.ones(2)) == {}


def test_what_is_a_weight_too_is_no_average(tmp_path: Path) -> None:
    one, two, three = (torch.randn(20, 20) for _ in range(3))
    circle = {"model": {"a": one, "b": two}, "ema": {"a": two, "b": one}}
    row = {"model": {"a": one, "b": two}, "ema": {"a": three, "b": one}}
    assert _found(circle) == {} and _found(row) == {"ema/a": "model/a"}
    store = SnapshotStore(tmp_path)
    for step, state in enumerate((circle, row, circle)):
        store.save(step, state)
        assert_same(store.load(step), state)
