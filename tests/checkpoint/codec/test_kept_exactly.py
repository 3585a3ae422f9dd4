"""Lossy modes say once what they keep exactly because they did not recognise it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from commcomp.checkpoint import DeltaStorageWriter, SnapshotStore
from commcomp.checkpoint.codec import kept_exactly
from tests.checkpoint.codec.training import Training


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests may have heard it before."""
    monkeypatch.setattr(kept_exactly, "_said", set())


def _said(path: Path, states: list[Any], mode: str = "standard") -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, state in enumerate(states):
            SnapshotStore(path, mode=mode, threads=1).save(step, state)
    return [str(warning.message) for warning in caught]


def _trained(optimizer: str = "AdamW", dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    training = Training(optimizer, dtype, **options)
    training.step(3)
    return training.state()


def test_a_state_without_moments_is_said_to_be_exact_once(tmp_path: Path) -> None:
    state = {"model": _trained()["model"]}
    (message,) = _said(tmp_path, [state, state, state])
    assert "no tensor named exp_avg, exp_avg_sq or momentum_buffer" in message
    assert "'model/embedding.weight' (float32 [120, 48])" in message and "optimizer's state_dict()" in message
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in (1, 2):
            other = {"weight": torch.randn(70, 60)}
            dcp.save(other, storage_writer=DeltaStorageWriter(tmp_path / "run", step, "standard", threads=1))
    told = [warning for warning in caught if "lossy mode" in str(warning.message)]
    assert len(told) == 1 and "'weight/(0, 0)' (float32 [70, 60])" in str(told[0].message)
    assert told[0].filename == __file__


def test_moments_that_no_lossy_mode_takes_are_named(tmp_path: Path) -> None:
    (message,) = _said(tmp_path / "bf16", [_trained(dtype=torch.bfloat16)])
    assert "found: as moments 'optimizer/state/0/exp_avg' (bfloat16 [120, 48])" in message
    flat = {"exp_avg": torch.randn(70_000), "exp_avg_sq": torch.rand(70_000), "step": 3}
    (message,) = _said(tmp_path / "flat", [{"state": {0: flat}, "weight": torch.randn(70_000)}])
    assert "'state/0/exp_avg' (float32 [70000])" in message and "in their own shapes" in message
    (message,) = _said(tmp_path / "RMSprop", [_trained("RMSprop")])
    assert "no tensor named" in message


def test_weights_that_two_copies_leave_exact_are_named(tmp_path: Path) -> None:
    state = _trained()
    state["copy"] = {key: value.clone() for key, value in state["model"].items()}
    (message,) = _said(tmp_path, [state, state])
    assert "of 3 moments" in message and "'optimizer/state/0/exp_avg' could be of 'model/embedding.weight'" in message
    assert "'model/embedding.weight' (float32 [120, 48]), 'copy/embedding.weight'" in message and "ema" in message


def test_what_is_lossy_or_small_or_meant_to_be_exact_is_not_told(tmp_path: Path) -> None:
    state = _trained()
    assert _said(tmp_path / "whole", [state]) == []
    assert _said(tmp_path / "momentum", [_trained("SGD", momentum=0.9)]) == []
    assert _said(tmp_path / "moments", [{"optimizer": state["optimizer"]}]) == []
    average = {key: value.clone() for key, value in state["model"].items()}
    assert _said(tmp_path / "average", [{**state, "ema": average}]) == []
    assert _said(tmp_path / "small", [{"vector": torch.randn(500), "counts": torch.arange(100_000)}]) == []
    assert _said(tmp_path / "lossless", [{"model": state["model"]}], "lossless") == []
