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
    """Parameters whose gradients have not come in this backward pass."""
    rows: Tensor | None = None
    """fp32 [W, S], from the first gradient on."""
    own: Tensor | None = None
    """For this rank's row of the mean, [S]."""

    def put(self, offset: int, chunk: int, gradient: Tensor) -> None:
        """Copy a whole gradient to where its pieces, of `chunk` values, lie in the rows."""
        if self.rows is None:
            self.rows = torch.empty(self.group.place.num_rows, self.group.row_numel, device=gradient.device)
        values, target = gradient.detach().reshape(-1), self.rows[:, offset : offset + chunk]
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
            parameter.name: (bucket, offset, chunk)
            for bucket in self._buckets
            for parameter, offset, chunk in bucket.group.places()
        }
        self.abandon()

    def add(self, name: str, gradient: Tensor) -> None:
        """Take a parameter's whole gradient; it may be changed or freed afterwards.

        Raises RuntimeError naming a parameter whose gradient has come in this backward pass already.
        """
        if self.came(name):
            raise RuntimeError(
                f"the gradient of {name!r} came twice in one backward pass, as it does when a module used twice is "
                "checkpointed with use_reentrant=True (pass use_reentrant=False), or when another loss's backward() "
                "is called before the engine's (add it to the engine's loss)"
            )
        bucket, offset, chunk = self._where[name]
        bucket.put(offset, chunk, gradient)
        bucket.waits_for.remove(name)
        while self._sent < len(self._buckets) and not self._buckets[self._sent].waits_for:
            self._send(self._buckets[self._sent])

    def came(self, name: str) -> bool:
        """Whether a gradient has come in this backward pass."""
        return name not in self._where[name][0].waits_for

    def finish(self, gradient_of: Callable[[ZeroParameter], Tensor | None]) -> Iterator[tuple[ZeroParameter, Tensor]]:
        """Send what is left, wait, and give each parameter's mean, fp32, flat: what this rank owns of it, or all.

        `gradient_of` tells the gradients that did not come; None is a gradient of zeros. A mean may be written to.
        """
        device = self._sync.device
        for bucket in self._buckets:
            for parameter in bucket.group.parameters:
                if not self.came(parameter.name):
                    gradient = gradient_of(parameter)
                    zeros = torch.zeros(parameter.numel, device=device) if gradient is None else gradient
                    self.add(parameter.name, zeros)
        self._sync.finish_rows()
        for bucket in self._buckets:
            yield from bucket.means()
        self.abandon()

    def abandon(self) -> None:
        """Forget what has come: the backward pass raised, or is over."""
        self._sent = 0
        for bucket in self._buckets:
            bucket.own = None
            if self._sync.device.type != "cpu":
                bucket.rows = None  # the device's allocator keeps it ready
            bucket.waits_for = {parameter.name for parameter in bucket.group.parameters}

    def _send(self, bucket: _Bucket) -> None:
        group, rows = bucket.group, bucket.rows
        assert rows is not None
        bucket.own = rows.new_empty(group.row_numel) if group.place.by_owner else rows[0]
        self._sync.reduce_rows(rows, bucket.own, group, first=self._sent == 0)
        self._sent += 1
