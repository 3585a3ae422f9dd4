"""What stats() says against what really was handed to collectives and what really is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from commcomp import Dense, LowRank
from commcomp.exchange import mean, owner
from tests import ddp_training as t
from tests.ranks import run_ranks

FACTORS = 2
"""rank of every LowRank here"""

MATRICES = {"layers.0.weight": (16, 16), "layers.1.weight": (16, 16), "head.weight": (6, 16)}
VECTOR_VALUES = 16 + 16 + 16 + 16 + 6
"""two layers' biases, the norm's weight and bias, the head's bias"""


def _model() -> t.Net:
    return t.Net(depth=2)


class Counting:
    """Counts the bytes of what this process gives to the real collectives of a step, and of its messages to others.

    all_gather of lists is not among them: by that ranks agree on where they start, once.
    """

    SENT = ((dist, "all_reduce", 0), (mean, "all_gather", 1), (owner, "all_to_all", 1), (dist, "isend", 0))
    """Where a function is looked up, its name, and which of its arguments is sent."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        for place, name, index in self.SENT:
            setattr(place, name, self._wrapped(name, index, getattr(place, name)))

    def _wrapped(self, name: str, index: int, real: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            sent = arguments[index]
            self.calls.append((name, sent.numel() * sent.element_size()))
            return real(*arguments, **options)

        return counted

    @property
    def bytes(self) -> int:
        return sum(size for name, size in self.calls if name != "isend")


def _counted(rank: int, cap: float, method: Any, steps: int, options: dict[str, Any], ddp: dict[str, Any]) -> Any:
    model, state = t.wrap(_model(), method, bucket_cap_mb=cap, ddp=ddp, **options)
    counting = Counting()
    per_step = []
    for step in range(steps):
        before = counting.bytes
        t.train(model, rank, 1, first=step)
        per_step.append(counting.bytes - before)
    return state.stats(), per_step, counting.calls


CASES = {
    "fp32": LowRank(rank=FACTORS),
    "fp32 alternating": LowRank(rank=FACTORS, rounds=1),
    "int8": LowRank(rank=FACTORS, factor_dtype="int8"),
    "int8 alternating": LowRank(rank=FACTORS, factor_dtype="int8", rounds=1),
    "bf16": LowRank(rank=FACTORS, factor_dtype="bf16", dense_dtype="bf16"),
    "dense fp32": Dense(),
    "dense fp16": Dense("fp16"),
}


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("cap", [t.ONE, t.MANY], ids=["one", "many"])
@pytest.mark.parametrize("case", CASES)
def test_payload_bytes_are_those_that_collectives_were_given(case: str, cap: float, num_ranks: int) -> None:
    for stats, per_step, calls in run_ranks(_counted, num_ranks, cap, CASES[case], 4, {"start_step": 1}, {}):
        assert stats["payload_bytes"] == sum(per_step)
        on_a_ring = sum(2 * (num_ranks - 1) * size // num_ranks for name, size in calls if name == "all_reduce")
        assert stats["wire_bytes"] == on_a_ring + sum(size for name, size in calls if name == "isend")
        assert (stats["steps"], stats["compressed_steps"], stats["skipped_steps"]) == (4, 3, 0)
        plain = 4 * (sum(n * m for n, m in MATRICES.values()) + VECTOR_VALUES)
        assert per_step[0] == plain, "before start_step everything travels dense"
        assert stats["dense_wire_bytes"] == 4 * (2 * (num_ranks - 1) * plain // num_ranks)
        assert stats["ratio"] == stats["dense_wire_bytes"] / stats["wire_bytes"]


def test_the_flags_of_unused_parameters_are_counted_too() -> None:
    ddp = {"find_unused_parameters": True}
    for stats, per_step, _ in run_ranks(_counted, 2, t.ONE, CASES["int8"], 3, {}, ddp):
        assert stats["payload_bytes"] == sum(per_step)


def _left(rank: int = FACTORS) -> int:
    return rank * sum(n for n, _ in MATRICES.values())


def _right(rank: int = FACTORS) -> int:
    return rank * sum(m for _, m in MATRICES.values())


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_bytes_of_fp32_factors_are_the_formula(num_ranks: int) -> None:
    """All-reduce: N values in, 2 (N-1)/N of them on the wire."""
    for stats, per_step, _ in run_ranks(_counted, num_ranks, t.ONE, CASES["fp32"], 3, {}, {}):
        payload = [4 * (_left() + VECTOR_VALUES), 4 * _right()]
        assert per_step == [sum(payload)] * 3
        assert stats["wire_bytes"] == 3 * sum(2 * (num_ranks - 1) * part // num_ranks for part in payload)
    for _, per_step, calls in run_ranks(_counted, num_ranks, t.ONE, CASES["fp32 alternating"], 4, {}, {}):
        even, odd = 4 * (_left() + VECTOR_VALUES), 4 * (_right() + VECTOR_VALUES)
        assert per_step == [even, odd, even, odd]
        assert {name for name, _ in calls} == {"all_reduce"}


def test_bytes_of_int8_factors_are_the_formula_on_two_ranks() -> None:
    """All-gather of one byte a value, a 4-byte scale for each factor column, 4 bytes a dense value."""
    scales = 4 * FACTORS * len(MATRICES)
    even, odd = _left() + scales + 4 * VECTOR_VALUES, _right() + scales + 4 * VECTOR_VALUES
    for stats, per_step, calls in run_ranks(_counted, 2, t.ONE, CASES["int8 alternating"], 4, {}, {}):
        assert per_step == [even, odd, even, odd], "every block here has a multiple of 4 values"
        assert stats["wire_bytes"] == sum(per_step), "to one other rank"
        assert {name for name, _ in calls} == {"all_gather", "isend"}


def test_bytes_of_int8_factors_are_the_formula_on_three_ranks() -> None:
    """Two-shot: each rank owns a third of every row, rounded up; one slice goes to each other rank, one comes back."""

    def slice_bytes(batches: list[tuple[int, int]]) -> int:
        factors = sum(-(-rows * -(-length // 3) // 4) * 4 + 4 * rows for rows, length in batches)
        return factors + 4 * -(-VECTOR_VALUES // 3)

    # the two equal layers share a batch: four rows of 16, and two rows of the head
    odd = slice_bytes([(2 * FACTORS, 16), (FACTORS, 16)])
    for stats, per_step, calls in run_ranks(_counted, 3, t.ONE, CASES["int8 alternating"], 2, {}, {}):
        even = slice_bytes([(2 * FACTORS, 16), (FACTORS, 6)])
        assert per_step == [4 * even, 4 * odd]
        assert stats["wire_bytes"] == 4 * (even + odd)
        assert [name for name, _ in calls if name != "isend"] == ["all_to_all", "all_gather"] * 2


@pytest.mark.parametrize("case", ["fp32", "fp32 alternating", "bf16", "dense fp32"])
def test_parameters_add_up_to_the_totals(case: str) -> None:
    for stats, _, _ in run_ranks(_counted, 2, t.ONE, CASES[case], 4, {}, {}):
        parameters = stats["parameters"]
        assert len(parameters) == 3 + 5
        assert 4 * sum(entry["wire_bytes"] for entry in parameters.values()) == stats["wire_bytes"]
        assert 4 * sum(entry["dense_wire_bytes"] for entry in parameters.values()) == stats["dense_wire_bytes"]
        wanted = {name for name in MATRICES} if case != "dense fp32" else set()
        assert {name for name, entry in parameters.items() if entry["method"] == "low_rank"} == wanted


@pytest.mark.parametrize(("residual_dtype", "item_bytes"), [("fp32", 4), ("bf16", 2), ("int8", 1)])
@pytest.mark.parametrize("rounds", [1, 2])
def test_memory_bytes_are_exact(rounds: int, residual_dtype: str, item_bytes: int) -> None:
    options = {"residual_dtype": residual_dtype}
    method = LowRank(rank=FACTORS, rounds=rounds)
    for stats, _, _ in run_ranks(_counted, 2, t.MANY, method, 3, options, {}):
        values = sum(n * m for n, m in MATRICES.values())
        blocks = sum(-(-n * m // 128) for n, m in MATRICES.values())
        coded = blocks * 128 + sum(-(-2 * -(-n * m // 128) // 4) * 4 for n, m in MATRICES.values())
        warm = _right() + (_left() if rounds == 1 else 0)
        assert stats["memory_bytes"] == {
            "residual": coded if residual_dtype == "int8" else values * item_bytes,
            "warm_start": 4 * warm,
            "planned": stats["memory_bytes"]["residual"] + 4 * warm,
        }


def _errors(rank: int, method: LowRank, measure_every: int, steps: int) -> Any:
    module = _model()
    model, state = t.wrap(module, method, measure_every=measure_every)
    before = state.stats()
    x = t.inputs(rank, 0)
    true = {}
    for _ in range(steps):
        model.zero_grad()
        owed = t.residuals(state)
        reference = t.Ledger(module).expect(x)
        t.backward(model, x)
        left = t.residuals(state)
        true = {name: (reference[name].view(value.shape) + value, left[name]) for name, value in owed.items()}
    return before, state.stats(), true


def test_relative_error_is_that_of_this_rank_at_the_last_measured_step() -> None:
    for before, stats, true in run_ranks(_errors, 2, LowRank(rank=1), 1, 3):
        assert before["relative_error"] is None
        for name, (total, kept) in true.items():
            wanted = float(kept.norm() / total.norm())
            assert 0 < wanted < 1
            assert stats["parameters"][name]["relative_error"] == pytest.approx(wanted, rel=1e-3)
        kept, total = (sum(float(pair[i].norm()) ** 2 for pair in true.values()) for i in (1, 0))
        assert stats["relative_error"] == pytest.approx((kept / total) ** 0.5, rel=1e-3)
        assert stats["parameters"]["norm.weight"]["relative_error"] is None


def test_relative_error_is_nought_at_full_rank_and_none_if_never_measured() -> None:
    for _, stats, _ in run_ranks(_errors, 2, LowRank(rank=16, min_ratio=0), 1, 2):
        assert stats["relative_error"] < 1e-5
    for _, stats, _ in run_ranks(_errors, 2, LowRank(rank=1), 0, 2):
        assert stats["relative_error"] is None
        assert all(entry["relative_error"] is None for entry in stats["parameters"].values())


def _skipped(rank: int) -> Any:
    """The first and the third step hold an Inf on rank 1 only."""
    model, state = t.wrap(_model(), LowRank(rank=1))
    for step in range(4):
        model.zero_grad()
        factor = float("inf") if rank == 1 and step in (0, 2) else 1.0
        t.backward(model, t.inputs(rank, step), factor=factor)
    return state.stats()


def test_skipped_steps_are_counted_and_the_error_is_measured_at_the_first_good_one() -> None:
    for stats in run_ranks(_skipped, 2):
        assert (stats["steps"], stats["skipped_steps"]) == (4, 2)
        assert stats["relative_error"] is not None, "the step to be measured was skipped, and no later one was taken"


def _alone(rank: int) -> Any:
    model, state = t.wrap(_model(), LowRank(rank=1, factor_dtype="int8"))
    t.train(model, rank, 2)
    return state.stats()


def test_a_single_rank_sends_nothing() -> None:
    stats = run_ranks(_alone, 1)[0]
    assert stats["payload_bytes"] == stats["wire_bytes"] == stats["dense_wire_bytes"] == 0
    assert stats["ratio"] == 1.0
