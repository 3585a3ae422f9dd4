"""One gradient bucket through one step: encode, exchange, keep the residual, decode.

The order over a step: `begin` for each bucket as it becomes ready, so its first exchange flies while the backward pass
goes on; after the last bucket `finish_first` for all, so that every rank knows whether the whole step is finite before
any residual changes; then the second factors, the residuals while those fly, and the decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from commcomp.bucket_part import BucketPart, Measurement, Place, StepContext, UsedFlags, all_finite
from commcomp.compressors.wire import Format, Section
from commcomp.exchange.exchange import MeanExchange, Share
from commcomp.exchange.mean import make_exchange
from commcomp.exchange.owner import make_owner_exchange
from commcomp.low_rank_part import LowRankPart

Count = Callable[[MeanExchange], None]
"""Called once for every exchange that is started."""


class DenseReduction:
    """A whole bucket in one float format: before compression starts, or because its rules say so.

    `rows` is [W, S], `target` [S] (see bucket_part.py); or they are [1, W S] and [W S], the same values in one row.
    """

    def __init__(
        self,
        length: int,
        format: Format,
        place: Place,
        group: dist.ProcessGroup,
        device: torch.device,
        count: Count,
    ) -> None:
        self._place, self._count = place, count
        section = Section(1, length, format)
        self._exchange = (
            make_owner_exchange([section], group, device)
            if self.to_owners
            else make_exchange([section], group, in_place=True)
        )

    @property
    def to_owners(self) -> bool:
        """Whether a rank receives its own piece only."""
        return self._place.by_owner

    def begin(self, rows: Tensor, target: Tensor, context: StepContext) -> None:
        """Start the exchange of the bucket."""
        rows = rows.view(self._place.num_rows, -1)
        own = target if target.numel() == rows.shape[1] else target.view_as(rows)[self._place.own_row]
        self._target, self._context = own, context
        values = rows.float()
        self._exchange.start([values.unsqueeze(1) if self.to_owners else values], f"{context.step}")
        self._count(self._exchange)

    def advance(self) -> None:
        """Launch what depends on the first collective."""
        self._exchange.advance()

    def finish_first(self) -> Tensor | None:
        """Wait; the bucket then holds the mean. Returns whether it is finite (bool tensor), or None if nobody asks."""
        (mean,) = self._exchange.finish()
        self._exchange.release()
        if mean.data_ptr() != self._target.data_ptr():
            self._target.copy_(mean[0])
        return all_finite(mean) if self._context.check_finite else None

    def start_second(self, step_is_finite: Tensor | bool) -> None:
        """Nothing is left to send."""

    def advance_second(self) -> None:
        """Nothing was sent."""

    def finish(self, step_is_finite: Tensor | bool) -> list[Measurement]:
        """Nothing is left to decode; no residual is kept."""
        del self._target
        return []


class _Lane:
    """Parts of a bucket whose first values go the same way: one exchange for steps of each parity."""

    def __init__(
        self, parts: list[BucketPart], group: dist.ProcessGroup, device: torch.device, *, by_owner: bool
    ) -> None:
        self.parts = parts
        make = partial(make_owner_exchange, device=device) if by_owner else make_exchange
        self._exchanges = [make([part.first_section(parity) for part in parts], group) for parity in (0, 1)]

    def start(self, values: list[Tensor], parity: int, occasion: str) -> MeanExchange:
        self.exchange = self._exchanges[parity]
        self.exchange.start(values, occasion)
        return self.exchange


class CompressedReduction:
    """A bucket cut into parts, one a method; all that go the same way share an exchange."""

    def __init__(
        self,
        parts: Sequence[BucketPart],
        group: dist.ProcessGroup,
        device: torch.device,
        count: Count,
        *,
        find_unused: bool,
    ) -> None:
        self._count = count
        self._name = next((part.names[0] for part in parts if part.names), "")
        self._parts = [*parts, *([UsedFlags(parts)] if find_unused and any(part.names for part in parts) else [])]
        by_way = {way: [part for part in self._parts if part.by_owner == way] for way in (False, True)}
        self._lanes = [_Lane(own, group, device, by_owner=way) for way, own in by_way.items() if own]
        self._second_parts = [part for part in parts if isinstance(part, LowRankPart) and part.rounds == 2]
        sections = [part.second_section() for part in self._second_parts]
        self._second = make_exchange(sections, group) if sections else None

    @property
    def to_owners(self) -> bool:
        """Whether a rank receives its own piece only, of some parts."""
        return any(part.by_owner for part in self._parts)

    def begin(self, rows: Tensor, target: Tensor, context: StepContext) -> None:
        """Compute the first values and start their exchange."""
        self._target, self._context = target, context
        work = rows.float()  # the bucket itself where it is fp32
        self._mean = target if work is rows else work[0]
        values = {part: part.begin(work, self._mean, context) for part in self._parts}
        for lane in self._lanes:
            own = [values[part] for part in lane.parts]
            self._count(lane.start(own, context.step % 2, f"{context.step} {self._name}"))

    def advance(self) -> None:
        """Launch what depends on the first collective of the first exchange."""
        for lane in self._lanes:
            lane.exchange.advance()

    def finish_first(self) -> Tensor | None:
        """Wait for the first values. Returns whether all of the bucket is finite on all ranks, a bool tensor."""
        finite = []
        for lane in self._lanes:
            means = zip(lane.parts, lane.exchange.finish(), strict=True)
            finite += [part.receive_first(mean) for part, mean in means]
        return torch.stack(finite).all()

    def start_second(self, step_is_finite: Tensor | bool) -> None:
        """Compute Q from the common basis and start its exchange, for the matrices that take two rounds."""
        if self._second is not None:
            factors = [part.second_factor(step_is_finite) for part in self._second_parts]
            self._second.start(factors, f"{self._context.step} {self._name}")
            self._count(self._second)

    def advance_second(self) -> None:
        """Launch what depends on the first collective of the second exchange."""
        if self._second is not None:
            self._second.advance()

    def finish(self, step_is_finite: Tensor | bool) -> list[Measurement]:
        """Keep the residuals while the second factors fly, then decode."""
        measured: list[Measurement] = []
        for lane in self._lanes:
            measured += self._commit(lane.parts, lane.exchange, step_is_finite, of_rounds=1)
            lane.exchange.release()
        if self._second is not None:
            measured += self._commit(self._second_parts, self._second, step_is_finite, of_rounds=2)
            for low_rank, mean in zip(self._second_parts, self._second.finish(), strict=True):
                low_rank.receive_second(mean)
            self._second.release()
        for part in self._parts:
            part.decode(step_is_finite)
        if self._mean is not self._target:
            self._target.copy_(self._mean)
        del self._mean, self._target
        return measured

    def _commit(
        self, parts: Sequence[BucketPart], exchange: MeanExchange, step_is_finite: Tensor | bool, *, of_rounds: int
    ) -> list[Measurement]:
        measure, measured = self._context.measure, []
        for index, part in enumerate(parts):
            if part.rounds == of_rounds and step_is_finite is not False and part.wants_share(measure):
                measured.append(part.commit(Share(exchange, index), step_is_finite, measure=measure))
        return [measurement for measurement in measured if measurement is not None]


Reduction = DenseReduction | CompressedReduction
