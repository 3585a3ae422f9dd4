"""The communication hook for FSDP2 (`fully_shard`), on 1-D meshes and on 2-D ones (HSDP).

torch reduces a group of parameters as soon as its gradients are there and at once hands the result to `.grad`. So that
compression can go on beside the backward pass, and no residual moves before the whole step is known to be finite, the
hook hands torch zeros and adds the mean to the gradients when the backward pass ends. What torch does with the zeros in
between, accumulation, a cast, a copy to the CPU, stays right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllocMixin, _get_gradient_divide_factors
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo

from commcomp.gradient_sync import GradientSync
from commcomp.sharded_model import ShardedGroup, ShardedModel, find_sharded_model


def register_comm_hook(model: nn.Module, state: GradientSync) -> None:
    """Average the gradients of a `fully_shard`ed model in the form that `state` prescribes.

    On a 1-D mesh the reduce-scatter is compressed. On a 2-D mesh (HSDP) torch reduce-scatters within the shard group as
    before and what is compressed is the average over the replicas; residuals are then of a shard's size.

    Call it after `fully_shard` on the root module and after constructing `state` with the same model, before training.

    Raises:
        TypeError, ValueError: naming what does not fit.
    """
    if not isinstance(state, GradientSync):
        raise TypeError(
            f"register_comm_hook got a state of type {type(state).__name__}; expected a commcomp.GradientSync: "
            "commcomp.fsdp.register_comm_hook(model, commcomp.GradientSync(model, ...))"
        )
    sharded = find_sharded_model(model)
    if sharded is None:
        raise ValueError(
            "no fully_shard was applied to this model; call it before, or for DistributedDataParallel and "
            "FullyShardedDataParallel use model.register_comm_hook(state, commcomp.comm_hook)"
        )
    if not isinstance(state.sharded, ShardedModel) or {id(group.module) for group in state.sharded.groups} != {
        id(group.module) for group in sharded.groups
    }:
        raise ValueError(
            "this GradientSync was constructed with another model or before fully_shard; construct it with the same "
            "model after the last fully_shard call"
        )
    hook = _FsdpHook(state, state.sharded)
    for group in state.sharded.groups:
        hook.attach(group)


@dataclass
class _Pending:
    """One group's mean on its way to `.grad`."""

    group: ShardedGroup
    own: Tensor
    """For the mean of this rank's row of the bucket, fp32, which is there once the step is finished."""
    scale: float
    """What torch would multiply a mean by: it may have been told to divide by something else than the ranks."""


class _FsdpHook:
    """What the groups of one model share: which of them are on their way in this backward pass."""

    def __init__(self, state: GradientSync, sharded: ShardedModel) -> None:
        self._state, self._sharded = state, sharded
        self._pending: list[_Pending] = []
        self._backward: int | None = None
        self._held: dict[int, Tensor] = {}

    def attach(self, group: ShardedGroup) -> None:
        """Take over the group's reduction over the compressed ranks."""
        param_group, module = group.param_group, group.module
        if self._sharded.has_replicas:
            _average_within_shards_only(param_group)
            module.set_all_reduce_hook(partial(self._average_replicas, group))
        else:
            module.set_custom_reduce_scatter(_CompressedReduceScatter(self, group))
        # A parameter without a gradient would be left out of torch's bucket on this rank alone.
        param_group.reduce_scatter_unused_params = True

    def reduce_scatter(self, group: ShardedGroup, out: Tensor, rows: Tensor, op: Any) -> None:
        """Start the mean over the shard group of `rows`, [W S]; torch gets zeros for now."""
        num_rows = self._sharded.place.num_rows
        if rows.numel() != num_rows * group.chunk_numel:
            missing = [parameter.name for parameter in group.parameters]
            raise RuntimeError(
                f"the gradients of {type(group.module).__name__} hold {rows.numel()} values; expected "
                f"{num_rows * group.chunk_numel} for {', '.join(missing)}: some had no gradient, or requires_grad was "
                "changed after GradientSync was constructed"
            )
        scale = _share_of_sum(group.param_group, self._sharded.shard_group, rows.dtype, op) * num_rows
        self._start(group, rows.float().view(num_rows, -1), scale)
        out.zero_()

    def _average_replicas(self, group: ShardedGroup, reduced: Tensor) -> None:
        """Start the mean over the replicas of `reduced`, [S]; torch gets zeros for now."""
        param_group = group.param_group
        held = self._held.pop(id(group), None)
        if held is not None:
            reduced += held
        if not param_group.all_reduce_grads:  # set_requires_all_reduce(False): a later micro-batch will send it
            self._held[id(group)] = reduced.clone()
            reduced.zero_()
            return
        # With a divisor of the user's own torch would sum over replicas; else it averages.
        scale = float(self._state.num_ranks) if param_group.gradient_divide_factor is not None else 1.0
        scale *= _share_of_sum(param_group, self._sharded.shard_group, reduced.dtype, dist.ReduceOp.SUM, reduced=True)
        self._start(group, reduced.to(torch.float32, copy=True).unsqueeze(0), scale)
        reduced.zero_()

    def _start(self, group: ShardedGroup, rows: Tensor, scale: float) -> None:
        for parameter in group.parameters:
            if getattr(parameter.fsdp_param.sharded_param, "_post_accumulate_grad_hooks", None):
                raise RuntimeError(
                    f"parameter {parameter.name!r} has a register_post_accumulate_grad_hook; it would see zeros, since "
                    "compressed gradients are there at the end of the backward pass only: remove it"
                )
        backward = torch._C._current_graph_task_id()
        first = backward != self._backward
        if first:
            self._backward = backward
            self._pending.clear()  # of a backward pass that raised
            Variable._execution_engine.queue_callback(self._finish)
        # Not this rank's row of `rows`: that would keep all of them until the end of the backward pass.
        own = rows.new_empty(rows.shape[1]) if self._sharded.place.by_owner else rows[0]
        self._pending.append(_Pending(group, own, scale))
        self._state.reduce_rows(rows, own, group, first=first)

    def _finish(self) -> None:
        """At the end of the backward pass, after torch's own callback: wait, and add the means to the gradients."""
        pending, self._pending, self._backward = self._pending, [], None
        self._state.finish_rows()
        with torch.no_grad():
            for item in pending:
                _add_to_gradients(item)


def _add_to_gradients(item: _Pending) -> None:
    values = item.own if item.scale == 1.0 else item.own * item.scale
    targets, sources = [], []
    pieces = values.split([parameter.chunk_numel for parameter in item.group.parameters])
    for parameter, piece in zip(item.group.parameters, pieces, strict=True):
        gradient = parameter.fsdp_param.sharded_param.grad
        if gradient is None:  # cleared by a hook of the user's
            continue
        local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        targets.append(local)
        sources.append(piece[: local.numel()].view(local.shape).to(local.device, local.dtype))
    if targets:
        torch._foreach_add_(targets, sources)


def _share_of_sum(
    param_group: Any, shard_group: dist.ProcessGroup, dtype: torch.dtype, op: Any, *, reduced: bool = False
) -> float:
    """What the sum over the shard group is still to be multiplied by to be the gradient torch would give.

    `reduced`: torch has done its own reduction, and what may be left is its division after it.
    """
    force_sum = param_group.force_sum_reduction_for_comms
    divisor = param_group.gradient_divide_factor
    _before, after, _op, _ = _get_gradient_divide_factors(
        shard_group, None, dtype, param_group.device.type, divisor, force_sum
    )
    if reduced or op == dist.ReduceOp.SUM:
        return 1.0 / (after or 1.0)
    if op == dist.ReduceOp.AVG:
        return 1.0 / dist.get_world_size(shard_group)
    return 1.0 / divisor  # PREMUL_SUM


class _CompressedReduceScatter(DefaultAllocMixin, ReduceScatter):
    """torch's reduce-scatter of one group, compressed."""

    def __init__(self, hook: _FsdpHook, group: ShardedGroup) -> None:
        self._hook, self._group = hook, group

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        self._hook.reduce_scatter(self._group, output_tensor, input_tensor, op)


def _average_within_shards_only(param_group: Any) -> None:
    """Have torch reduce over the shard group alone; parameters stay DTensors on the whole mesh."""
    both = param_group.mesh_info
    shard_only = FSDPMeshInfo(both.mesh, shard_mesh_dim=both.shard_mesh_dim)
    if param_group.post_forward_mesh_info is both or param_group.post_forward_mesh_info == both:
        param_group.post_forward_mesh_info = shard_only
    param_group.mesh_info = shard_only
