"""A part of one gradient bucket through a step: what all methods have in common, and what travels whole.

A bucket is fp32 rows [W, S]. Where every rank needs the whole mean (DDP, the replicas of HSDP), W is 1. Where each rank
needs one row of it (FSDP), W is the number of ranks, and row w holds what rank w owns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from commcomp.compressors.wire import FP32, Section
from commcomp.exchange.exchange import Share
from commcomp.layout import Spans

_TELLING = 1024


@dataclass(frozen=True)
class Place:
    """Which row of a bucket this rank is to fill with the mean, of how many."""

    num_rows: int = 1
    own_row: int = 0

    @property
    def by_owner(self) -> bool:
        """Whether each rank needs its own row only."""
        return self.num_rows > 1


class OneWay:
    """A group of parameters (bucket_plan.GradientGroup) of one dtype, all of whose values go one way."""

    parameters: tuple[Any, ...]
    place: Place

    @property
    def gradient_dtype(self) -> torch.dtype:
        """In which the framework reduces them."""
        return self.parameters[0].gradient_dtype

    @property
    def dense_place(self) -> Place:
        """What travels as it is goes the same way."""
        return self.place


@dataclass(frozen=True)
class StepContext:
    """What every bucket of a step shares."""

    step: int
    measure: bool
    """Measure the compression error in this step."""
    check_finite: bool
    """Whether anybody needs to know if the step holds Inf or NaN (somebody keeps residuals)."""
    residual_scale: Tensor | float
    """Factor from the residuals' loss scale to this step's."""
    find_unused: bool
    """Whether parameters may be unused in this step."""


@dataclass
class Measurement:
    """Squared norms over some parameters at a measured step, fp64 [k] each, on the gradient's device."""

    names: tuple[str, ...]
    total: Tensor
    """Of gradient plus residual."""
    kept: Tensor
    """Of what was not delivered."""


class BucketPart(ABC):
    """Some parameters of one bucket whose values cross in the first exchange, and with rounds=2 in a second one too.

    Order of calls in a step: begin, receive_first, perhaps set_used_anywhere; with rounds=2 second_factor, commit,
    receive_second; else commit; then decode. `step_is_finite` is a bool where the host may know it (CPU) and a bool
    tensor on a device, where nothing waits for it.
    """

    names: tuple[str, ...] = ()
    """The parameters that commit keeps something for."""
    rounds = 1
    by_owner = False
    """Whether the first values go to the ranks that own them, [W, rows, length], and not to everybody."""
    used: Tensor | None = None
    """With unused parameters allowed: which of `names` had a gradient, bool; here, then anywhere."""

    @abstractmethod
    def first_section(self, parity: int) -> Section:
        """How the first values travel in steps of this parity (those of one owner)."""

    @abstractmethod
    def begin(self, rows: Tensor, target: Tensor, context: StepContext) -> Tensor:
        """Take the bucket, [W, S]; return this rank's first values.

        `target`, [S], is for the mean of this rank's row: that row itself where W is 1, else memory of its own, so that
        a part which needs no more of `rows` can let go of them.
        """

    @abstractmethod
    def receive_first(self, mean: Tensor) -> Tensor:
        """Take their mean; return whether it holds no Inf or NaN, a bool scalar tensor."""

    def set_used_anywhere(self, fraction: Tensor) -> None:
        """`fraction` [names]: share of ranks on which each had a gradient; where it is 0 nothing is delivered.

        DDP leaves the .grad of a parameter that no rank used alone, so what was decoded for it would be lost.
        """
        used = fraction > 0
        # Nearly always all were: then nobody need mask anything.
        self.used = None if used.device.type == "cpu" and used.all() else used

    def wants_share(self, measure: bool) -> bool:
        """Whether `commit` has any use for what this rank delivered."""
        return False

    def commit(self, share: Share, step_is_finite: Tensor | bool, *, measure: bool) -> Measurement | None:
        """Keep what was not delivered; on a step with Inf or NaN anywhere change nothing.

        `share`: what this rank delivered of the values last sent.
        """
        return None

    @abstractmethod
    def decode(self, step_is_finite: Tensor | bool) -> None:
        """Put the mean into the target."""


class DensePart(BucketPart):
    """Parameters that travel whole. Nothing is kept: what rounding loses is lost."""

    def __init__(self, spans: Spans, place: Place) -> None:
        self._spans, self.by_owner = spans, place.by_owner

    def first_section(self, parity: int) -> Section:
        return self._spans.section

    def begin(self, rows: Tensor, target: Tensor, context: StepContext) -> Tensor:
        self._target = target
        values = self._spans.gather(rows)
        return values.unsqueeze(1) if self.by_owner else values

    def receive_first(self, mean: Tensor) -> Tensor:
        self._spans.scatter(self._target, mean[0])
        del self._target
        return all_finite(mean)

    def decode(self, step_is_finite: Tensor | bool) -> None:
        return


class UsedFlags(BucketPart):
    """Tells the other parts of a bucket which parameters no rank used. To be begun after them."""

    def __init__(self, parts: Sequence[BucketPart]) -> None:
        self._parts = [part for part in parts if part.names]

    def first_section(self, parity: int) -> Section:
        return Section(1, sum(len(part.names) for part in self._parts), FP32)

    def begin(self, rows: Tensor, target: Tensor, context: StepContext) -> Tensor:
        flags = [part.used for part in self._parts if part.used is not None]
        return torch.cat(flags).float().unsqueeze(0)

    def receive_first(self, mean: Tensor) -> Tensor:
        fractions = mean[0].split([len(part.names) for part in self._parts])
        for part, fraction in zip(self._parts, fractions, strict=True):
            part.set_used_anywhere(fraction)
        return all_finite(mean)

    def decode(self, step_is_finite: Tensor | bool) -> None:
        return


def any_nonzero(values: Tensor) -> Tensor:
    """Which of k tensors, [k, ...], holds anything but zeros: bool [k]."""
    values = values.flatten(1)
    if values.device.type == "cpu":  # a few values nearly always tell
        found = values[:, :_TELLING].ne(0).any(dim=1)
        if found.all():
            return found
    return values.ne(0).any(dim=1)


def all_finite(values: Tensor) -> Tensor:
    """Whether no value is Inf or NaN, a bool scalar tensor."""
    if values.device.type == "cpu":
        # Inf and NaN survive a sum, so a finite sum proves it in one fast pass; finite values may still overflow it.
        finite = values.sum().isfinite()
        if finite:
            return finite
    return values.isfinite().all()
