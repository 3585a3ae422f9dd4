"""TensorBoard scalars: what is written, and under which layer group."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from commcomp.telemetry.tensorboard import TensorBoardWriter, error_scalars, layer_group


def stats(steps: int, wire_bytes: int) -> dict[str, Any]:
    def parameter(error: float | None) -> dict[str, Any]:
        return {"method": "low_rank", "wire_bytes": 10, "dense_wire_bytes": 100, "relative_error": error}

    return {
        "steps": steps,
        "skipped_steps": 0,
        "wire_bytes": wire_bytes,
        "ratio": 12.5,
        "memory_bytes": {"residual": 400, "warm_start": 40},
        "relative_error": 0.7,
        "parameters": {
            "blocks.0.mlp.0.weight": parameter(0.5),
            "blocks.1.mlp.2.weight": parameter(0.7),
            "blocks.1.qkv.weight": parameter(0.9),
            "blocks.1.norm.weight": parameter(None),
            "head.weight": parameter(math.nan),
        },
    }


@pytest.mark.parametrize(
    ("parameter", "group"),
    [
        ("blocks.3.mlp.0.weight", "mlp"),
        ("module.blocks.3.qkv.weight", "qkv"),
        ("_orig_mod.model.layers.11.self_attn.q_proj.weight", "self_attn"),
        ("token_embedding.weight", "token_embedding"),
        ("layers.2.weight", "layers"),
        ("0.weight", "0"),
        ("bias", "bias"),
    ],
)
def test_layer_group(parameter: str, group: str) -> None:
    assert layer_group(parameter) == group


def test_errors_are_averaged_within_a_group_and_unmeasured_ones_left_out() -> None:
    scalars = error_scalars(stats(1, 10))
    assert scalars == {
        "gradient/relative_error": 0.7,
        "gradient/relative_error/mlp": pytest.approx(0.6),
        "gradient/relative_error/qkv": 0.9,
    }


def test_scalars_arrive_in_the_log(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = TensorBoardWriter(tmp_path)
    writer.scalars(1, {"loss/train": 5.5})
    writer.stats(10, stats(10, 1000))
    writer.stats(20, stats(20, 1500))
    writer.close()

    log = accumulator.EventAccumulator(str(tmp_path)).Reload()

    def read(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in log.Scalars(tag)]

    assert read("loss/train") == [(1, 5.5)]
    assert read("gradient/wire_bytes_per_step") == [(10, 100.0), (20, 50.0)]
    assert read("gradient/memory_bytes/residual") == [(10, 400.0), (20, 400.0)]
    assert read("gradient/ratio")[0] == (10, 12.5)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoardWriter(tmp_path)
