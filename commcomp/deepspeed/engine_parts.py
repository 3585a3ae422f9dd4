"""What is read of a DeepSpeed engine, in one place: optimizers, groups, names. What is not there is said by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from commcomp.deepspeed.zero_model import ZeroModel, ZeroParameter


class NotSupported(ValueError):
    """What cannot work in this engine, and what to do instead."""


def require(owner: object, *names: str) -> None:
    """Raise NotSupported naming an attribute that commcomp builds on and this DeepSpeed does not have."""
    for name in names:
        if not hasattr(owner, name):
            import deepspeed

            raise NotSupported(
                f"{type(owner).__name__} of DeepSpeed {deepspeed.__version__} has no {name!r}, which commcomp builds "
                "on; use a version that commcomp is tested with (0.19.8), or leave the block 'gradient' out"
            )


def say(message: str) -> None:
    """Log a line on rank 0, whatever level DeepSpeed's logger is set to: what is active must be seen."""
    from deepspeed.utils import log_dist, logger

    log_dist(message, ranks=[0], level=logger.getEffectiveLevel())


def is_expert(parameter: Tensor) -> bool:
    """Whether DeepSpeed keeps it apart as an expert's: averaged over fewer ranks."""
    return getattr(parameter, "allreduce", True) is False


def zero_stage(engine: Any) -> int:
    """0 to 3."""
    return int(engine.zero_optimization_stage())


def averaged_group(engine: Any) -> dist.ProcessGroup:
    """The ranks that average what is not an expert's."""
    if zero_stage(engine) > 0 and hasattr(engine.optimizer, "dp_process_group"):
        return engine.optimizer.dp_process_group
    from deepspeed.utils import groups

    return groups._get_sequence_data_parallel_group()


def factor_over_mean(engine: Any, num_ranks: int) -> float:
    """What a mean over the ranks is to be multiplied by to be what DeepSpeed would give."""
    if not getattr(engine, "gradient_average", True):
        return float(num_ranks)  # gradient_allreduce_op: sum
    return float(getattr(engine, "sequence_parallel_size", 1) or 1)


def names_of(module: nn.Module) -> dict[int, str]:
    """Parameters' names by their identity."""
    return {id(parameter): name for name, parameter in module.named_parameters()}


def optimizer_groups(engine: Any) -> list[list[nn.Parameter]] | None:
    """The parameters of each of the optimizer's groups, under ZeRO 1 to 3; None: all of the model's."""
    for name in ("bit16_groups", "bf16_groups", "fp16_groups"):
        found = getattr(engine.optimizer, name, None)
        if found is not None:
            return [list(group) for group in found]
    return None


def make_model(engine: Any) -> ZeroModel:
    """What is averaged over the data-parallel ranks by this engine. NotSupported if there is nothing."""
    stage, optimizer = zero_stage(engine), engine.optimizer
    names = names_of(engine.module)
    groups = optimizer_groups(engine) if stage > 0 else None
    wanted = None if groups is None else {id(parameter) for group in groups for parameter in group}
    members = []
    for parameter in engine.module.parameters():
        if not parameter.requires_grad or is_expert(parameter) or (wanted is not None and id(parameter) not in wanted):
            continue
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if torch.Size(shape).numel():
            dtype = _gradient_dtype(optimizer, parameter)
            members.append(ZeroParameter(names[id(parameter)], parameter, shape, dtype))
    if not members:
        raise NotSupported("the engine averages no gradient: its model has no parameter with requires_grad=True")
    group = averaged_group(engine)
    basic = getattr(engine, "basic_optimizer", None) or optimizer
    optimized = [value for entry in basic.param_groups for value in entry["params"]]
    owners = dist.get_world_size(group) if stage == 3 else 1
    return ZeroModel(members, group, torch.device(engine.device), num_owners=owners, optimized=optimized)


def is_flat_bf16(optimizer: Any) -> bool:
    """Whether it is DeepSpeed's BF16_Optimizer, which keeps gradients in flat buffers of its own."""
    return hasattr(optimizer, "get_grads_for_reduction") and hasattr(optimizer, "fp32_groups_gradients")


def flat_bf16_gradients(optimizer: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter of a BF16_Optimizer with its part of the flat gradient, in the parameter's shape."""
    for parameters, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            yield parameter, gradient.view(parameter.shape)


def _gradient_dtype(optimizer: Any, parameter: Tensor) -> torch.dtype:
    if is_flat_bf16(optimizer):
        return optimizer.grad_acc_dtype
    if getattr(optimizer, "use_grad_accum_attribute", False):
        return optimizer.gradient_accumulation_dtype
    return parameter.dtype
