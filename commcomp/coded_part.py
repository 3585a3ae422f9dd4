"""Parameters of one bucket that travel value by value in a lossy format: quantised or sparse, with error feedback."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from commcomp.bucket_part import BucketPart, Measurement, Place, StepContext, all_finite, any_nonzero
from commcomp.compressors.wire import Section
from commcomp.error_feedback import ParameterStore
from commcomp.exchange.exchange import Share
from commcomp.layout import Spans
from commcomp.residuals import ValueResiduals


def _padding(spans: Spans) -> Iterator[tuple[int, slice]]:
    """Row and place in it of all that belongs to no parameter."""
    end = 0
    for entry in spans.entries:
        end += entry.numel
        for row, count in enumerate(entry.padding):
            if count:
                yield row, slice(end - count, end)


class CodedPart(BucketPart):
    """Residuals of the part's parameters, and the order in which a step uses them.

    What is sent is M, gradient plus residual, formed in the gradient's own memory; the residual stays as it was until
    the whole step is known to be finite.
    """

    def __init__(
        self, spans: Spans, store: ParameterStore, place: Place, *, residual_dtype: str, device: torch.device
    ) -> None:
        self._spans, self.by_owner = spans, place.by_owner
        self.names = spans.names
        self._sum: Tensor | None = None
        self._padding = list(_padding(spans))
        self._residual: ValueResiduals | None = None
        if residual_dtype != "none":
            shapes = [entry.shape for entry in spans.entries]
            self._residual = ValueResiduals(store, self.names, place.num_rows, shapes, residual_dtype, device)

    def first_section(self, parity: int) -> Section:
        return self._spans.section

    def begin(self, rows: Tensor, target: Tensor, context: StepContext) -> Tensor:
        self._target, self._step = target, context.step
        if context.find_unused:
            self.used = torch.cat([any_nonzero(part.unsqueeze(0)) for part in self._spans.slices(rows)])
        owed = None if self._residual is None else self._residual.values(context.residual_scale)
        total = self._spans.take(rows, owed)
        if self.wants_share(context.measure):
            self._sum = total  # on a 1-D mesh as large as all the parameters
        return self._as_sent(total)

    def receive_first(self, mean: Tensor) -> Tensor:
        self._mean = mean[0]
        self._finite = all_finite(mean)
        return self._finite

    def wants_share(self, measure: bool) -> bool:
        return measure or self._residual is not None

    def commit(self, share: Share, step_is_finite: Tensor | bool, *, measure: bool) -> Measurement | None:
        if step_is_finite is False:
            return None
        assert self._sum is not None
        total, residual = self._sum, self._residual
        own_memory = None if residual is None else residual.memory_for_fp32(step_is_finite)
        kept = torch.empty_like(total) if own_memory is None else own_memory
        if self.used is None:
            share.subtract_from(self._as_sent(total), self._as_sent(kept))
        else:
            torch.sub(total, self._masked(share.decoded().view_as(total)), out=kept)
        for row, place in self._padding:
            kept[row, place] = 0.0  # a rotation spreads errors over what fills a piece up too; that is saved nowhere
        if residual is not None and own_memory is None:
            residual.keep(kept, step_is_finite, self._step)
        if not measure:
            return None
        return Measurement(self.names, self._squared_norms(total), self._squared_norms(kept))

    def decode(self, step_is_finite: Tensor | bool) -> None:
        if step_is_finite is not True:
            # A format may show bad numbers in a part of what it carries only; none of it may look sound.
            self._mean = torch.where(self._finite, self._mean, torch.nan)
        self._spans.scatter(self._target, self._mean)
        self._sum = None
        del self._target, self._mean

    def _as_sent(self, values: Tensor) -> Tensor:
        """[W, numel] in the shape in which the exchange takes it."""
        return values.unsqueeze(1) if self.by_owner else values

    def _masked(self, delivered: Tensor) -> Tensor:
        if self.used is None:
            return delivered
        parts = self._spans.split(delivered)
        return torch.cat([part * used for part, used in zip(parts, self.used, strict=True)], dim=-1)

    def _squared_norms(self, values: Tensor) -> Tensor:
        norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in self._spans.split(values)]
        return torch.stack(norms) ** 2
