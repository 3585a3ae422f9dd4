"""examples/train_moe.py in real processes: results, settings of configs/moe, checkpoints of any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from commcomp import moe
from tests.examples.tiny_runs import MOE_SCRIPT, REPOSITORY, start, train

SETTINGS = sorted(path.stem for path in (REPOSITORY / "configs" / "moe").glob("*.yaml"))


@pytest.mark.parametrize(("tokens", "precision"), [("plain", "fp32"), ("lsh_int4", "fp32"), ("lsh_int4", "bf16")])
def test_it_learns_and_records_its_layers(tokens: str, precision: str, tmp_path: Path) -> None:
    result = train(f"moe={tokens}", f"precision={precision}", processes=2, output_dir=tmp_path, script=MOE_SCRIPT)
    assert result["train_loss"][-1] < result["train_loss"][0]
    assert result["held_out"][1][2] < result["held_out"][0][2]
    layer = result["layers"]["moe_0"]
    assert layer["wire_bytes"] > 0 and layer["dense_bytes"] > 0
    if tokens == "plain":
        assert layer["rate"] == 1.0 and 0.8 < layer["ratio"] < 1  # the numbers of rows are sent too
    else:
        assert layer["rate"] < 1 and layer["ratio"] > 1
    names = {"plain": "plain all-to-all", "lsh_int4": "clusters rate=0.75 nearest first int4"}
    assert result["name"] == names[tokens]


def test_a_run_goes_on_with_the_same_or_another_number_of_ranks(tmp_path: Path) -> None:
    settings = ["moe=lsh_int8", "checkpoint=lossless", "checkpoint.every=4", "final_learning_rate=1.0"]
    whole = train(*settings, processes=2, output_dir=tmp_path / "whole", script=MOE_SCRIPT)
    train(*settings, "steps=4", processes=2, output_dir=tmp_path / "halves", script=MOE_SCRIPT)
    resumed = train(*settings, processes=2, output_dir=tmp_path / "halves", script=MOE_SCRIPT)
    # The state comes back to the bit, what compressors have learnt too.
    assert resumed["train_loss"] == whole["train_loss"]
    alone = train(*settings, "steps=12", processes=0, output_dir=tmp_path / "whole", script=MOE_SCRIPT)
    assert len(alone["train_loss"]) == 12 and alone["train_loss"][:8] == whole["train_loss"]
    assert alone["train_loss"][-1] < whole["train_loss"][4]


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_valid(name: str) -> None:
    settings = OmegaConf.load(REPOSITORY / "configs" / "moe" / f"{name}.yaml")
    base = OmegaConf.load(REPOSITORY / "configs" / "moe" / "lsh.yaml") if "defaults" in settings else {}
    settings.pop("defaults", None)
    config = moe.MoEConfig.from_dict(OmegaConf.to_container(OmegaConf.merge(base, settings)))
    assert (config.lsh is None) == ("lsh" not in name and name != "published")
    assert (config.quantized is None) == (name in ("plain", "lsh", "published"))


def test_a_mistake_ends_the_program_with_the_reason(tmp_path: Path) -> None:
    run = start("parallel=fsdp2", processes=0, output_dir=tmp_path, script=MOE_SCRIPT)
    assert run.returncode != 0 and "expected ddp: the experts are sharded by themselves" in run.stdout + run.stderr
