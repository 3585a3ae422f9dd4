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
    "two backwards": ((0, 3), "two_backwards", "", {}),
    "two forwards": ((1, 3), "two_forwards", "", {}),
    "loss.backward": ((1, 2, 3), "as_in_torch", "", {}),
    "boundaries": ((0, 2), "boundaries", "", TWO),
    "reentrant": ((0, 1, 2, 3), "simple", "reentrant", {}),
    "tied": ((0, 3), "simple", "tied", TWO),
    "partly frozen": ((1, 3), "simple", "partly_frozen", {}),
    "used at first": ((0, 1, 2, 3), "simple", "in_first_micro_batch", TWO),
    "offload": ((1, 2, 3), "simple", "", {**OFFLOAD, **TWO}),
    "overlap": ((1, 2), "simple", "", {**OVERLAP, **TWO}),
    "hpZ": ((3,), "simple", "", HPZ),
    "autocast": ((0, 1, 2, 3), "simple", "", AUTOCAST),
    "copied": ((0, 2), "copied", "", {}),
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


SEQUENCE = {"sequence_parallel_size": 2, "data_parallel_size": 1}
FP32_SUMS = {"bf16": True, "data_types": {"grad_accum_dtype": "fp32"}}


def _more(rank: int) -> dict[str, Any]:
    from tests.deepspeed import engines, loops

    def losses(stage: int, method: str, model: str = "", body: str = "simple", **more: Any) -> dict[str, Any]:
        engine = engines.make_engine(engines.ds_config(stage, METHODS[method], **more), _model(model))
        return loops.run(engine, getattr(loops, body))

    made: dict[str, Any] = {}
    for name, method, stages in (("unused", "plain", (0,)), ("unused", "dense", (1, 2))):
        made.update({f"{name} {stage}": losses(stage, method, "on_one_rank") for stage in stages})
    made["overlap"] = losses(1, "dense", "in_first_micro_batch", **OVERLAP, **TWO)
    made["no overlap"] = losses(1, "plain", "in_first_micro_batch", **TWO)
    for stage in (0, 1, 2, 3):
        made[f"bf16 {stage}"] = losses(stage, "dense", bf16=True)
    for stage in (1, 2):
        made[f"fp32 sums {stage}"] = losses(stage, "dense", **FP32_SUMS)
    made["sent in bf16"] = losses(0, "dense", communication_data_type="bf16")
    made["fp32"] = losses(0, "dense")
    for stage in (0, 1, 2):
        made[f"destroyed {stage}"] = _destroyed(stage)
    for stage in (0, 1, 2, 3):  # last: these groups stay
        for method in ("plain", "dense"):
            made[f"sequence {stage} {method}"] = losses(stage, method, **SEQUENCE)
    return made


def _destroyed(stage: int) -> tuple[int, int, list[float]]:
    """Hooks on a model's parameters before and after its engine is destroyed, and losses of the next engine of it."""
    from tests.deepspeed import engines

    def hooks(model: Any) -> int:
        return sum(len(value._post_accumulate_grad_hooks or ()) for value in model.parameters())

    engine = engines.make_engine(engines.ds_config(stage, METHODS["low rank"]))
    engines.train_engine(engine, range(1))
    before, model = hooks(engine.module), engine.module
    engine.destroy()
    after = hooks(model)
    return before, after, engines.train_engine(engines.make_engine(engines.ds_config(stage, None), model), range(2))


@cache
def more() -> dict[str, Any]:
    """By what is special."""
    return run_ranks(_more, 2)[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_what_one_rank_does_not_use_is_averaged_with_zeros(stage: int) -> None:
    assert more()[f"unused {stage}"]["losses"] == pytest.approx(more()["unused 0"]["losses"], rel=1e-5)


def test_an_earlier_micro_batchs_gradient_is_not_lost_under_overlap() -> None:
    assert more()["overlap"]["losses"] == pytest.approx(more()["no overlap"]["losses"], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_of_one_sequence_are_weighted_as_plain(stage: int) -> None:
    plain, dense = (more()[f"sequence {stage} {method}"] for method in ("plain", "dense"))
    assert dense["losses"] == pytest.approx(plain["losses"], rel=1e-5)


def test_plain_is_in_the_dtype_that_deepspeed_sends() -> None:
    made = more()
    plain = {name: made[name].get("dense_wire_bytes") for name in made if isinstance(made[name], dict)}
    for name in ("bf16 0", "bf16 1", "bf16 2", "fp32 sums 1", "fp32 sums 2", "sent in bf16"):
        assert plain[name] == pytest.approx(plain["fp32"] / 2, rel=0.01), name
        assert made[name]["ratio"] == pytest.approx(1.0, abs=0.01), name
    assert plain["bf16 3"] == pytest.approx(plain["fp32"] / 4, rel=0.01)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_destroyed_engine_lets_go_of_its_model(stage: int) -> None:
    before, after, losses = more()[f"destroyed {stage}"]
    assert before > after == 0
    assert losses[1] < losses[0]


def _on_three(rank: int) -> dict[tuple[int, str], dict[str, Any]]:
    from tests.deepspeed import engines, loops

    made = {}
    for stage in (2, 3):
        for name, gradient in METHODS.items():
            engine = engines.make_engine(engines.ds_config(stage, gradient, **TWO))
            made[stage, name] = loops.run(engine, loops.simple)
    return made


def test_three_ranks_with_pieces_of_unequal_length() -> None:
    made = run_ranks(_on_three, 3)[0]
    for stage in (2, 3):
        assert made[stage, "dense"]["losses"] == pytest.approx(made[stage, "plain"]["losses"], rel=1e-5)
        assert made[stage, "low rank"]["same"] and made[stage, "dense"]["same"]
    assert made[3, "low rank"]["losses"] == pytest.approx(made[2, "low rank"]["losses"], rel=1e-4)
