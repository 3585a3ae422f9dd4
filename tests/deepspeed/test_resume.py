"""A run goes on from its checkpoint in new processes as if it had not ended: weights, moments, residuals, factors."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

# Not imported here: that takes seconds, and only the ranks need it.
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
FIRST, MORE = 5, 20
CASES = {
    **{f"zero {stage}, low rank": (stage, {"method": "low_rank", "rank": 2}, {}) for stage in range(4)},
    **{f"zero {stage}, 4 bits": (stage, {"method": "quantized", "bits": 4}, {}) for stage in (1, 3)},
    "zero 2, int8 residuals": (2, {"method": "low_rank", "rank": 2, "residual_dtype": "int8"}, {}),
    "zero 1, BF16_Optimizer": (1, {"method": "low_rank", "rank": 2}, {"data_types": {"grad_accum_dtype": "fp32"}}),
}


def _engine(name: str) -> Any:
    from tests.deepspeed import engines

    stage, gradient, more = CASES[name]
    config = engines.ds_config(stage, gradient, bf16=bool(more), **more)
    config["commcomp"]["checkpoint"] = {"mode": "lossless"}
    return engines.make_engine(config)


def _uninterrupted(rank: int, folder: str) -> dict[str, list[float]]:
    from tests.deepspeed import engines

    losses = {}
    for name in CASES:
        engine = _engine(name)
        engines.train_engine(engine, range(FIRST))
        engine.save_checkpoint(f"{folder}/{name}", tag="last")
        losses[name] = engines.train_engine(engine, range(FIRST, FIRST + MORE))
    return losses


def _resumed(rank: int, folder: str) -> dict[str, list[float]]:
    from tests.deepspeed import engines

    losses = {}
    for name in CASES:
        engine = _engine(name)
        path, _ = engine.load_checkpoint(f"{folder}/{name}")
        assert path is not None
        assert engine.commcomp.gradients.step == FIRST
        losses[name] = engines.train_engine(engine, range(FIRST, FIRST + MORE))
    return losses


@cache
def both(folder: str) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Losses of the run that went on, and of the one that began anew from its checkpoint."""
    return run_ranks(_uninterrupted, 2, folder)[0], run_ranks(_resumed, 2, folder)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("case", CASES)
def test_the_next_losses_are_those_of_the_run_that_went_on(case: str, folder: Path) -> None:
    went_on, resumed = both(str(folder))
    assert resumed[case] == pytest.approx(went_on[case], rel=1e-6)
    assert len(resumed[case]) == MORE
