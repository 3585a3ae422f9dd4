"""One batch of matrices through a step: residual in, factors out, mean factors in, residual kept.

The gradient G and the residual E meet as M = G + E in the gradient's own memory, so E stays as it was until the whole
step is known to be finite; only then `commit` replaces it by M minus this rank's share of what was delivered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from commcomp.compressors import low_rank
from commcomp.error_feedback import RESIDUAL, WARM_LEFT, WARM_RIGHT, ParameterStore
from commcomp.layout import MatrixBatch

_RESIDUAL_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class FieldSpec:
    """Shape and dtype of one kept value of a factored parameter, and its value before the first step (None: zeros)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    initial: Callable[[str], Tensor] | None = None

    def make(self, name: str, device: torch.device) -> Tensor:
        """The value that parameter `name` starts with."""
        if self.initial is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=device)
        return self.initial(name).to(device)


def kept_fields(
    rows: int, columns: int, rank: int, rounds: int, *, residual_dtype: str, seed: int
) -> dict[str, FieldSpec]:
    """What is kept between steps for a matrix rows x columns that is factored with `rank`."""
    right = partial(low_rank.initial_factor, rank=rank, length=columns, seed=seed)
    kept = {
        RESIDUAL: FieldSpec((rows, columns), _RESIDUAL_DTYPES[residual_dtype]),
        WARM_RIGHT: FieldSpec((rank, columns), torch.float32, right),
    }
    if rounds == 1:
        left = partial(low_rank.initial_factor, rank=rank, length=rows, seed=seed + 1)
        kept[WARM_LEFT] = FieldSpec((rank, rows), torch.float32, left)
    return kept


@dataclass
class Measurement:
    """Squared norms over one batch at a measured step, fp32 [k] each, on the gradient's device."""

    names: tuple[str, ...]
    total: Tensor
    kept: Tensor


class LowRankState:
    """Residual and warm start of one batch, and the order in which a step uses them."""

    def __init__(
        self, batch: MatrixBatch, store: ParameterStore, *, residual_dtype: str, seed: int, device: torch.device
    ) -> None:
        self.batch = batch
        self.rounds = batch.method.rounds
        fields = kept_fields(
            batch.rows, batch.columns, batch.rank, self.rounds, residual_dtype=residual_dtype, seed=seed
        )
        bound = {
            field: store.batch(field, batch.names, spec.shape, dtype=spec.dtype, device=device, initial=spec.initial)
            for field, spec in fields.items()
        }
        self.residual, self.right, self.left = bound[RESIDUAL], bound[WARM_RIGHT], bound.get(WARM_LEFT)

    def begin(self, flat: Tensor, residual_scale: Tensor | float, step: int, *, find_unused: bool) -> Tensor:
        """Add the residual to the gradient in `flat` (in place) and return this rank's first factor, [k r, length].

        `residual_scale` converts the residual to this step's loss scale.
        """
        self.matrices = self.batch.view(flat)
        self.used = self.matrices.ne(0).any(dim=2).any(dim=1) if find_unused else None
        if isinstance(residual_scale, Tensor):
            self.matrices.addcmul_(self.residual, residual_scale)
        else:
            self.matrices.add_(self.residual, alpha=residual_scale)
        self.sends_left = self.rounds == 2 or step % 2 == 0
        if self.rounds == 2:
            own = low_rank.left_factor(self.matrices, self.right)
        elif self.sends_left:
            self.basis = low_rank.orthonormal_rows(self.right)
            own = low_rank.left_factor(self.matrices, self.basis)
        else:
            self.basis = low_rank.orthonormal_rows(self.left)
            own = low_rank.right_factor(self.matrices, self.basis)
        return own.flatten(0, 1)

    def receive_first(self, mean: Tensor) -> None:
        """Take the mean of the first factors, [k r, length]; `finite` tells per matrix whether it holds no Inf or NaN."""
        mean = mean.unflatten(0, (-1, self.batch.rank))
        self.finite = mean.isfinite().flatten(1).all(dim=1)
        if self.rounds == 2:
            self.basis = low_rank.orthonormal_rows(mean)
        else:
            self.mean = mean

    def second_factor(self) -> Tensor:
        """This rank's Q = M^T P for `rounds=2`, [k r, m]."""
        self.sends_left = False
        own = low_rank.right_factor(self.matrices, self.basis)
        if self.used is not None:
            own *= self.used[:, None, None]
        return own.flatten(0, 1)

    def receive_second(self, mean: Tensor) -> None:
        """Take the mean of the second factors, [k r, m]."""
        self.mean = mean.unflatten(0, (-1, self.batch.rank))

    def set_used_anywhere(self, fraction: Tensor) -> None:
        """`fraction` [k]: share of ranks on which each matrix had a gradient; where it is 0 nothing is delivered.

        DDP leaves the .grad of a parameter that no rank used alone, so what was decoded for it would be lost.
        """
        self.used = fraction > 0

    def commit(self, delivered: Tensor, step_is_finite: Tensor | bool, *, measure: bool) -> Measurement | None:
        """Keep what was not delivered; on a step with Inf or NaN anywhere change nothing.

        `delivered`: this rank's share of the last factor as it was decoded, [k r, length]. `step_is_finite` is a bool
        where the host may know it (CPU) and a bool tensor on a device, where nothing waits for it.
        """
        delivered = delivered.unflatten(0, (-1, self.batch.rank))
        if self.used is not None:
            delivered = delivered * self.used[:, None, None]
        left, right = self._sides(delivered)
        if step_is_finite is False:
            return None
        if step_is_finite is True:
            low_rank.remainder_into(self.residual, self.matrices, left, right)
        else:
            kept = torch.baddbmm(self.matrices, left.mT, right, alpha=-1)
            self.residual.copy_(torch.where(step_is_finite, kept, self.residual))
        if not measure:
            return None
        total, kept = (torch.linalg.vector_norm(x, dim=(1, 2)) ** 2 for x in (self.matrices, self.residual.float()))
        return Measurement(self.batch.names, total, kept)

    def decode(self, step_is_finite: Tensor | bool) -> None:
        """Overwrite the gradient with the mean's low-rank form and move the warm start."""
        mean = self.mean
        if self.used is not None:
            mean = mean * self.used[:, None, None]
        if step_is_finite is not True:
            # A matrix that was not finite on some rank must not look finite to the optimizer or the loss scaler.
            mean = torch.where(self.finite[:, None, None], mean, torch.nan)
        low_rank.reconstruct_into(self.matrices, *self._sides(mean))
        self._move_warm_start(step_is_finite)
        del self.matrices, self.basis, self.mean

    def _sides(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        return (factor, self.basis) if self.sends_left else (self.basis, factor)

    def _move_warm_start(self, step_is_finite: Tensor | bool) -> None:
        warm = self.left if self.sends_left else self.right
        if step_is_finite is True and self.used is None:
            warm.copy_(self.mean)
            return
        keep = self.mean.isfinite().flatten(1).all(dim=1)
        keep = keep & step_is_finite if self.used is None else keep & step_is_finite & self.used
        warm.copy_(torch.where(keep[:, None, None], self.mean, warm))
