"""However an engine is driven, and whatever its model is like: what plain DeepSpeed gives, and compressed."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest

from tests.ranks import run_ranks

# Not imported here: that takes seconds, and only the ranks need it.
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "dense": {"method": "dense"},
    "low rank": {"method": "low_rank", "rank": 2},
}
TWO = {"gradient_accumulation_steps": 2}
UNTIL_STEP = {"managed_gradient_accumulation": False, **TWO}
OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
OVERLAP = {"zero": {"overlap_comm": True}}
HPZ = {"zero": {"zero_hpz_partition_size": 2}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
# By stage: the body of a step, the model (a name in tests/deepspeed/loops.py), and the configuration.
CASES: dict[str, tuple[tuple[int, ...], str, str, dict[str, Any]]] = {
    "no_sync": ((0, 1), "no_sync", "", {}),
    "coalesced": ((1, 2, 3), "coalesced", "", {}),
    "until step": ((0, 1, 2, 3), "until_step", "", UNTIL_STEP),
    "two backwards": ((0, 1, 2, 3), "two_backwards", "", {}),
    "two forwards": ((0, 1, 2, 3), "two_forwards", "", {}),
    "loss.backward": ((1, 2, 3), "as_in_torch", "", {}),
    "boundaries": ((0, 1, 2, 3), "boundaries", "", TWO),
    "reentrant": ((0, 1, 2, 3), "simple", "reentrant", {}),
    "tied": ((0, 1, 2, 3), "simple", "tied", TWO),
    "partly frozen": ((0, 1, 2, 3), "simple", "partly_frozen", {}),
    "used at first": ((0, 1, 2, 3), "simple", "in_first_micro_batch", TWO),
    "offload": ((1, 2, 3), "simple", "", {**OFFLOAD, **TWO}),
    "overlap": ((1, 2), "simple", "", {**OVERLAP, **TWO}),
    "hpZ": ((3,), "simple", "", HPZ),
    "autocast": ((0, 1, 2, 3), "simple", "", AUTOCAST),
    "copied": ((0, 1, 2), "copied", "", {}),
}
PAIRS = [(case, stage) for case, (stages, *_) in CASES.items() for stage in stages]


def _model(name: str) -> Any:
    from tests.deepspeed import engines, loops

    if not name:
        return engines.make_model()
    return getattr(loops, name)() if name in ("tied", "partly_frozen") else loops.special(getattr(loops, name))


def _runs(rank: int) -> dict[tuple[str, int, str], dict[str, Any]]:
    from tests.deepspeed import engines, loops

    made = {}
    for case, stage in PAIRS:
        _, body, model, more = CASES[case]
        for name, gradient in METHODS.items():
            engine = engines.make_engine(engines.ds_config(stage, gradient, **more), _model(model))
            made[case, stage, name] = loops.run(engine, getattr(loops, body))
    return made


@cache
def runs() -> dict[tuple[str, int, str], dict[str, Any]]:
    """By case, stage and method."""
    return run_ranks(_runs, 2)[0]


@pytest.mark.parametrize(("case", "stage"), PAIRS)
def test_dense_is_plain(case: str, stage: int) -> None:
    plain, dense = (runs()[case, stage, name] for name in ("plain", "dense"))
    assert dense["losses"] == pytest.approx(plain["losses"], rel=1e-3 if case == "autocast" else 1e-5)
    assert dense["same"]


@pytest.mark.parametrize(("case", "stage"), PAIRS)
def test_low_rank_is_compressed(case: str, stage: int) -> None:
    low_rank, dense = (runs()[case, stage, name] for name in ("low rank", "dense"))
    assert low_rank["ratio"] > 1.8
    assert low_rank["same"]
    assert low_rank["steps"] == dense["steps"]
    assert low_rank["losses"] != dense["losses"]
