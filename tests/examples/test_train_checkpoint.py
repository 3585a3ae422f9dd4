"""Coded checkpoints of examples/train_gpt.py: killed runs go on from the newest, old ones go, formats may change."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import stdlib_text
import train_gpt
import train_setup
import train_storage
from commcomp.checkpoint.container_reader import SnapshotReader
from tests.examples.tiny_runs import COMPRESSED, KILLED_ONCE, TINY, composed, train
from tests.ranks import run_ranks

CODED = ["checkpoint=standard", "checkpoint.every=2", "tensorboard=false"]
Result = dict[str, Any]


def _train(rank: int, folder: str, settings: list[str], kill_before: int | None = None) -> Result:
    """What the command line runs; all ranks are killed before a step of that number."""
    normal = stdlib_text.Batches.at

    def at(batches: stdlib_text.Batches, step: int) -> Any:
        if step == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        return normal(batches, step)

    stdlib_text.Batches.at = at  # type: ignore[method-assign]
    config = composed(*TINY, *settings, f"output_dir={folder}")
    train_setup.check_settings(config)
    train_gpt.train(config, train_setup.Place(rank=rank, world_size=dist.get_world_size(), device=torch.device("cpu")))
    dist.barrier()
    return json.loads((Path(folder) / "result.json").read_text())


def _run(ranks: int, folder: Path, *settings: str) -> Result:
    return run_ranks(_train, ranks, str(folder), [*settings])[0]


def _kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def _assert_goes_on(resumed: Result, uninterrupted: Result, after: int) -> None:
    """Equal up to the checkpoint after that step, then another run, which is where this one is: from 5.5 to below 4.

    How far they differ in so few and large steps says nothing about the codec.
    """
    losses, expected = resumed["train_loss"], uninterrupted["train_loss"]
    assert losses[:after] == pytest.approx(expected[:after], abs=1e-6)
    assert losses[after:] == pytest.approx(expected[after:], abs=0.25)
    assert resumed["held_out"][-1][2] == pytest.approx(uninterrupted["held_out"][-1][2], abs=0.15)
    assert resumed["held_out"][-1][2] != uninterrupted["held_out"][-1][2]  # it went through a lossy codec
    assert resumed["held_out"][-1][2] < resumed["held_out"][0][2]
    assert resumed["steps"] == 8


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return _run(2, tmp_path_factory.mktemp("uninterrupted"), *COMPRESSED, "tensorboard=false")


def test_a_killed_run_goes_on_by_the_same_command(uninterrupted: Result, tmp_path: Path) -> None:
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE)
    settings = [*COMPRESSED, "checkpoint=standard", "checkpoint.every=2"]
    result = train(*settings, processes=2, output_dir=tmp_path / "run", script=script, restarts=1)
    saved = {entry["step"]: entry for entry in result["checkpoints"]}
    (newest_then,) = {2, 4, 6, 8} - saved.keys()  # it was complete after its own history was written
    assert newest_then in (2, 4)  # that of step 4 was being written in the background
    _assert_goes_on(result, uninterrupted, newest_then)
    newest = tmp_path / "run" / "checkpoints" / "step-000000000008"
    files = [path for path in newest.iterdir() if path.name != "history.json"]
    assert saved[8]["bytes"] == sum(path.stat().st_size for path in files)
    assert saved[8]["ratio"] > 1 and saved[8]["seconds_waited"] > 0
    lossy = set()
    for path in newest.glob("rank-*.ccsnap"):
        with SnapshotReader(path) as reader:
            lossy |= {name for name, tensor in reader.tensors.items() if tensor.header.bound is not None}
    assert {name.split(".")[0] for name in lossy} == {"model", "optimizer"}  # what is owed is exact
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    ratios = {event.step: event.value for event in log.Scalars("checkpoint/ratio")}
    assert ratios[8] == pytest.approx(saved[8]["ratio"])
    assert {"checkpoint/bytes", "checkpoint/seconds_waited"} <= set(log.Tags()["scalars"])


@pytest.mark.parametrize(("parallel", "ranks"), [("fsdp2", 2), ("hsdp", 4)])
def test_a_killed_sharded_run_goes_on(parallel: str, ranks: int, tmp_path: Path) -> None:
    settings = [*COMPRESSED, f"parallel={parallel}", "checkpoint.background=false"]
    folder = tmp_path / "run"
    with pytest.raises(AssertionError, match="died"):
        run_ranks(_train, ranks, str(folder), [*settings, *CODED], 5)
    assert _kept(folder) == ["step-000000000002", "step-000000000004"]
    result = _run(ranks, folder, *settings, *CODED)
    _assert_goes_on(result, _run(ranks, tmp_path / "other", *settings[:-1], "tensorboard=false"), 4)


def test_the_newest_stay_with_what_they_need(tmp_path: Path) -> None:
    settings = ["gradient=none", *CODED, "steps=9", "checkpoint.every=1", "checkpoint.keyframe_every=3"]
    result = _run(1, tmp_path, *settings, "checkpoint.keep=1")
    assert _kept(tmp_path) == ["step-000000000007", "step-000000000008", "step-000000000009"]
    ratios = [entry["ratio"] for entry in result["checkpoints"]]
    assert len(ratios) == 9 and ratios[1] > ratios[0]


def test_formats_and_modes_may_change_and_an_older_checkpoint_may_be_taken(tmp_path: Path) -> None:
    settings = [*COMPRESSED, "checkpoint.every=2", "checkpoint.keep=9", "tensorboard=false"]
    whole = _run(1, tmp_path / "whole", *settings, "checkpoint=lossless", "checkpoint.mean_residual=true")
    folder = tmp_path / "run"
    _run(1, folder, *settings, "checkpoint=plain", "steps=2")
    _run(1, folder, *settings, "checkpoint=compact", "steps=4")
    result = _run(1, folder, *settings, "checkpoint=plain")
    assert len(result["train_loss"]) == 8 and result["config"]["checkpoint"]["mode"] == "plain"
    assert _kept(folder) == ["step-000000000004", "step_00000002", "step_00000006", "step_00000008"]
    older = tmp_path / "whole" / "checkpoints" / "step-000000000004"
    again = _run(1, tmp_path / "whole", *settings, "checkpoint=lossless", f"resume={older}", "checkpoint.every=3")
    assert again["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-5)  # with the moments and what is owed
    assert _kept(tmp_path / "whole")[-1] == "step-000000000006"  # 8 was of the run before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint=standard", "checkpoint.every=0"], "checkpoint.every is 0; expected a number of at least 1"),
        (["checkpoint=plain", "checkpoint.keep=0"], "checkpoint.keep is 0; expected a number of at least 1"),
        (["checkpoint=standard", "checkpoint.mode=best"], "checkpoint.mode is 'best'; expected one of none, plain"),
        (["checkpoint=none", "checkpoint.every=5"], "Could not override 'checkpoint.every'"),
    ],
)
def test_mistaken_settings_are_explained(overrides: list[str], message: str) -> None:
    with pytest.raises(Exception, match=re.escape(message)):
        train_setup.check_settings(composed(*overrides))


def test_a_setting_of_the_codec_is_checked_before_training(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="keyframe_every=300; expected 1 to"):
        _run(1, tmp_path, *CODED, "checkpoint.keyframe_every=300")


def test_modes_build_on_one_another() -> None:
    settings = [dict(composed(f"checkpoint={mode}").checkpoint) for mode in train_storage.MODES]
    assert [of_mode.pop("mode") for of_mode in settings] == list(train_storage.MODES)
    assert all(of_mode == settings[0] and of_mode["keep"] for of_mode in settings)
