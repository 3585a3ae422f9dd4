"""Engines whose model has experts: the rest's gradients are compressed, experts' are averaged as DeepSpeed does."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest

from tests.ranks import run_ranks

# Not imported here: that takes seconds, and only the ranks need it.
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
CASES = [(stage, ep_size) for stage in (0, 1, 2) for ep_size in (1, 2)]
BOTH = {"gradient": {"method": "low_rank", "rank": 2}, "moe": {"quantized": {"dtype": "int8"}}}


def _cases(rank: int) -> dict[tuple[int, int], dict[str, Any]]:
    from tests.deepspeed import moe_training

    moe_training.start()
    import commcomp.deepspeed

    made: dict[tuple[int, int], dict[str, Any]] = {}
    for stage, ep_size in CASES:
        found: dict[str, Any] = {}
        for name, block in (("plain", None), ("dense", {"gradient": {"method": "dense"}}), ("both", BOTH)):
            engine = moe_training.engine_of(moe_training.Model(ep_size=ep_size), stage)
            if block is not None:
                commcomp.deepspeed.attach(engine, block if ep_size > 1 else {"gradient": block["gradient"]})
            found[name] = moe_training.train(engine, 10)
            if name == "both":
                found["stats"] = engine.commcomp.stats()
        made[stage, ep_size] = found
    return made


@cache
def cases() -> dict[tuple[int, int], dict[str, Any]]:
    """By stage and expert-parallel size."""
    return run_ranks(_cases, 2)[0]


@pytest.mark.parametrize(("stage", "ep_size"), CASES)
def test_dense_is_plain_deepspeed(stage: int, ep_size: int) -> None:
    found = cases()[stage, ep_size]
    assert found["dense"] == pytest.approx(found["plain"], rel=1e-6)


@pytest.mark.parametrize(("stage", "ep_size"), CASES)
def test_gradients_and_tokens_are_compressed_together(stage: int, ep_size: int) -> None:
    found = cases()[stage, ep_size]
    assert found["both"][-1] < found["both"][0]
    assert found["stats"]["gradient"]["ratio"] > 1.2
    assert not any("expert" in name for name in found["stats"]["gradient"]["parameters"])
    assert ep_size == 1 or found["stats"]["moe"]["ratio"] > 3
