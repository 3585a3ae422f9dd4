"""One batch of matrices through a step: factors out, mean factors in, residual kept, gradient overwritten.

What is compressed is M = G + E, gradient plus residual; compressors/passes.py goes over it.

Of a bucket with W rows each row holds c rows of every matrix, those that one rank owns; what fills them up to c is
zero. Both factors are exchanged whole: the orthonormal basis needs all of P, and every rank's rows need all of Q. Only
the own rows are decoded.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from commcomp.bucket_part import BucketPart, Measurement, Place, StepContext, any_nonzero
from commcomp.compressors import low_rank
from commcomp.compressors.passes import MatrixPasses, passes_over
from commcomp.compressors.wire import Section
from commcomp.error_feedback import (
    RESIDUAL,
    WARM_LEFT,
    WARM_RIGHT,
    FieldSpec,
    ParameterStore,
)
from commcomp.exchange.exchange import Share
from commcomp.layout import MatrixBatch
from commcomp.residuals import packed, residual_spec, unpacked


def warm_start_fields(rows: int, columns: int, rank: int, rounds: int, *, seed: int) -> dict[str, FieldSpec]:
    """The factors that are kept between steps for a matrix rows x columns that is factored with `rank`."""
    right = partial(low_rank.initial_factor, rank=rank, length=columns, seed=seed)
    kept = {WARM_RIGHT: FieldSpec((rank, columns), torch.float32, right)}
    if rounds == 1:
        left = partial(low_rank.initial_factor, rank=rank, length=rows, seed=seed + 1)
        kept[WARM_LEFT] = FieldSpec((rank, rows), torch.float32, left)
    return kept


class LowRankPart(BucketPart):
    """Residual and warm start of one batch, and the order in which a step uses them."""

    def __init__(
        self,
        batch: MatrixBatch,
        store: ParameterStore,
        place: Place,
        *,
        residual_dtype: str,
        seed: int,
        device: torch.device,
    ) -> None:
        self.batch, self.names = batch, batch.names
        self._place = place
        self.rounds = batch.method.rounds
        fields = warm_start_fields(batch.total_rows, batch.columns, batch.rank, self.rounds, seed=seed)
        if spec := residual_spec(residual_dtype, (place.num_rows, batch.rows, batch.columns)):
            fields[RESIDUAL] = spec
        bound = {
            field: store.batch(field, batch.names, spec.shape, dtype=spec.dtype, device=device, initial=spec.initial)
            for field, spec in fields.items()
        }
        for length in (batch.total_rows, batch.columns):
            low_rank.prepare(batch.rank, length, device)
        residual = bound.get(RESIDUAL)
        self._residuals = [None] * place.num_rows if residual is None else list(residual.unbind(1))
        self.right = bound[WARM_RIGHT]
        if self.rounds == 1:
            self.left = bound[WARM_LEFT]

    def first_section(self, parity: int) -> Section:
        return self.batch.section(self._left_length if self.rounds == 2 or parity == 0 else self.batch.columns)

    def begin(self, rows: Tensor, target: Tensor, context: StepContext) -> Tensor:
        self._target = target
        gradients = [self.batch.view(row) for row in rows]
        if context.find_unused:
            self.used = torch.stack([any_nonzero(part) for part in gradients]).any(dim=0)
        pairs = zip(gradients, self._residuals, strict=True)
        self._passes = [self._passes_over(gradient, residual, context) for gradient, residual in pairs]
        self.sends_left = self.rounds == 2 or context.step % 2 == 0
        if self.rounds == 2:
            return self._left_factor(self.right)
        if self.sends_left:
            self.basis = low_rank.orthonormal_rows(self.right)
            return self._left_factor(self.basis)
        self.basis = self._padded(low_rank.orthonormal_rows(self.left))
        parts = zip(self._passes, self._by_row(self.basis), strict=True)
        return _sum([passes.right_factor(left) for passes, left in parts]).flatten(0, 1)

    def receive_first(self, mean: Tensor) -> Tensor:
        mean = mean.unflatten(0, (-1, self.batch.rank))
        self.finite = mean.isfinite().flatten(1).all(dim=1)
        if self.rounds == 2:
            self.basis = self._padded(low_rank.orthonormal_rows(mean[..., : self.batch.total_rows]))
        else:
            self.mean = mean
        return self.finite.all()

    def second_section(self) -> Section:
        """How Q travels, with rounds=2."""
        return self.batch.section(self.batch.columns)

    def second_factor(self, step_is_finite: Tensor | bool) -> Tensor:
        """This rank's Q = M^T P for rounds=2, [k r, m]."""
        self.sends_left = False
        parts = zip(self._passes, self._by_row(self.basis), strict=True)
        own = _sum([passes.right_factor_forming(left, step_is_finite) for passes, left in parts])
        return self._masked(own).flatten(0, 1)

    def receive_second(self, mean: Tensor) -> None:
        """Take the mean of the second factors, [k r, m]."""
        self.mean = mean.unflatten(0, (-1, self.batch.rank))

    def wants_share(self, measure: bool) -> bool:
        return measure or self._residuals[0] is not None

    def commit(self, share: Share, step_is_finite: Tensor | bool, *, measure: bool) -> Measurement | None:
        if step_is_finite is False:
            return None
        left, right = self._sides(self._masked(share.decoded().unflatten(0, (-1, self.batch.rank))))
        totals, kept = [], []
        for passes, rows in zip(self._passes, self._by_row(left), strict=True):
            passes.form(step_is_finite)
            if measure:
                totals.append(passes.squared_norms())
            passes.keep_rest(rows, right, step_is_finite)
            if measure:
                kept.append(passes.rest_squared_norms(rows, right))
        return Measurement(self.names, _sum(totals), _sum(kept)) if measure else None

    def decode(self, step_is_finite: Tensor | bool) -> None:
        mean = self._masked(self.mean)
        if step_is_finite is not True:
            # A matrix that was not finite on some rank must not look finite to the optimizer or the loss scaler.
            mean = torch.where(self.finite[:, None, None], mean, torch.nan)
        left, right = self._sides(mean)
        own = self._passes[self._place.own_row]
        own.reconstruct(self._by_row(left)[self._place.own_row], right)
        if self._place.by_owner:
            self.batch.view(self._target).copy_(own.gradient)
        self._move_warm_start(step_is_finite)
        del self._passes, self._target, self.basis, self.mean

    def _passes_over(self, gradient: Tensor, residual: Tensor | None, context: StepContext) -> MatrixPasses:
        if residual is not None and residual.dtype == torch.uint8:
            return PassesOverCodes(gradient, residual, context, self.names)
        return passes_over(gradient, residual, self.batch.rank, context.residual_scale)

    @property
    def _left_length(self) -> int:
        return self._place.num_rows * self.batch.rows

    def _left_factor(self, right: Tensor) -> Tensor:
        """P = M Q, [k r, W c]."""
        parts = [passes.left_factor(right) for passes in self._passes]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).flatten(0, 1)

    def _by_row(self, left: Tensor) -> list[Tensor]:
        """[k, r, W c] as one piece [k, r, c] a bucket row."""
        return list(left.split(self.batch.rows, dim=-1))

    def _padded(self, left: Tensor) -> Tensor:
        missing = self._left_length - left.shape[-1]
        return pad(left, (0, missing)) if missing else left

    def _masked(self, factor: Tensor) -> Tensor:
        return factor if self.used is None else factor * self.used[:, None, None]

    def _sides(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        return (factor, self.basis) if self.sends_left else (self.basis, factor)

    def _move_warm_start(self, step_is_finite: Tensor | bool) -> None:
        warm = self.left if self.sends_left else self.right
        mean = self.mean[..., : warm.shape[-1]]
        moved = low_rank.unit_largest(mean, otherwise=warm)
        keep = mean.isfinite().flatten(1).all(dim=1) & step_is_finite
        if self.used is not None:
            keep &= self.used
        warm.copy_(torch.where(keep[:, None, None], moved, warm))


class PassesOverCodes(MatrixPasses):
    """The passes with an int8 residual, uint8 [k, b]: M is formed in the gradient's memory, the rest is coded anew."""

    def __init__(self, gradient: Tensor, codes: Tensor, context: StepContext, names: tuple[str, ...]) -> None:
        gradient += unpacked(codes, tuple(gradient.shape)) * context.residual_scale
        super().__init__(gradient, None, context.residual_scale)
        self._codes, self._step, self._names = codes, context.step, names

    def keep_rest(self, left: Tensor, right: Tensor, finite: Tensor | bool) -> None:
        if finite is False:
            return
        usable = (left.isfinite().flatten(1).all(dim=1) & right.isfinite().flatten(1).all(dim=1) & finite)[:, None]
        rest = torch.baddbmm(self.gradient, left.mT, right, alpha=-1)
        parts = zip(self._names, rest, self._codes, strict=True)
        kept = torch.stack([packed(own, codes, name=name, step=self._step) for name, own, codes in parts])
        self._codes.copy_(torch.where(usable, kept, self._codes))


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
