"""Losses of DeepSpeed engines of every ZeRO stage, dtype and method against DDP and FSDP2 with the same settings."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest

from tests.ranks import run_ranks

# Not imported here: that takes seconds, and only the ranks need it.
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

METHODS: dict[str, dict[str, Any]] = {
    "low_rank": {"method": "low_rank", "rank": 2},
    "low_rank int8, one round": {"method": "low_rank", "rank": 4, "factor_dtype": "int8", "rounds": 1},
    # Blocks that no order of the matrices moves: DDP orders them as gradients came.
    "quantized": {"method": "quantized", "bits": 4, "block": 4},
    "sparse": {"method": "sparse", "density": 0.2, "layers": "all"},
    "dense": {"method": "dense"},
}
STEPS = 8


def _references(rank: int) -> dict[str, list[float]]:
    from tests.deepspeed import engines

    made: dict[str, list[float]] = {}
    for name, gradient in {**METHODS, "plain": None}.items():
        made[f"{name} fp32 ddp"] = engines.train_ddp(gradient, STEPS)
        made[f"{name} bf16 ddp"] = engines.train_ddp(gradient, STEPS, bf16=True)
        made[f"{name} bf16 ddp, begun"] = engines.train_ddp(gradient, STEPS, bf16=True, begun=True)
        made[f"{name} fp32 fsdp2"] = engines.train_fsdp2(gradient, STEPS)
    return made


def _of_stage(rank: int, stage: int) -> dict[str, dict[str, Any]]:
    from tests.deepspeed import engines

    made: dict[str, dict[str, Any]] = {}
    for dtype in ("fp32", "bf16"):
        for name, gradient in {**METHODS, "plain": None}.items():
            engine = engines.make_engine(engines.ds_config(stage, gradient, bf16=dtype == "bf16"))
            entry: dict[str, Any] = {"losses": engines.train_engine(engine, range(STEPS))}
            entry["same"] = engines.same_on_all_ranks(engine)
            if gradient is not None:
                entry["stats"] = engine.commcomp.stats()["gradient"]
            made[f"{name} {dtype}"] = entry
    return made


@cache
def references() -> dict[str, list[float]]:
    """By method, dtype and framework."""
    return run_ranks(_references, 2)[0]


@cache
def of_stage(stage: int) -> dict[str, dict[str, Any]]:
    """By method and dtype."""
    return run_ranks(_of_stage, 2, stage)[0]


def _tolerance(method: str) -> float:
    # A sparse bucket's threshold is found by a sample, which depends on the order in which matrices lie in it.
    return 1e-3 if method == "sparse" else 1e-6


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_fp32_losses_are_those_of_ddp_and_fsdp2(stage: int, method: str) -> None:
    found = of_stage(stage)[f"{method} fp32"]
    wanted = references()[f"{method} fp32 {'fsdp2' if stage == 3 else 'ddp'}"]
    assert found["losses"] == pytest.approx(wanted, rel=_tolerance(method))
    assert found["same"]
    assert found["stats"]["steps"] == STEPS
    assert found["losses"][-1] < found["losses"][0] - 0.1


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_bf16_losses_are_those_of_ddp(stage: int, method: str) -> None:
    found = of_stage(stage)[f"{method} bf16"]
    wanted = references()[f"{method} bf16 ddp{', begun' if stage == 0 else ''}"]
    # ZeRO 3 itself rounds otherwise: its plain losses are that far from DDP's.
    assert found["losses"] == pytest.approx(wanted, rel=1e-3 if stage == 3 else _tolerance(method))
    assert found["same"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dense_is_plain_deepspeed(stage: int, dtype: str) -> None:
    made = of_stage(stage)
    rel = 1e-6 if dtype == "fp32" else 1e-3
    assert made[f"dense {dtype}"]["losses"] == pytest.approx(made[f"plain {dtype}"]["losses"], rel=rel)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ratios_are_against_what_the_stage_sends(stage: int) -> None:
    """ZeRO 3 reduce-scatters: half of an all-reduce. Values go to owners in half the bytes too, factors do not."""
    made, whole = of_stage(stage), of_stage(0)
    assert made["dense fp32"]["stats"]["ratio"] == pytest.approx(1.0, abs=0.01)
    plain, all_reduced = (one["dense fp32"]["stats"]["dense_wire_bytes"] for one in (made, whole))
    assert plain == pytest.approx(all_reduced / (2 if stage == 3 else 1), rel=0.01)
    low_rank, quantized = (made[f"{name} fp32"]["stats"]["ratio"] for name in ("low_rank", "quantized"))
    assert low_rank == pytest.approx(whole["low_rank fp32"]["stats"]["ratio"] / (2 if stage == 3 else 1), rel=0.15)
    assert quantized == pytest.approx(whole["quantized fp32"]["stats"]["ratio"], rel=0.05)
