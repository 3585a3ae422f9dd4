"""A step's passes over one batch M = gradient + scale residual: torch's operations, or fused ones on a CPU.

M is not formed before the whole step is known to be finite on all ranks: products with the gradient and with the
residual cost less memory traffic than writing the sum, and leave both as they were if the step turns out bad.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from commcomp.compressors import low_rank
from commcomp.compressors.native import FusedBatch, fused_batch

_PROBE_ROWS = 64


class MatrixPasses:
    """The passes by torch's operations, for any device and dtype.

    `gradient` is fp32 [k, n, m], any strides; `residual` [k, n, m], fp32 or bf16, or None: M is the gradient. Factors
    are fp32 [k, r, n] (left) and [k, r, m] (right). `scale` converts the residual to the gradient's loss scale.
    `finite` below tells whether the step is finite on all ranks: a bool where the host may know it (CPU), else a bool
    tensor, for which nothing waits.
    """

    def __init__(self, gradient: Tensor, residual: Tensor | None, scale: Tensor | float) -> None:
        self.gradient, self.residual = gradient, residual
        self._scale = scale
        self._holds_sum = False  # whether the residual's memory holds M

    def left_factor(self, right: Tensor) -> Tensor:
        """P = M Q, [k, r, n]. Nothing else changes."""
        if self.residual is None:
            return low_rank.left_factor(self.gradient, right)
        owed = low_rank.left_factor(self.residual.float(), right) * self._scale
        return owed + low_rank.left_factor(self.gradient, right)

    def right_factor(self, left: Tensor) -> Tensor:
        """Q = M^T P, [k, r, m]. Nothing else changes."""
        if self.residual is None:
            return low_rank.right_factor(self.gradient, left)
        owed = low_rank.right_factor(self.residual.float(), left) * self._scale
        return owed + low_rank.right_factor(self.gradient, left)

    def right_factor_forming(self, left: Tensor, finite: Tensor | bool) -> Tensor:
        """Q = M^T P, [k, r, m]; the residual's memory then holds M, if that is safe and exact."""
        self.form(finite)
        if self._holds_sum and self.residual is not None:
            return low_rank.right_factor(self.residual, left)
        return self.right_factor(left)

    def form(self, finite: Tensor | bool) -> None:
        """Put M in the residual's memory, if that is safe and exact and it is not there."""
        if self._holds_sum or finite is not True or self.residual is None:
            return
        if self.residual.dtype != self.gradient.dtype:
            return
        if self._scale != 1.0:
            self.residual.mul_(self._scale)
        self.residual.add_(self.gradient)
        self._holds_sum = True

    def keep_rest(self, left: Tensor, right: Tensor, finite: Tensor | bool) -> None:
        """residual = M - P Q^T; with a `finite` that is or turns out False it stays as it was.

        So it does where a factor has overflowed although M is finite (with M formed already: to rounding).
        """
        if finite is False or self.residual is None:
            return
        usable = left.isfinite().flatten(1).all(dim=1) & right.isfinite().flatten(1).all(dim=1)
        if not self._holds_sum:
            kept = torch.baddbmm(self._sum(), left.mT, right, alpha=-1)
            usable = (usable & finite)[:, None, None]
            self.residual.copy_(torch.where(usable, kept, self.residual.float()))
        elif usable.all():
            self._subtract(left, right)
        else:
            self.residual[~usable] -= self.gradient[~usable]
            self._subtract(left.where(usable[:, None, None], 0.0), right.where(usable[:, None, None], 0.0))

    def reconstruct(self, left: Tensor, right: Tensor) -> None:
        """gradient = P Q^T."""
        low_rank.reconstruct_into(self.gradient, left, right)

    def squared_norms(self) -> Tensor:
        """Squared Frobenius norms of M, fp64 [k], before the rest is kept."""
        return _squared_norms(self._sum())

    def rest_squared_norms(self, left: Tensor, right: Tensor) -> Tensor:
        """Squared Frobenius norms of M - P Q^T, fp64 [k], once it is kept (if it is)."""
        if self.residual is None:
            return _squared_norms(torch.baddbmm(self.gradient, left.mT, right, alpha=-1))
        return _squared_norms(self.residual.float())

    def _sum(self) -> Tensor:
        if self.residual is None:
            return self.gradient
        return self.residual if self._holds_sum else self.residual.float() * self._scale + self.gradient

    def _subtract(self, left: Tensor, right: Tensor) -> None:
        assert self.residual is not None
        low_rank.subtract_product(self.residual, left, right)


class FusedPasses(MatrixPasses):
    """The passes by commcomp._native, each touching memory once; fp32 on a CPU."""

    def __init__(self, gradient: Tensor, residual: Tensor, scale: float, fused: FusedBatch) -> None:
        super().__init__(gradient, residual, scale)
        self._fused, self._host_scale = fused, scale

    def left_factor(self, right: Tensor) -> Tensor:
        return self._fused.left_factor(right.contiguous(), self._host_scale)

    def right_factor(self, left: Tensor) -> Tensor:
        return self._fused.right_factor(left.contiguous(), self._host_scale, form=False)

    def right_factor_forming(self, left: Tensor, finite: Tensor | bool) -> Tensor:
        if finite is not True:
            return self.right_factor(left)
        self._holds_sum = True
        return self._fused.right_factor(left.contiguous(), self._host_scale, form=True)

    def reconstruct(self, left: Tensor, right: Tensor) -> None:
        self._fused.reconstruct(left.contiguous(), right.contiguous())

    def _subtract(self, left: Tensor, right: Tensor) -> None:
        self._fused.subtract(left.contiguous(), right.contiguous())


def passes_over(gradient: Tensor, residual: Tensor | None, rank: int, scale: Tensor | float) -> MatrixPasses:
    """The fastest passes that these tensors allow."""
    fused = None if residual is None else fused_batch(gradient, residual, rank)
    if residual is None or fused is None:
        return MatrixPasses(gradient, residual, scale)
    return FusedPasses(gradient, residual, float(scale), fused)


def rounding_digest(shapes: Iterable[tuple[int, int, int]]) -> str:
    """A few letters that tell how this process rounds what decides the decoded bits, for (rank, rows, columns).

    Equal on ranks with the same processor, libraries and number of threads. On a CPU.
    """
    digest = hashlib.sha256()
    for rank, rows, columns in sorted(set(shapes)):
        basis = low_rank.orthonormal_rows(low_rank.initial_factor("probe", rank, rows, seed=0).unsqueeze(0))
        digest.update(basis.numpy().tobytes())
        gradient = torch.zeros(1, min(rows, _PROBE_ROWS), columns)
        passes = passes_over(gradient, torch.zeros_like(gradient), rank, 1.0)
        right = low_rank.initial_factor("probe", rank, columns, seed=1).unsqueeze(0)
        passes.reconstruct(basis[..., :_PROBE_ROWS], right)
        digest.update(gradient.numpy().tobytes())
    return digest.hexdigest()[:8]


def _squared_norms(matrices: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrices, dim=(1, 2), dtype=torch.float64) ** 2
