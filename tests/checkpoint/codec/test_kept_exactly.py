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
    assert "of 3 moments" in message and "'optimizer/state/0/exp_avg' could be of 'model/embedding.weight'" in message
    assert "'copy/embedding.weight' (float32 [120, 48]), 'copy/head.weight'" in message and "ema" in message


def test_what_is_lossy_or_small_or_meant_to_be_exact_is_not_told(tmp_path: Path) -> None:
    state = _trained()
    assert _said(tmp_path / "whole", [state]) == []
    assert _said(tmp_path / "momentum", [_trained("SGD", momentum=0.9)]) == []
    assert _said(tmp_path / "moments", [{"optimizer": state["optimizer"]}]) == []
    average = {key: value.clone() for key, value in state["model"].items()}
    assert _said(tmp_path / "average", [{**state, "ema": average}]) == []
    assert _said(tmp_path / "small", [{"vector": torch.randn(500), "counts": torch.arange(100_000)}]) == []
    assert _said(tmp_path / "lossless", [{"model": state["model"]}], "lossless") == []
