"""One gradient bucket through one step: encode, exchange, keep the residual, decode.

The order over a step: `begin` for each bucket as it becomes ready, so its first exchange flies while the backward pass
goes on; after the last bucket `finish_first` for all, so that every rank knows whether the whole step is finite before
any residual changes; then the second factors, the residuals while those fly, and the decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from commcomp.compressors.wire import Section
from commcomp.exchange.mean import MeanExchange, make_exchange
from commcomp.layout import DenseSpans, wire_dtype
from commcomp.low_rank_state import LowRankState, Measurement


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
    count: Callable[[MeanExchange], None]
    """Called once for every exchange that is started."""


class DenseReduction:
    """A bucket that travels whole: before compression starts, or because its rules say so."""

    def __init__(self, numel: int, gradient_dtype: torch.dtype, requested: str, group: dist.ProcessGroup) -> None:
        section = Section(1, numel, wire_dtype(requested, gradient_dtype))
        self._exchange = make_exchange([section], group, in_place=True)

    def begin(self, buffer: Tensor, context: StepContext) -> None:
        """Start the exchange of `buffer`, the flat bucket."""
        self._buffer, self._context = buffer, context
        self._exchange.start([buffer.float().unsqueeze(0)])
        context.count(self._exchange)

    def advance(self) -> None:
        """Launch what depends on the first collective."""
        self._exchange.advance()

    def finish_first(self) -> Tensor | None:
        """Wait; the bucket then holds the mean. Returns whether it is finite (bool tensor), or None if nobody asks."""
        (mean,) = self._exchange.finish()
        self._exchange.release()
        if mean.data_ptr() != self._buffer.data_ptr():
            self._buffer.copy_(mean[0])
        return all_finite(mean) if self._context.check_finite else None

    def start_second(self, step_is_finite: Tensor | bool) -> None:
        """Nothing is left to send."""

    def advance_second(self) -> None:
        """Nothing was sent."""

    def finish(self, step_is_finite: Tensor | bool) -> list[Measurement]:
        """Nothing is left to decode; no residual is kept."""
        del self._buffer
        return []


class CompressedReduction:
    """A bucket with matrices to factor; what it sends dense rides in the first exchange."""

    def __init__(
        self, states: list[LowRankState], dense: list[DenseSpans], group: dist.ProcessGroup, *, find_unused: bool
    ) -> None:
        self._states, self._dense = states, dense
        self._num_flags = sum(len(state.batch.names) for state in states) if find_unused else 0
        self._first = [make_exchange(self._first_sections(parity), group) for parity in (0, 1)]
        self._second_states = [state for state in states if state.rounds == 2]
        second_sections = [state.batch.section(state.batch.columns) for state in self._second_states]
        self._second = make_exchange(second_sections, group) if second_sections else None

    def _first_sections(self, parity: int) -> list[Section]:
        sections = []
        for state in self._states:
            sends_left = state.rounds == 2 or parity == 0
            sections.append(state.batch.section(state.batch.rows if sends_left else state.batch.columns))
        sections += [spans.section for spans in self._dense]
        return sections + ([Section(1, self._num_flags, "fp32")] if self._num_flags else [])

    def begin(self, buffer: Tensor, context: StepContext) -> None:
        """Compute the first factors and start their exchange."""
        self._buffer, self._context = buffer, context
        self._work = buffer.float()  # the buffer itself where it is fp32
        values = [
            state.begin(self._work, context.residual_scale, context.step, find_unused=context.find_unused)
            for state in self._states
        ]
        values += [spans.gather(self._work) for spans in self._dense]
        if self._num_flags:
            used = [state.used for state in self._states if state.used is not None]
            values.append(torch.cat(used).float().unsqueeze(0))
        self._exchange = self._first[context.step % 2]
        self._exchange.start(values)
        context.count(self._exchange)

    def advance(self) -> None:
        """Launch what depends on the first collective of the first exchange."""
        self._exchange.advance()

    def finish_first(self) -> Tensor | None:
        """Wait for the first factors. Returns whether all of the bucket is finite on all ranks, a bool tensor."""
        means = self._exchange.finish()
        for state, mean in zip(self._states, means, strict=False):
            state.receive_first(mean)
        finite = [state.finite.all() for state in self._states]
        for spans, mean in zip(self._dense, means[len(self._states) :], strict=False):
            spans.scatter(self._work, mean)
            finite.append(all_finite(mean))
        if self._num_flags:
            fractions = means[-1][0].split([len(state.batch.names) for state in self._states])
            for state, fraction in zip(self._states, fractions, strict=True):
                state.set_used_anywhere(fraction)
        return torch.stack(finite).all()

    def start_second(self, step_is_finite: Tensor | bool) -> None:
        """Compute Q from the common basis and start its exchange, for the matrices that take two rounds."""
        if self._second is not None:
            self._second.start([state.second_factor(step_is_finite) for state in self._second_states])
            self._context.count(self._second)

    def advance_second(self) -> None:
        """Launch what depends on the first collective of the second exchange."""
        if self._second is not None:
            self._second.advance()

    def finish(self, step_is_finite: Tensor | bool) -> list[Measurement]:
        """Keep the residuals while the second factors fly, then decode."""
        measured: list[Measurement] = []
        if any(state.rounds == 1 for state in self._states):
            pairs = zip(self._states, self._exchange.shares(), strict=False)
            measured += self._commit([pair for pair in pairs if pair[0].rounds == 1], step_is_finite)
        self._exchange.release()
        if self._second is not None:
            measured += self._commit(list(zip(self._second_states, self._second.shares(), strict=True)), step_is_finite)
            for state, mean in zip(self._second_states, self._second.finish(), strict=True):
                state.receive_second(mean)
            self._second.release()
        for state in self._states:
            state.decode(step_is_finite)
        if self._work is not self._buffer:
            self._buffer.copy_(self._work)
        del self._work, self._buffer
        return measured

    def _commit(self, shares: list[tuple[LowRankState, Tensor]], step_is_finite: Tensor | bool) -> list[Measurement]:
        measurements = [state.commit(share, step_is_finite, measure=self._context.measure) for state, share in shares]
        return [measurement for measurement in measurements if measurement is not None]


Reduction = DenseReduction | CompressedReduction


def all_finite(values: Tensor) -> Tensor:
    """Whether no value is Inf or NaN, a bool scalar tensor."""
    if values.device.type == "cpu":
        # Inf and NaN survive a sum, so a finite sum proves it in one fast pass; finite values may still overflow it.
        finite = values.sum().isfinite()
        if finite:
            return finite
    return values.isfinite().all()
