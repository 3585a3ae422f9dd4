"""The methods that benchmarks compare: ours, torch's, and the two ends (plain, no communication)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class BenchmarkMethod:
    """A row of the table: the `gradient` block of examples/train_gpt.py, and DDP's bucket size."""

    name: str
    gradient: dict[str, Any]
    bucket_cap_mb: float = 25
    micro_steps: int = 1
    """Gradient accumulation: batches per synchronisation."""
    equal_rank_baseline: str | None = field(default=None)
    """The row of torch's PowerSGD with the same rank, for ours."""


def _torch_powersgd(rank: int) -> BenchmarkMethod:
    gradient = {
        "method": "torch_powersgd",
        "rank": rank,
        "start_step": 2,
        "use_error_feedback": True,
        "warm_start": True,
        "orthogonalization_epsilon": 1e-8,
    }
    # One bucket: with two or more its collectives interleave on gloo and the process aborts.
    return BenchmarkMethod(f"torch PowerSGD rank {rank}", gradient, bucket_cap_mb=1000)


def _ours(rank: int, factor_dtype: str, rounds: int) -> BenchmarkMethod:
    gradient = {
        "method": "low_rank",
        "rank": rank,
        "factor_dtype": factor_dtype,
        "rounds": rounds,
        "start_step": 2,  # as torch's hook needs it, so that both begin alike
        "dense_dtype": "fp32" if factor_dtype == "fp32" else "bf16",
    }
    name = f"commcomp rank {rank} {factor_dtype}" + (", 1 round" if rounds == 1 else "")
    return BenchmarkMethod(name, gradient, equal_rank_baseline=f"torch PowerSGD rank {rank}")


NO_COMMUNICATION = BenchmarkMethod("no communication", {"method": "no_communication"})
PLAIN = BenchmarkMethod("plain DDP", {"method": "none"})
METHODS: tuple[BenchmarkMethod, ...] = (
    NO_COMMUNICATION,
    PLAIN,
    BenchmarkMethod("plain DDP, 8 batches a step", {"method": "none"}, micro_steps=8),
    BenchmarkMethod("torch fp16 hook", {"method": "torch_fp16"}),
    BenchmarkMethod("commcomp dense bf16", {"method": "dense", "dtype": "bf16"}),
    _torch_powersgd(4),
    _ours(4, "fp32", 2),
    _ours(4, "int8", 2),
    _ours(4, "int8", 1),
    _torch_powersgd(16),
    _ours(16, "fp32", 2),
    _ours(16, "int8", 2),
)


def by_name(name: str) -> BenchmarkMethod:
    """Raises ValueError naming the known rows."""
    for method in METHODS:
        if method.name == name:
            return method
    raise ValueError(f"unknown benchmark method {name!r}; known: {', '.join(method.name for method in METHODS)}")
