"""What the benchmark of costs measures: memory that is taken shows, states become others, every row is there."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import checkpoint_costs, checkpoint_costs_worker
from benchmarks.checkpoint_costs_worker import WORK, become, load_states, raw_bytes, tensors_of
from benchmarks.checkpoint_dtypes import casts, counters, measure
from benchmarks.checkpoint_snapshots import make_snapshots
from benchmarks.checkpoint_training import load_snapshot, settings

TINY = {"layers": 1, "heads": 2, "width": 32, "context": 16, "vocabulary": 256}
SETTINGS = settings(TINY, steps=20, warmup_steps=2, batch=2, eval_batches=2, eval_batch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("snapshots")
    make_snapshots(folder, [3, 5], SETTINGS)
    return folder


def _options(folder: Path, **changes: object) -> argparse.Namespace:
    given = {"snapshots": folder, "at": [3, 3], "then": [5, 5], "mode": "lossless", "threads": 2, "repeats": 2}
    return argparse.Namespace(**given, scratch=None, keep=True, save_async=False, reserve=True, **changes)


def test_states_are_real_and_become_those_of_later_steps(folder: Path) -> None:
    state = load_states(folder, [3, 3])
    places = [tensor.data_ptr() for tensor in tensors_of(state)]
    become(state, folder, [5, 5])
    assert places == [tensor.data_ptr() for tensor in tensors_of(state)]
    for one in state:
        for mine, expected in zip(tensors_of(one), tensors_of(load_snapshot(folder, 5))):
            assert torch.equal(mine, expected)
    one, two = (sum({t.data_ptr(): t.nbytes for t in tensors_of(part)}.values()) for part in state)
    assert one == two == raw_bytes(state) / 2


def test_memory_that_is_taken_and_given_back_is_in_the_peak() -> None:
    before = checkpoint_costs_worker._resident_now()
    peak, found = checkpoint_costs_worker._peak_of(lambda: len(np.ones(64 << 20, np.uint8)))
    assert found == 64 << 20 and peak - before > 60 << 20
    assert checkpoint_costs_worker._peak_of(lambda: None)[0] < peak - (30 << 20)


@pytest.mark.parametrize("save_async", [False, True])
def test_memory_of_saving_loading_and_reopening(folder: Path, tmp_path: Path, save_async: bool) -> None:
    options = _options(folder, store=tmp_path / "store")
    options.save_async = save_async
    found = WORK["saving"](options)
    copies = 2 if save_async else 1
    assert found["second"]["kept"] == copies * found["raw_bytes"]
    assert WORK["reopening"](options)["kept"] == copies * found["raw_bytes"]
    assert WORK["loading"](options).keys() == {"beyond"}


def test_stall_and_speed_have_every_row(folder: Path) -> None:
    stall = WORK["stall"](_options(folder))
    assert stall["first call"] > 0 and len(stall["later calls"]) == 2 and len(stall["torch.save"]) == 3
    speed = WORK["speed"](_options(folder))
    assert len(speed["encode"]) == len(speed["decode"]) == 2 and min(*speed["encode"], *speed["decode"]) > 0


def test_workers_are_asked_for_all_that_the_summary_needs(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A worker that answers like a store which takes 1.5 copies and keeps one."""
    answers = {
        "saving": {
            "raw_bytes": 100,
            "first": {"beyond": 150, "kept": 100, "is_delta": False},
            "second": {"beyond": 120, "kept": 100, "is_delta": True},
        },
        "reopening": {"beyond": 110, "kept": 100, "is_delta": True},
        "loading": {"beyond": 30},
        "stall": {"first call": 3.0, "later calls": [1.0, 2.0], "torch.save": [10.0], "torch.save and fsync": [12.0]},
        "speed": {"raw_bytes": 10**6, "encode": [1.0, 2.0, 9.0], "decode": [0.5]},
    }
    workers = checkpoint_costs.Workers(argparse.Namespace(snapshots=folder, scratch=None))
    monkeypatch.setattr(workers, "measure", lambda what, *arguments: dict(answers[what]))
    memory = checkpoint_costs.measure_memory(workers, "1 model", "lossless", None)
    assert memory["save"]["first"] == {"peak": 1.5, "kept": 1.0, "above kept": 0.5, "delta": False}
    assert memory["load"] == {"peak": 0.3} and memory["save_async"]["after reopening"]["delta"]
    stall = checkpoint_costs.measure_stall(workers, 2)
    assert stall["of_torch_save"] == {"first call": 0.3, "first call after reserve": 0.3, "later calls": 0.15}
    speed = checkpoint_costs.measure_speed(workers, "standard", 2)
    assert speed["1 threads"] == {"encode, MB/s": 0.5, "decode, MB/s": 2.0} and speed["ratio"]["encode"] == 1


def test_other_dtypes_are_measured_beside_what_others_make_of_them(folder: Path) -> None:
    pytest.importorskip("zipnn")
    then, now = (casts(load_snapshot(folder, step)) for step in (3, 5))
    assert {value.dtype for value in now["fp8 e5m2 weights"].values()} == {torch.float8_e5m2}
    row = measure("fp16 weights", now["fp16 weights"], then["fp16 weights"])
    assert row["against the one before"] > row["alone"] > 0.5 and row["ZipNN"] > 0.9
    row = measure("counters", *reversed(counters()))
    assert row["against the one before"] > 2 * row["zstd-19 of XOR"] > 2
