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
    parallel: str = "ddp"
    """ddp, fsdp2 or hsdp."""
    gather_bits: int = 0
    """Of the parameters' all-gathers, see examples/train_gpt.py."""


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


def _sharded(parallel: str) -> tuple[BenchmarkMethod, ...]:
    """Rows of one way of sharding: torch's own, and ours by what is sent."""
    low_bits = {"method": "quantized", "dense_dtype": "bf16"}
    gradients = {
        "plain": {"method": "none"},
        "commcomp dense bf16": {"method": "dense", "dtype": "bf16"},
        "commcomp 8 bits": {**low_bits, "bits": 8},
        "commcomp 4 bits, rotated": {**low_bits, "bits": 4, "rotate": True},
        "commcomp sparse 1 %": {"method": "sparse", "density": 0.01, "dense_dtype": "bf16"},
        "commcomp rank 16 int8": {"method": "low_rank", "rank": 16, "factor_dtype": "int8", "dense_dtype": "bf16"},
    }
    rows = [BenchmarkMethod(f"{name}, {parallel}", gradient, parallel=parallel) for name, gradient in gradients.items()]
    for bits in (8, 4):
        name = f"commcomp 4 bits, rotated, gathers {bits} bits, {parallel}"
        gradient = gradients["commcomp 4 bits, rotated"]
        rows.append(BenchmarkMethod(name, gradient, parallel=parallel, gather_bits=bits))
    return tuple(rows)


SHARDED: dict[str, tuple[BenchmarkMethod, ...]] = {parallel: _sharded(parallel) for parallel in ("fsdp2", "hsdp")}


def plain_of(parallel: str) -> BenchmarkMethod:
    """The row of torch's own synchronisation."""
    return PLAIN if parallel == "ddp" else SHARDED[parallel][0]


def by_name(name: str) -> BenchmarkMethod:
    """Raises ValueError naming the known rows."""
    known = {method.name: method for method in (*METHODS, *SHARDED["fsdp2"], *SHARDED["hsdp"])}
    if name not in known:
        raise ValueError(f"unknown benchmark method {name!r}; known: {', '.join(known)}")
    return known[name]
