"""Runs resumed from reconstructed states: the identity changes nothing, noise does, and the summary says which."""

from __future__ import annotations

import argparse
import copy
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.checkpoint_excp import ExcpChain
from benchmarks.checkpoint_resume import codec_factory, identity, measure, summarise, uncompressed
from benchmarks.checkpoint_snapshots import make_snapshots
from benchmarks.checkpoint_training import State, TrainingRun, adam_tensors, load_snapshot, settings

TINY = {"layers": 1, "heads": 2, "width": 16, "context": 16, "vocabulary": 256}
SETTINGS = settings(TINY, steps=40, warmup_steps=2, batch=2, eval_batches=2, eval_batch=2)
OPTIONS = argparse.Namespace(chain=[4, 6], checks=[0, 1, 4], data_seeds=[0, 1, 2], restores=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("snapshots")
    make_snapshots(folder, [4, 6, 10], SETTINGS)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict:
    return uncompressed(folder, SETTINGS, 6, OPTIONS.data_seeds, OPTIONS.checks)


def without_second_moments(state: State) -> State:
    rebuilt = copy.deepcopy(state)
    for _, _, v in adam_tensors(rebuilt).values():
        v.zero_()
    return rebuilt


def test_the_identity_is_the_uninterrupted_run(folder: Path, plain: dict) -> None:
    found = measure(folder, SETTINGS, lambda: identity, OPTIONS)
    assert found["orders"] == plain
    run = TrainingRun(SETTINGS)
    run.restore(load_snapshot(folder, 10))
    assert found["orders"]["0"]["held_out"]["4"] == run.held_out_loss()
    assert found["restored_repeatedly"]["held_out"]["4"] == run.held_out_loss()
    assert found["orders"]["1"]["held_out"]["4"] != found["orders"]["0"]["held_out"]["4"]
    summary = summarise(found, plain)
    assert all(row["above"] == 0 for row in summary.values())
    assert all(summary[check]["inside"] for check in ("+0", "+1", "+4", "restored repeatedly"))


def test_zeroed_second_moments_show(folder: Path, plain: dict) -> None:
    summary = summarise(measure(folder, SETTINGS, lambda: without_second_moments, OPTIONS), plain)
    assert summary["+0"]["above"] == 0, "weights are as they were"
    assert summary["+1"]["above"] > summary["+1"]["margin"] and not summary["+1"]["inside"]
    assert not summary["restored repeatedly"]["inside"]


def test_a_codec_sees_the_chain_and_then_the_states_of_the_run(folder: Path) -> None:
    seen = []

    def watching(state: State) -> State:
        seen.append(state["step"])
        return identity(state)

    measure(folder, SETTINGS, lambda: watching, OPTIONS)
    assert seen == [4, 6, 8]


def test_excp_goes_through(folder: Path, plain: dict) -> None:
    chain = ExcpChain()
    found = measure(folder, SETTINGS, lambda: chain, OPTIONS)
    assert len(chain.sizes) == 2
    assert found["orders"]["0"]["held_out"]["0"] != plain["0"]["held_out"]["0"]


def test_modes_of_the_store_go_through(folder: Path, plain: dict) -> None:
    """Exactly, a run that is restored on the way is the uninterrupted one; within bounds it is another."""
    exact, lossy = (measure(folder, SETTINGS, codec_factory(mode)[1], OPTIONS) for mode in ("lossless", "standard"))
    assert exact["orders"] == plain
    assert lossy["orders"]["0"]["held_out"]["0"] != plain["0"]["held_out"]["0"]


def test_uncompressed_runs_are_kept(folder: Path, plain: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingRun, "advance", partial(pytest.fail, "trained again"))
    assert uncompressed(folder, SETTINGS, 6, OPTIONS.data_seeds, OPTIONS.checks) == plain


def runs(*rows: tuple[float, float, float]) -> dict:
    return {str(seed): {"held_out": dict(zip(("0", "10", "50"), row)), "train": 1.0} for seed, row in enumerate(rows)}


def test_band_by_hand() -> None:
    plain = runs((2.0, 1.9, 1.7), (2.0, 2.0, 1.8), (2.0, 2.1, 1.9))
    found = {"orders": runs((2.05, 2.1, 1.6), (2.05, 2.2, 1.7), (2.05, 2.3, 1.8))}
    summary = summarise(found, plain)
    assert summary["+0"]["margin"] == pytest.approx(0.1), "of the check after it"
    assert [summary[check]["above"] for check in ("+0", "+10", "+50")] == pytest.approx([0.05, 0.2, -0.1])
    assert [summary[check]["inside"] for check in ("+0", "+10", "+50")] == [True, False, True]
    assert summary["+10"]["uncompressed"] == pytest.approx([1.9, 2.0, 2.1])


def test_codecs_are_named() -> None:
    name, make = codec_factory("none=benchmarks.checkpoint_resume:identity")
    assert name == "none" and make is identity
    assert isinstance(codec_factory("excp")[1](), ExcpChain)
    with pytest.raises(ValueError, match=r"codec 'gzip'; expected one of lossless, .*, excp"):
        codec_factory("gzip")


def test_reconstruction_is_left_alone_by_the_run(folder: Path) -> None:
    state = load_snapshot(folder, 6)
    before = copy.deepcopy(state)
    measure(folder, SETTINGS, lambda: lambda _: state, argparse.Namespace(**{**vars(OPTIONS), "restores": 0}))
    assert all(torch.equal(state["model"][name], value) for name, value in before["model"].items())
    for name, tensors in adam_tensors(state).items():
        assert all(map(torch.equal, tensors, adam_tensors(before)[name])), name
