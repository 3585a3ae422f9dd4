"""The looks at a training that benchmarks/moe_over_training.py takes: what they say, and that they leave no trace."""

from __future__ import annotations

import json
from pathlib import Path

from tests.examples.tiny_runs import MOE_SCRIPT, REPOSITORY, train

WORKER = REPOSITORY / "benchmarks" / "moe_over_training_worker.py"


def test_looks_leave_no_trace_in_the_training(tmp_path: Path) -> None:
    settings = ["moe=lsh_int8", "tensorboard=false"]
    watched = train(*settings, processes=2, output_dir=tmp_path / "watched", script=WORKER)
    alone = train(*settings, processes=2, output_dir=tmp_path / "alone", script=MOE_SCRIPT)
    assert watched["train_loss"] == alone["train_loss"]
    assert [loss for _, _, loss in watched["held_out"]] == [loss for _, _, loss in alone["held_out"]]
    same = ("wire_bytes", "dense_bytes", "rate", "farthest")
    assert all(watched["layers"]["moe_0"][key] == alone["layers"]["moe_0"][key] for key in same)
    looks = json.loads((tmp_path / "watched" / "looks.json").read_text())
    assert [look["step"] for look in looks] == [4, 8]
    for look in looks:
        (layer,) = look["layers"]
        assert 0 < layer["rate"] < 1 and 0 < layer["residual"] < 2 and 0 < layer["off"] < 2
        assert layer["off_with_residual"] > 0 and look["held_out_compressed"] > 0
    assert looks[-1]["layers"][0]["training_rate"] == alone["layers"]["moe_0"]["rate"]


def test_without_clusters_there_is_no_rate(tmp_path: Path) -> None:
    result = train("moe=int8", "tensorboard=false", processes=2, output_dir=tmp_path, script=WORKER)
    for look in json.loads((tmp_path / "looks.json").read_text()):
        (layer,) = look["layers"]
        assert layer["training_rate"] == 1 and layer["bytes_ratio"] > 2 and "residual" not in layer
    assert len(result["held_out"]) == 2
