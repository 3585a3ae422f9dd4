"""The communication hook for FSDP2 (`fully_shard`), on 1-D meshes and on 2-D ones (HSDP).

torch reduces a group of parameters as soon as its gradients are there and at once hands the result to `.grad`. So that
compression can go on beside the backward pass, and no residual moves before the whole step is known to be finite, the
hook hands torch zeros and adds the mean to the gradients when the backward pass ends. What torch does with the zeros in
between, accumulation, a cast, a copy to the CPU, stays right.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllocMixin,
    DefaultReduceScatter,
    ProcessGroupAllocReduceScatter,
    _get_gradient_divide_factors,
)
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo

from commcomp.complaint import complain
from commcomp.gradient_sync import GradientSync
from commcomp.hooks.fsdp_backward import BackwardPass, Bucket
from commcomp.sharded_model import ShardedGroup, ShardedModel, ShardedParameter, find_sharded_model, is_taken, take


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
            "no fully_shard was applied to this model, or all of it is frozen; call it before, or for "
            "DistributedDataParallel and FullyShardedDataParallel use model.register_comm_hook(state, "
            "commcomp.comm_hook)"
        )
    if not isinstance(state.sharded, ShardedModel) or {id(group.module) for group in state.sharded.groups} != {
        id(group.module) for group in sharded.groups
    }:
        raise ValueError(
            "this GradientSync was constructed with another model or before fully_shard; construct it with the same "
            "model after the last fully_shard call"
        )
    hook = _FsdpHook(state, state.sharded)
    for group in (*state.sharded.groups, *state.sharded.frozen):
        hook.require_free(group)
    for group in state.sharded.groups:
        hook.attach(group)
    for fsdp_state in {id(found): found for found in _fsdp_states(model)}.values():
        hook.forget_with(fsdp_state)
    for group in state.sharded.frozen:
        take(group)
        group.module.set_all_reduce_hook(_Unfrozen(group, strict=state.config.strict))


def _fsdp_states(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module._get_fsdp_state()


class _FsdpHook:
    """What the groups of one model share."""

    def __init__(self, state: GradientSync, sharded: ShardedModel) -> None:
        self._sharded, self._num_ranks = sharded, state.num_ranks
        self._pass = BackwardPass(state, sharded.place)
        self._whole = False
        self._unsent: dict[int, Tensor] = {}
        """By group, what was reduced over the shards alone so far."""
        # With one shard torch does not call a reduce-scatter.
        self._after_torchs_own = sharded.has_replicas or sharded.place.num_rows == 1

    def require_free(self, group: ShardedGroup) -> None:
        """Raise ValueError if something of the user's is in the hook's place, or would see zeros."""
        param_group = group.param_group
        comm, own = param_group._reduce_scatter_comm, (DefaultReduceScatter, ProcessGroupAllocReduceScatter)
        if param_group._all_reduce_hook is not None:
            found = "set_all_reduce_hook"
        elif not self._after_torchs_own and type(comm) not in own:
            found = f"set_custom_reduce_scatter({type(comm).__name__})"
        else:
            for parameter in group.parameters:
                _require_no_hook(parameter)
            return
        raise ValueError(f"{group.path!r} reduces its gradients by {found}; leave that out, there can be one hook only")

    def attach(self, group: ShardedGroup) -> None:
        """Take over the group's reduction over the compressed ranks."""
        take(group)
        param_group, module = group.param_group, group.module
        if self._sharded.has_replicas:
            _average_within_shards_only(param_group)
        if self._after_torchs_own:
            module.set_all_reduce_hook(partial(self._average_replicas, group))
        else:
            module.set_custom_reduce_scatter(_CompressedReduceScatter(self, group))
        # A parameter without a gradient would be left out of torch's bucket on this rank alone.
        param_group.reduce_scatter_unused_params = True
        self._pass.watch(module._get_fsdp_state())

    def reduce_scatter(self, group: ShardedGroup, out: Tensor, rows: Tensor, op: Any) -> None:
        """Start the mean over the shard group of `rows`, [W S]; torch gets zeros for now."""
        num_rows = self._sharded.place.num_rows
        _require_all(group, rows.numel(), num_rows)
        scale = _share_of_sum(group.param_group, self._sharded.shard_group, rows.dtype, op) * num_rows
        self._start(group, rows.float().view(num_rows, -1), scale)
        out.zero_()

    def _average_replicas(self, group: ShardedGroup, reduced: Tensor) -> None:
        """Start the mean over the replicas of `reduced`, [S]; torch gets zeros for now."""
        param_group = group.param_group
        _require_all(group, reduced.numel(), 1)
        if reduced.is_cuda:  # made on the stream of torch's reduce-scatter, and let go of before we have read it
            reduced.record_stream(torch.cuda.current_stream(reduced.device))
        unsent = self._unsent.pop(id(group), None)
        if unsent is not None:
            reduced += unsent
        # set_requires_all_reduce(False): a later micro-batch will send it.
        if self._sharded.has_replicas and not param_group.all_reduce_grads:
            self._unsent[id(group)] = reduced.clone()
            reduced.zero_()
            return
        # With a divisor of the user's own torch would sum over replicas; else it averages.
        scale = float(self._num_ranks) if param_group.gradient_divide_factor is not None else 1.0
        scale *= _share_of_sum(param_group, self._sharded.shard_group, reduced.dtype, dist.ReduceOp.SUM, reduced=True)
        self._start(group, reduced.to(torch.float32, copy=True).unsqueeze(0), scale)
        reduced.zero_()

    def _require_whole(self, group: ShardedGroup) -> None:
        """Once: RuntimeError if fully_shard was called on more of the model since."""
        if self._whole:
            return
        for fsdp_state in group.module._get_fsdp_state()._state_ctx.all_states:
            for param_group in fsdp_state._fsdp_param_groups:
                if not is_taken(param_group):
                    raise RuntimeError(
                        f"fully_shard was called on {type(fsdp_state._modules[0]).__name__} after GradientSync was "
                        "constructed: what that shards would travel uncompressed; construct and register it after the "
                        "last fully_shard call"
                    )
        self._whole = True

    def _start(self, group: ShardedGroup, rows: Tensor, scale: float) -> None:
        self._require_whole(group)
        for parameter in group.parameters:
            _require_no_hook(parameter)
        self._pass.add(Bucket(group, rows, scale))

    def forget_with(self, fsdp_state: Any) -> None:
        """Drop what torch drops in `reset_iter_state`, after an exception; it asks the root, which may own no group."""
        torchs_own = fsdp_state._reset_iter_state

        def reset() -> None:
            torchs_own()
            self._pass.abandon()
            self._unsent.clear()

        fsdp_state._reset_iter_state = reset


class _Unfrozen:
    """Says once that a group which was frozen is trained: only what is trained is reduced, and torch has done it."""

    def __init__(self, group: ShardedGroup, *, strict: bool) -> None:
        self._message: str | None = (
            f"all of {group.path!r} was frozen when GradientSync was constructed and is trained now, uncompressed; "
            "construct it while everything that will be trained has requires_grad (whole groups may be frozen after "
            "that)"
        )
        self._strict = strict

    def __call__(self, reduced: Tensor) -> None:
        if self._message is not None:
            complain(self._message, strict=self._strict, error=RuntimeError)
        self._message = None


def _require_all(group: ShardedGroup, numel: int, num_rows: int) -> None:
    if numel != num_rows * group.chunk_numel:
        known = {id(parameter.fsdp_param): parameter.name for parameter in group.parameters}
        changed = [
            known.get(id(fsdp_param), fsdp_param._param_fqn or fsdp_param._module_info.param_name)
            for fsdp_param in group.param_group.fsdp_params
            if fsdp_param.sharded_param.requires_grad != (id(fsdp_param) in known)
        ]
        raise RuntimeError(
            f"the gradients of {group.path!r} ({type(group.module).__name__}) hold {numel} values; expected "
            f"{num_rows * group.chunk_numel}: requires_grad of {', '.join(changed)} was changed after GradientSync was "
            "constructed; construct it after that, or give what is frozen and trained in turns its own fully_shard"
        )


def _require_no_hook(parameter: ShardedParameter) -> None:
    if getattr(parameter.fsdp_param.sharded_param, "_post_accumulate_grad_hooks", None):
        raise ValueError(
            f"parameter {parameter.name!r} has a register_post_accumulate_grad_hook; it would see zeros, since "
            "compressed gradients are there at the end of the backward pass only: remove it"
        )


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
