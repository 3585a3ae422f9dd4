"""What may go on around a compressed engine: accumulation, BF16_Optimizer, offload, several engines, bad numbers."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest

from tests.ranks import run_ranks

# Not imported here: that takes seconds, and only the ranks need it.
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

LOW_RANK = {"method": "low_rank", "rank": 2}
DENSE = {"method": "dense"}
STEPS = 5
BF16_OPTIMIZER = {"bf16": True, "data_types": {"grad_accum_dtype": "fp32"}}
ACCUMULATION = {"gradient_accumulation_steps": 2}
OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
MODES: dict[str, tuple[int, dict[str, Any], int]] = {
    **{f"zero {stage}, 2 micro-batches": (stage, ACCUMULATION, 2) for stage in range(4)},
    "BF16_Optimizer": (1, BF16_OPTIMIZER, 1),
    "BF16_Optimizer, 2 micro-batches": (1, {**BF16_OPTIMIZER, **ACCUMULATION}, 2),
    "zero 2 bf16, gradients in fp32, 2 micro-batches": (2, {**BF16_OPTIMIZER, **ACCUMULATION}, 2),
    **{f"zero {stage}, offload": (stage, OFFLOAD, 1) for stage in (1, 2, 3)},
    "zero 1, overlap": (1, {"zero": {"overlap_comm": True}}, 1),
    "zero 2, overlap": (2, {"zero": {"overlap_comm": True}}, 1),
    "zero 2, small buckets": (2, {"zero": {"reduce_bucket_size": 3000}}, 1),
    "zero 3, small buckets": (3, {"zero": {"reduce_bucket_size": 3000}}, 1),
    "zero 1, round robin": (1, {"zero": {"round_robin_gradients": True}}, 1),
    "zero 0, clipped": (0, {"gradient_clipping": 0.1}, 1),
    "zero 2, clipped": (2, {"gradient_clipping": 0.1}, 1),
    "zero 3, clipped": (3, {"gradient_clipping": 0.1}, 1),
    "zero 0, sum": (0, {"gradient_allreduce_op": "sum"}, 1),
}


def _modes(rank: int) -> dict[str, dict[str, Any]]:
    from tests.deepspeed import engines

    made: dict[str, dict[str, Any]] = {}
    for name, (stage, more, micro_batches) in MODES.items():
        for method, gradient in (("plain", None), ("dense", DENSE), ("low rank", LOW_RANK)):
            engine = engines.make_engine(engines.ds_config(stage, gradient, **more))
            entry: dict[str, Any] = {"losses": engines.train_engine(engine, range(STEPS), micro_batches)}
            entry["same"] = engines.same_on_all_ranks(engine)
            if gradient is not None:
                stats = engine.commcomp.stats()["gradient"]
                entry.update(steps=stats["steps"], ratio=stats["ratio"], optimizer=type(engine.optimizer).__name__)
            made[f"{name}: {method}"] = entry
    return made


@cache
def modes() -> dict[str, dict[str, Any]]:
    """By mode and method."""
    return run_ranks(_modes, 2)[0]


@pytest.mark.parametrize("mode", MODES)
def test_dense_is_plain_in_every_mode(mode: str) -> None:
    plain, dense = (modes()[f"{mode}: {method}"] for method in ("plain", "dense"))
    assert dense["losses"] == pytest.approx(plain["losses"], rel=2e-3 if "bf16" in mode.lower() else 1e-6)
    assert dense["same"]


@pytest.mark.parametrize("mode", MODES)
def test_low_rank_is_compressed_in_every_mode(mode: str) -> None:
    stage, _, micro_batches = MODES[mode]
    entry = modes()[f"{mode}: low rank"]
    flat = "BF16_Optimizer" in mode and stage == 1
    assert entry["steps"] == STEPS * (micro_batches if stage >= 2 else 1)
    assert entry["ratio"] > 2.5
    assert entry["same"]
    assert (entry["optimizer"] == "BF16_Optimizer") == flat
    assert entry["losses"][-1] < entry["losses"][0]


def test_a_method_does_in_every_mode_what_it_does_in_the_plainest() -> None:
    """Offload, overlap, small buckets and the order of partitions change nothing."""
    alike = {1: ("offload", "overlap", "round robin"), 2: ("overlap", "small buckets"), 3: ("offload", "small buckets")}
    for stage, names in alike.items():
        found = [modes()[f"zero {stage}, {name}: low rank"]["losses"] for name in names]
        for losses in found[1:]:
            assert losses == pytest.approx(found[0], rel=1e-6)


def _several(rank: int) -> dict[str, Any]:
    import torch

    import commcomp
    from tests.deepspeed import engines

    made: dict[str, Any] = {}
    for stage in (0, 2, 3):
        alone = engines.train_engine(engines.make_engine(engines.ds_config(stage, LOW_RANK)), range(STEPS))
        plain = engines.train_engine(engines.make_engine(engines.ds_config(stage, None)), range(STEPS))
        ours, theirs = (engines.make_engine(engines.ds_config(stage, one)) for one in (LOW_RANK, None))
        both: tuple[list[float], list[float]] = ([], [])
        for step in range(STEPS):
            for losses, engine in zip(both, (ours, theirs), strict=True):
                losses += engines.train_engine(engine, range(step, step + 1))
        made[f"several {stage}"] = (alone, plain, *both, hasattr(theirs, "commcomp"))
        try:
            commcomp.deepspeed.attach(ours)
        except ValueError as error:
            made[f"again {stage}"] = str(error)
        made[f"bad number {stage}"] = _bad_number(stage)
        made[f"raised {stage}"] = _raised(stage)
    odd = engines.make_engine(engines.ds_config(3, LOW_RANK), engines.make_model(inner=33))
    made["odd"] = (
        engines.train_engine(odd, range(STEPS)),
        engines.train_fsdp2(LOW_RANK, STEPS, inner=33),
        odd.commcomp.gradients.effective["odd.weight"].method,
    )
    enlarging = {"method": "low_rank", "rank": 32, "min_ratio": 0.0, "start_step": 1}
    engine = engines.make_engine(engines.ds_config(2, enlarging))
    engines.train_engine(engine, range(1))
    try:
        engines.train_engine(engine, range(1, 2))
    except RuntimeError as error:
        made["enlarging"] = str(error)
    model = engines.make_model()
    model.unused = torch.nn.Linear(64, 64)
    unused = engines.make_engine(engines.ds_config(1, LOW_RANK), model)
    made["unused"] = engines.train_engine(unused, range(STEPS))
    return made


def _bad_number(stage: int) -> tuple[bool, bool, bool]:
    """Whether a NaN on rank 1 reached every rank's weights, residuals stayed finite, and none of them moved."""
    import torch

    from tests.deepspeed import engines

    engine = engines.make_engine(engines.ds_config(stage, LOW_RANK))
    engines.train_engine(engine, range(2))
    state = engine.commcomp.gradients
    before = {key: value.clone() for key, value in state.state_dict().items()}
    loss = engine(*engines.batch(2, torch.distributed.get_rank()))
    engine.backward(loss * (float("nan") if torch.distributed.get_rank() == 1 else 1.0))
    engine.step()
    after = state.state_dict()
    kept = [key for key in before if "/residual/" in key or key.startswith("warm")]
    whole = engines.whole_weights(engine)
    reached = engine.skipped_steps == 1 or any(not value.isfinite().all() for value in whole)
    return (
        reached,
        all(bool(after[key].isfinite().all()) for key in kept),
        all(torch.equal(before[key], after[key]) for key in kept),
    )


def _raised(stage: int) -> tuple[list[float], list[float]]:
    """Losses after a backward pass that raised half-way on all ranks, and without it."""
    from tests.deepspeed import engines

    found = []
    for fails in (True, False):
        engine = engines.make_engine(engines.ds_config(stage, LOW_RANK))
        losses = engines.train_engine(engine, range(2))
        if fails:
            engines.fail_in_backward(engine)
        found.append(losses + engines.train_engine(engine, range(2, STEPS)))
    return found[0], found[1]


@cache
def several() -> dict[str, Any]:
    """What happened to engines that share a process."""
    return run_ranks(_several, 2)[0]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_engines_in_one_process_do_not_know_of_each_other(stage: int) -> None:
    alone, plain, ours, theirs, theirs_has_ours = several()[f"several {stage}"]
    assert ours == alone
    assert theirs == plain
    assert not theirs_has_ours
    assert "attached" not in several()[f"again {stage}"] and "already" in several()[f"again {stage}"]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_bad_number_reaches_the_optimizer_and_harms_no_residual(stage: int) -> None:
    assert several()[f"bad number {stage}"] == (True, True, True)


@pytest.mark.parametrize("stage", [0])
def test_a_backward_pass_that_raised_leaves_nothing_behind(stage: int) -> None:
    after, without = several()[f"raised {stage}"]
    assert after == without


def test_a_matrix_cut_inside_its_rows_is_compressed_too() -> None:
    losses, fsdp2, method = several()["odd"]
    assert method == "low_rank"
    assert losses == pytest.approx(fsdp2, rel=1e-5)


def test_sending_more_than_plain_is_an_error_in_the_first_compressed_step() -> None:
    assert "first compressed step sent" in several()["enlarging"]


def test_unused_parameters_stop_nobody() -> None:
    losses = several()["unused"]
    assert losses[-1] < losses[0]
