"""The buckets of one engine through a backward pass: filled as gradients come, sent in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from commcomp.deepspeed.zero_model import ZeroGroup, ZeroParameter
from commcomp.gradient_sync import GradientSync


@dataclass(eq=False)
class _Bucket:
    group: ZeroGroup
    waits_for: set[str] = field(default_factory=set)
    rows: Tensor | None = None
    """fp32 [W, S], from the first gradient on."""
    own: Tensor | None = None
    """For this rank's row of the mean, [S]."""

    def put(self, index: int, gradient: Tensor) -> None:
        """Copy a whole gradient to where its pieces lie in the rows."""
        group, rows = self.group, self.rows
        assert rows is not None
        start, chunk = sum(group.chunks[:index]), group.chunks[index]
        values, target = gradient.detach().reshape(-1), rows[:, start : start + chunk]
        if len(values) == target.numel():
            target.copy_(values.view_as(target))
            return
        whole, left = divmod(len(values), chunk)
        target[:whole].copy_(values[: whole * chunk].view(whole, chunk))
        target[whole:].zero_()  # what fills the last owners' pieces up
        if left:
            target[whole, :left].copy_(values[whole * chunk :])

    def means(self) -> Iterator[tuple[ZeroParameter, Tensor]]:
        """Each parameter's part of what this rank was given."""
        assert self.own is not None
        yield from zip(self.group.parameters, self.own.split(self.group.chunks), strict=True)


class GradientBuckets:
    """Gives a `GradientSync` the gradients of an engine.

    `add` may be called while the backward pass runs, in any order; buckets are sent in one order on all ranks, each as
    soon as it and all before it are full. `finish` sends the rest.
    """

    def __init__(self, sync: GradientSync, groups: Sequence[ZeroGroup]) -> None:
        self._sync = sync
        self._buckets = [_Bucket(group) for group in groups]
        self._where = {
            parameter.name: (bucket, index)
            for bucket in self._buckets
            for index, parameter in enumerate(bucket.group.parameters)
        }
        self._came: set[str] = set()
        self._sent = 0

    def add(self, name: str, gradient: Tensor) -> None:
        """Take a parameter's whole gradient; it may be changed or freed afterwards.

        Raises RuntimeError naming a parameter whose gradient has come in this backward pass already.
        """
        if name in self._came:
            raise RuntimeError(
                f"the gradient of {name!r} came twice in one backward pass, as it does when a module is checkpointed "
                "with use_reentrant=True: pass use_reentrant=False"
            )
        bucket, index = self._where[name]
        if bucket.rows is None:
            self._open(bucket, gradient.device)
        bucket.put(index, gradient)
        self._came.add(name)
        bucket.waits_for.discard(name)
        while self._sent < len(self._buckets) and self._is_full(self._buckets[self._sent]):
            self._send(self._buckets[self._sent])

    def came(self, name: str) -> bool:
        """Whether a gradient has come in this backward pass."""
        return name in self._came

    def finish(self, gradient_of: Callable[[ZeroParameter], Tensor | None]) -> Iterator[tuple[ZeroParameter, Tensor]]:
        """Send what is left, wait, and give each parameter's mean, fp32, flat: what this rank owns of it, or all.

        `gradient_of` tells the gradients that did not come; None is a gradient of zeros. A mean may be written to.
        """
        device = self._sync.device
        for bucket in self._buckets:
            for parameter in bucket.group.parameters:
                if parameter.name not in self._came:
                    gradient = gradient_of(parameter)
                    zeros = torch.zeros(parameter.numel, device=device) if gradient is None else gradient
                    self.add(parameter.name, zeros)
        self._sync.finish_rows()
        for bucket in self._buckets:
            yield from bucket.means()
        self.abandon()

    def abandon(self) -> None:
        """Forget what has come: the backward pass raised, or is over."""
        self._came.clear()
        self._sent = 0
        for bucket in self._buckets:
            bucket.own = None
            if self._sync.device.type != "cpu":
                bucket.rows = None  # the device's allocator keeps it ready
            bucket.waits_for = {parameter.name for parameter in bucket.group.parameters}

    def _open(self, bucket: _Bucket, device: torch.device) -> None:
        group = bucket.group
        bucket.rows = torch.empty(group.place.num_rows, group.row_numel, device=device)
        bucket.waits_for = {parameter.name for parameter in group.parameters}

    def _is_full(self, bucket: _Bucket) -> bool:
        return bucket.rows is not None and not bucket.waits_for

    def _send(self, bucket: _Bucket) -> None:
        group, rows = bucket.group, bucket.rows
        assert rows is not None
        bucket.own = rows.new_empty(group.row_numel) if group.place.by_owner else rows[0]
        self._sync.reduce_rows(rows, bucket.own, group, first=self._sent == 0)
        self._sent += 1
