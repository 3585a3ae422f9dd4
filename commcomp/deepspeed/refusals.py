"""Which settings of DeepSpeed cannot go together with compressed gradients, told before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from commcomp.complaint import warn
from commcomp.deepspeed.engine_parts import NotSupported, zero_stage


def require_supported_engine(engine: Any, *, strict: bool) -> None:
    """Raise NotSupported naming every setting of the engine that cannot work, with what to do about each."""
    problems = list(_problems(engine))
    if problems:
        raise NotSupported("commcomp's gradient block does not go together with " + "; nor with ".join(problems))
    if strict and "communication_data_type" in (engine.config or {}):
        warn(
            "communication_data_type has no effect on gradients that commcomp sends: give a rule's method a dtype, as "
            'in {"params": "*", "method": "dense", "dtype": "bf16"}'
        )


def _problems(engine: Any) -> Iterator[str]:
    config, optimizer, stage = engine.config or {}, engine.optimizer, zero_stage(engine)
    zero = config.get("zero_optimization", {}) or {}
    if optimizer is None or not hasattr(optimizer, "param_groups"):
        yield "an engine without an optimizer: give deepspeed.initialize one, or name one in the configuration"
    if getattr(engine, "pipeline_parallelism", False):
        yield "a PipelineModule, whose engine reduces gradients by a schedule of its own: use plain data parallelism"
    if _says_yes(engine, "is_deepcompile_enabled") or _says_yes(engine, "is_deepcompile_active"):
        yield "DeepCompile, which reduces gradients inside compiled graphs: leave out compile.deepcompile"
    if getattr(engine, "zenflow", False):
        yield "ZenFlow, which reduces chosen columns itself: leave out zero_optimization.zenflow"
    if zero.get("zero_quantized_gradients"):
        yield "zero_quantized_gradients, another way to compress the same gradients: leave it out, and see Quantized"
    if stage in (1, 2) and not getattr(optimizer, "contiguous_gradients", True):
        yield "contiguous_gradients: false, another way through the optimizer: leave it out (true is the default)"
    if getattr(engine, "_autoep_folding_spec", None) is not None or config.get("expert_parallel"):
        yield "AutoEP (the block expert_parallel): use deepspeed.moe.layer.MoE"
    if "muon" in type(getattr(engine, "basic_optimizer", None)).__name__.lower():
        yield "Muon, which exchanges whole gradients itself: use another optimizer"
    if config.get("sparse_gradients"):
        yield "sparse_gradients: leave it out"
    if getattr(engine, "mpu", None) is not None and stage == 3:
        yield "tensor parallelism (mpu) under ZeRO 3: use ZeRO 1 or 2"


def _says_yes(engine: Any, name: str) -> bool:
    question = getattr(engine, name, None)
    return bool(question()) if callable(question) else bool(question)
