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
    gather_difference: bool = True


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


_SHARDED_GRADIENTS: dict[str, dict[str, Any]] = {
    "8 bits": {"method": "quantized", "bits": 8, "dense_dtype": "bf16"},
    "4 bits": {"method": "quantized", "bits": 4, "rotate": True, "dense_dtype": "bf16"},
    "sparse 1 %": {"method": "sparse", "layers": "all", "density": 0.01, "dense_dtype": "bf16"},
    "sparse 10 %": {
        "method": "sparse", "layers": "all", "density": 0.1, "value_dtype": "int8", "dense_dtype": "bf16"
    },
    "sparse 25 %": {
        "method": "sparse", "layers": "all", "density": 0.25, "value_dtype": "int8", "dense_dtype": "bf16"
    },
    "sparse 50 %": {
        "method": "sparse", "layers": "all", "density": 0.5, "value_dtype": "int8", "dense_dtype": "bf16"
    },
    "rank 16": {"method": "low_rank", "rank": 16, "factor_dtype": "int8", "dense_dtype": "bf16"},
    "rank 4": {"method": "low_rank", "rank": 4, "factor_dtype": "int8", "dense_dtype": "bf16"},
}
"""What crosses in place of whole gradients, on shards."""


def _sharded(parallel: str) -> tuple[BenchmarkMethod, ...]:
    """Rows of one way of sharding: torch's own, what is sent whole, and ours by what is sent."""

    def row(name: str, gradient: dict[str, Any], **more: Any) -> BenchmarkMethod:
        return BenchmarkMethod(f"{name}, {parallel}", gradient, parallel=parallel, **more)

    rows = [
        row("no reduction", {"method": "no_communication"}),
        row("plain", {"method": "none"}),
        row("commcomp fp32", {"method": "dense", "dtype": "fp32"}),
        row("commcomp bf16", {"method": "dense", "dtype": "bf16"}),
        *(row(f"commcomp {name}", gradient) for name, gradient in _SHARDED_GRADIENTS.items()),
    ]
    if parallel == "fsdp2":
        rank = _SHARDED_GRADIENTS["rank 16"]
        rows += [row(f"commcomp rank 16, gathers {bits} bits", rank, gather_bits=bits) for bits in (8, 4)]
    return tuple(rows)


_RESIDUALS = {
    "fp32": ("8 bits", "4 bits", "sparse 1 %", "sparse 10 %", "sparse 25 %", "rank 16"),
    "none": ("8 bits", "4 bits", "sparse 1 %", "rank 16"),
    "int8": ("8 bits", "4 bits", "sparse 25 %", "rank 16"),
    "bf16": ("4 bits", "rank 16"),
}
"""Which methods the table of losses has with each kind of residual."""

_SPARSE_WITH_CARE: dict[str, dict[str, Any]] = {
    "sparse 50 %": {"layers": "all", "density": 0.5},
    "sparse 25 %, 60 dense steps": {"layers": "all", "density": 0.25, "start_step": 60},
    "sparse 25 %, attention whole": {"layers": "transformer", "density": 0.25},
    "sparse 10 %, attention whole, 60 dense steps": {"layers": "transformer", "density": 0.1, "start_step": 60},
}
"""What brings sparse values nearer to plain: more of them, whole gradients at first, and for attention."""


def _losses() -> tuple[BenchmarkMethod, ...]:
    """Rows of the table of losses: methods by residual, and plain gradients with rounded gathers."""
    rows = [BenchmarkMethod("plain", {"method": "none"}, parallel="fsdp2")]
    for residual, names in _RESIDUALS.items():
        for name in names:
            gradient = _SHARDED_GRADIENTS[name]
            # Without a residual only rounding that is right on average does not add up.
            unbiased = {"rounding": "stochastic"} if residual == "none" and "bits" in gradient else {}
            settings = {**gradient, "residual_dtype": residual, **unbiased}
            rows.append(BenchmarkMethod(f"{name}, residual {residual}", settings, parallel="fsdp2"))
    for name, settings in _SPARSE_WITH_CARE.items():
        gradient = {**_SHARDED_GRADIENTS["sparse 10 %"], **settings}
        rows.append(BenchmarkMethod(name, gradient, parallel="fsdp2"))
    for bits, difference in ((8, False), (8, True), (4, True)):
        gathers = {"gather_bits": bits, "gather_difference": difference}
        name = f"plain, gathers {bits} bits" + (" of the difference" if difference else "")
        rows.append(BenchmarkMethod(name, {"method": "none"}, parallel="fsdp2", **gathers))
    return tuple(rows)


SHARDED: dict[str, tuple[BenchmarkMethod, ...]] = {parallel: _sharded(parallel) for parallel in ("fsdp2", "hsdp")}
LOSSES = _losses()


def plain_of(parallel: str) -> BenchmarkMethod:
    """The row of torch's own synchronisation."""
    return PLAIN if parallel == "ddp" else by_name(f"plain, {parallel}")


def idle_of(parallel: str) -> BenchmarkMethod:
    """The row in which nothing is reduced."""
    return NO_COMMUNICATION if parallel == "ddp" else by_name(f"no reduction, {parallel}")


def two_shot_of(parallel: str, dtype: str) -> BenchmarkMethod:
    """The row of a sharded model whose gradients cross whole in `dtype`, straight to their owners."""
    return by_name(f"commcomp {dtype}, {parallel}")


def by_name(name: str) -> BenchmarkMethod:
    """By the row's name or by its slug (`slug`). Raises ValueError naming the known rows."""
    known = {slug(row.name): row for row in (*METHODS, *SHARDED["fsdp2"], *SHARDED["hsdp"], *LOSSES)}
    if slug(name) not in known:
        raise ValueError(f"unknown benchmark method {name!r}; known: {', '.join(known)}")
    return known[slug(name)]


def slug(name: str) -> str:
    """The name of a row as a shell and a file system like it: "sparse 1 %, hsdp" is sparse-1-percent-hsdp."""
    return "-".join(name.lower().replace(",", " ").replace("%", "percent").split())
