"""examples/train_gpt.py in real processes: results, restarts after a killed rank, baselines and mistaken settings."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import commcomp
import train_checkpoint
import train_setup
from tests.examples.tiny_runs import COMPRESSED, DRIVER, KILLED_ONCE, composed, start, train

BASELINES = {
    "none": ["gradient=none"],
    "torch_fp16": ["gradient=torch_fp16"],
    "torch_powersgd": ["gradient=torch_powersgd", "gradient.rank=1"],
    "no_communication": ["gradient=no_communication"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A compressed run of two processes with checkpoints after 2, 4, 6 and 8 steps, of which all are kept."""
    folder = tmp_path_factory.mktemp("finished")
    settings = [*COMPRESSED, "checkpoint=plain", "checkpoint.every=2", "checkpoint.keep=9"]
    return folder, train(*settings, processes=2, output_dir=folder)


def test_result_is_complete(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    assert result["steps"] == len(result["train_loss"]) == len(result["step_seconds"]) == 8
    assert result["world_size"] == 2
    assert result["name"] == "low_rank rank=2 int8 rounds=2"
    assert result["config"]["gradient"]["rank"] == 2
    assert result["parameters"] > 10_000
    assert all(map(math.isfinite, result["train_loss"]))
    assert result["train_loss"][-1] < result["train_loss"][0]
    assert [step for step, _, _ in result["held_out"]] == [4, 8]
    assert result["held_out"][1][2] < result["held_out"][0][2]
    assert result["held_out"][1][1] == pytest.approx(sum(result["step_seconds"]))
    assert result["link_rate"] is None
    assert set(result["versions"]) == {"python", "torch", "numpy", "commcomp"}
    assert result["cpu_seconds_per_step"]["mean"] > 0
    assert result["ratio"] > 1.5
    assert result["wire_bytes_per_step"] * 8 == result["stats"]["wire_bytes"]
    assert list((folder / "tensorboard").glob("events.*"))


def test_report_reads_the_result(finished: tuple[Path, dict[str, Any]]) -> None:
    from commcomp.telemetry import report
    from commcomp.telemetry.runs import load_runs

    assert report.table_of(load_runs([finished[0]]))[1][0] == "low_rank rank=2 int8 rounds=2"


def test_tensorboard_holds_the_scalars(finished: tuple[Path, dict[str, Any]]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = accumulator.EventAccumulator(str(finished[0] / "tensorboard")).Reload()
    tags = set(log.Tags()["scalars"])
    assert {
        "loss/train", "loss/held_out", "learning_rate", "speed/tokens_per_second", "gradient/wire_bytes_per_step",
        "gradient/ratio", "gradient/relative_error", "gradient/relative_error/mlp",
    } <= tags  # fmt: skip
    assert [event.step for event in log.Scalars("loss/train")] == list(range(1, 9))


def test_a_killed_rank_is_restarted_and_changes_nothing(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE)
    settings = [*COMPRESSED, "checkpoint=plain", "checkpoint.every=2", "checkpoint.keep=9"]
    result = train(*settings, processes=2, output_dir=tmp_path / "run", script=script, restarts=1)
    assert result["train_loss"] == pytest.approx(finished[1]["train_loss"], abs=1e-6)
    assert result["held_out"][-1][2] == pytest.approx(finished[1]["held_out"][-1][2], abs=1e-6)
    assert result["wire_bytes_per_step"] == finished[1]["wire_bytes_per_step"]


def test_half_a_checkpoint_is_not_read_and_old_ones_go(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(finished[0] / "checkpoints" / "step_00000004", checkpoints / "step_00000004")
    half = checkpoints / ".step_00000005.partial"  # a crash while this one was being written
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    settings = ["checkpoint=plain", "checkpoint.every=2", "checkpoint.keep=1", "checkpoint.background=true"]
    result = train(*COMPRESSED, *settings, processes=2, output_dir=tmp_path)
    assert result["train_loss"] == pytest.approx(finished[1]["train_loss"], abs=1e-6)
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000008"]


def test_going_on_with_another_number_of_processes(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    checkpoint = finished[0] / "checkpoints" / "step_00000006"
    result = train(*COMPRESSED, f"resume={checkpoint}", processes=1, output_dir=tmp_path)
    assert result["train_loss"][:6] == finished[1]["train_loss"][:6]
    assert result["steps"] == 8
    assert result["held_out"][-1][2] < result["held_out"][0][2]


@pytest.fixture(scope="module")
def baselines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes train every baseline, one after the other, each in its folder."""
    folder = tmp_path_factory.mktemp("baselines")
    script = folder / "all_baselines.py"
    runs = (
        f"    run(*sys.argv[1:], *{settings}, 'tensorboard=false', 'output_dir={folder / name}')\n"
        for name, settings in BASELINES.items()
    )
    script.write_text(DRIVER + "".join(runs))
    run = start(processes=2, output_dir=folder / "unused", script=script)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.mark.parametrize(
    ("name", "share"), [("none", 1.0), ("torch_fp16", 0.5), ("torch_powersgd", None), ("no_communication", 0.0)]
)
def test_baselines(name: str, share: float | None, baselines: Path) -> None:
    result = json.loads((baselines / name / "result.json").read_text())
    assert all(map(math.isfinite, result["train_loss"]))
    assert result["train_loss"][-1] < result["train_loss"][0]
    dense = 4 * result["parameters"]  # two ranks: each sends its gradients once
    assert result["dense_wire_bytes_per_step"] == dense
    if share is None:
        assert 0 < result["wire_bytes_per_step"] < dense
    else:
        assert result["wire_bytes_per_step"] == share * dense
    assert not (baselines / name / "tensorboard").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gradient.rnk=3", "Could not override 'gradient.rnk'"),
        ("gradient=spares", "low_rank"),  # Hydra lists what there is
        ("precision=fp8", "precision is 'fp8'; expected fp32 or bf16"),
        ("steps=0", "steps is 0; expected a number of at least 1"),
        ("checkpoint=best", "cautious"),
    ],
)
def test_mistaken_settings_are_explained(override: str, message: str) -> None:
    with pytest.raises(Exception, match=re.escape(message)):
        train_setup.check_settings(composed(override))


def test_a_mistake_ends_the_program_with_the_reason(tmp_path: Path) -> None:
    run = start("gradient.rank=0", processes=0, output_dir=tmp_path)
    assert run.returncode != 0
    assert "rank is 0; expected an integer of at least 1" in run.stderr


@pytest.mark.parametrize("gradient", ["low_rank", "dense_fp32", "dense_fp16", "dense_bf16"])
def test_our_gradient_settings_are_valid(gradient: str) -> None:
    settings = OmegaConf.to_container(composed(f"gradient={gradient}").gradient)
    config = commcomp.config.GradientConfig.from_dict(settings)
    assert config.policy[0].method.method == settings["method"]


def test_a_folder_of_another_run_is_not_taken_over(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "checkpoints")
    run = start(*COMPRESSED, "seed=5", processes=0, output_dir=tmp_path)
    assert run.returncode != 0
    assert "other settings of seed" in run.stderr


def test_resuming_from_nothing_or_over_something_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume is 'nowhere'; expected auto, none or the folder of a checkpoint"):
        train_checkpoint.find("nowhere", tmp_path)
    assert train_checkpoint.find("none", tmp_path) is None
    (tmp_path / "step_00000002").mkdir()
    with pytest.raises(ValueError, match=r"holds checkpoints; .* resume=auto"):
        train_checkpoint.find("none", tmp_path)


def test_learning_rate_warms_up_and_decays() -> None:
    config = composed("steps=100", "warmup_steps=10", "learning_rate=1.0", "final_learning_rate=0.1")
    rates = [train_setup.learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
