"""Sharded training in which gradients are not reduced over the link: the limit for whatever reduces them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllocMixin

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from train_gradients import mesh_of, shard


def shard_unreduced(model: nn.Module, parallel: str, device: torch.device) -> nn.Module:
    """fsdp2: parameters are gathered, gradients not reduced. hsdp: the replicas know nothing of each other."""
    mesh = mesh_of(parallel, device)
    if parallel == "hsdp":
        return shard(model, mesh["shard"])
    model = shard(model, mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(_OwnGradientOnly())
    return model


class _OwnGradientOnly(DefaultAllocMixin, ReduceScatter):
    """A reduce-scatter that takes this rank's own values for the sum."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        output_tensor.copy_(input_tensor.view(dist.get_world_size(group), -1)[dist.get_rank(group)])
