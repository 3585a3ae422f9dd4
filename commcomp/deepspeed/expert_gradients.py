"""Gradients of experts, which DeepSpeed keeps apart: averaged whole, over the ranks that hold the same experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def average_experts(
    engine: Any, parameters: Sequence[Any], gradient_of: Callable[[nn.Parameter], Tensor]
) -> None:
    """Sum experts' gradients over the ranks with the same experts and divide by all data-parallel ranks, in place.

    DeepSpeed divides by all, so that a gradient does not depend on how experts are dealt out. They are summed in fp32.
    """
    if not parameters:
        return
    from deepspeed.utils import groups

    everybody = dist.get_world_size(engine.optimizer.dp_process_group)
    by_group: dict[str, list[Tensor]] = {}
    for parameter in parameters:
        by_group.setdefault(parameter.group_name, []).append(gradient_of(parameter))
    for name in sorted(by_group):
        gradients, group = by_group[name], groups._get_expert_data_parallel_group(name)
        if dist.get_world_size(group) > 1:
            flat = torch.cat([gradient.detach().flatten().float() for gradient in gradients])
            dist.all_reduce(flat, group=group)
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view(gradient.shape))
        for gradient in gradients:
            gradient.div_(everybody)
