"""One backward pass of a sharded model: which groups are on their way, and when it is over.

torch has nothing for the second, and a backward pass may hold others: activation checkpointing with use_reentrant=True
runs one inside the other for every checkpointed module.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from commcomp.bucket_part import Place
from commcomp.gradient_sync import GradientSync
from commcomp.sharded_model import ShardedGroup


@dataclass
class Bucket:
    """One group's gradients."""

    group: ShardedGroup
    rows: Tensor
    """fp32 [W, S]."""
    scale: float
    """What torch would multiply a mean by: it may have been told to divide by something else than the ranks."""


@dataclass
class _Mean:
    """What is to be added to a group's `.grad`."""

    group: ShardedGroup
    own: Tensor
    """For the mean of this rank's row of the bucket, fp32 [S], which is there once the step is finished."""
    scale: float


class BackwardPass:
    """Sends the groups' buckets as they come, and adds the means to the gradients when all of it is over.

    A group comes more than once where its module is used more than once. Its residual can serve one bucket a step only,
    so what comes later is summed up and goes at the end: as the group's one bucket if it was known to come again, else
    as a second, whole one.
    """

    def __init__(self, state: GradientSync, place: Place) -> None:
        self._state, self._place = state, place
        self._sent: list[_Mean] = []
        self._sent_groups: set[int] = set()
        self._waiting: dict[int, Bucket] = {}
        self._comes_again: set[int] = set()
        self._end: weakref.ref[_End] | None = None

    def watch(self, fsdp_state: Any) -> None:
        """Notice when a pass begins: torch asks this of the state whose gradients come first."""
        torchs_own = fsdp_state._register_root_post_backward_final_callback

        def register() -> None:
            torchs_own()
            self.open()

        fsdp_state._register_root_post_backward_final_callback = register

    def open(self) -> None:
        """We are in a backward pass; the outermost one calls `_finish` at its end, after torch's own callbacks."""
        if self._end is not None and self._end() is not None:
            return
        self.abandon()  # of a pass that raised
        end = _End(self._finish)
        self._end = weakref.ref(end)
        Variable._execution_engine.queue_callback(end)

    def abandon(self) -> None:
        """Forget what has come so far."""
        self._end = None
        self._sent.clear()
        self._sent_groups.clear()
        self._waiting.clear()

    def add(self, bucket: Bucket) -> None:
        """Send a group's bucket, or keep it for the end of the pass."""
        self.open()
        key = id(bucket.group)
        if key in self._waiting:
            self._waiting[key].rows += bucket.rows
        elif key in self._comes_again or key in self._sent_groups:
            self._comes_again.add(key)
            self._waiting[key] = bucket
        else:
            self._send(bucket)

    def _send(self, bucket: Bucket) -> None:
        group, rows = bucket.group, bucket.rows
        # Not this rank's row of `rows`: that would keep all of them until the end of the backward pass.
        own = rows.new_empty(rows.shape[1]) if self._place.by_owner else rows[0]
        again = id(group) in self._sent_groups
        self._state.reduce_rows(rows, own, group, first=not self._sent, again=again)
        self._sent.append(_Mean(group, own, bucket.scale))
        self._sent_groups.add(id(group))

    def _finish(self) -> None:
        for bucket in self._waiting.values():
            self._send(bucket)
        sent = self._sent.copy()
        self.abandon()
        if not sent:  # no group was to be reduced: set_requires_gradient_sync(False)
            return
        self._state.finish_rows()
        with torch.no_grad():
            for mean in sent:
                _add_to_gradients(mean)


def _add_to_gradients(mean: _Mean) -> None:
    _wait_for_torch(mean.group)
    values = mean.own if mean.scale == 1.0 else mean.own * mean.scale
    targets, sources = [], []
    pieces = values.split([parameter.chunk_numel for parameter in mean.group.parameters])
    for parameter, piece in zip(mean.group.parameters, pieces, strict=True):
        gradient = parameter.fsdp_param.sharded_param.grad
        if gradient is None:  # cleared by a hook of the user's
            continue
        local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        targets.append(local)
        sources.append(piece[: local.numel()].view(local.shape).to(local.device, local.dtype))
    if targets:
        torch._foreach_add_(targets, sources)


def _wait_for_torch(group: ShardedGroup) -> None:
    """torch writes `.grad` on a stream of its own, and waits for it only in what it takes for the last pass."""
    if group.param_group.device.type != "cuda":
        return
    for event in group.param_group.comm_ctx._last_post_reduce_events.values():
        torch.cuda.current_stream().wait_event(event)
    for parameter in group.parameters:
        if parameter.fsdp_param.grad_offload_event is not None:  # a copy of the zeros to the CPU
            parameter.fsdp_param.grad_offload_event.synchronize()


class _End:
    """What the autograd engine calls at the end of a backward pass; it dies with the pass, also if that raises."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish

    def __call__(self) -> None:
        # Behind what torch has queued since: its callbacks reduce the groups whose inputs need no gradient.
        Variable._execution_engine.queue_callback(self._finish)
