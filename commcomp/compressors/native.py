"""The passes of a low-rank step in one go over memory, where gradient and residual are fp32 on the CPU.

On a CPU such a step is bound by memory: torch's operations read and write the gradient and the residual ten times over,
these passes seven. Without commcomp._native (not built), and for other dtypes and devices, torch's operations serve.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from commcomp import _native
except ImportError:  # used from a checkout that was not installed
    _native = None  # type: ignore[assignment]

available = _native is not None
"""Whether commcomp._native is installed."""


class FusedBatch:
    """The batch M = gradient + scale residual, [k, n, m] each, and its passes; results are fp32.

    Sums run in another order than torch's, so factors differ from theirs by rounding. They do not depend on the number
    of threads, which is torch's of the calling thread.
    """

    def __init__(self, gradient: Tensor, residual: Tensor, rank: int) -> None:
        self._held = (gradient, residual)  # addresses are only good while the tensors live
        count, rows, columns = gradient.shape
        self._sizes = (count, rank, rows, columns)
        places = (gradient.data_ptr(), gradient.stride(0), residual.data_ptr(), residual.stride(0))
        self._batch = _native.LowRankBatch(*places, count, rows, columns, rank)

    def left_factor(self, right: Tensor, scale: float) -> Tensor:
        """P = M Q: `right` [k, r, m] to [k, r, n]."""
        count, rank, rows, columns = self._sizes
        out = right.new_empty(count, rank, rows)
        address = _address(right, count, rank, columns)
        self._batch.left_factor(address, scale, out.data_ptr(), torch.get_num_threads())
        return out

    def right_factor(self, left: Tensor, scale: float, *, form: bool) -> Tensor:
        """Q = M^T P: `left` [k, r, n] to [k, r, m]; with `form` the residual's memory then holds M."""
        count, rank, rows, columns = self._sizes
        out = left.new_empty(count, rank, columns)
        address = _address(left, count, rank, rows)
        self._batch.right_factor(address, scale, form, out.data_ptr(), torch.get_num_threads())
        return out

    def subtract(self, left: Tensor, right: Tensor) -> None:
        """residual -= P Q^T."""
        self._batch.subtract(*self._both(left, right), torch.get_num_threads())

    def reconstruct(self, left: Tensor, right: Tensor) -> None:
        """gradient = P Q^T, past the caches."""
        self._batch.reconstruct(*self._both(left, right), torch.get_num_threads())

    def _both(self, left: Tensor, right: Tensor) -> tuple[int, int]:
        count, rank, rows, columns = self._sizes
        return _address(left, count, rank, rows), _address(right, count, rank, columns)


def fused_batch(gradient: Tensor, residual: Tensor, rank: int) -> FusedBatch | None:
    """The fused passes over `gradient` and `residual`, [k, n, m] each; None where they cannot be used."""
    if not available or gradient.shape != residual.shape:
        return None
    for matrices in (gradient, residual):
        plain = matrices.device.type == "cpu" and matrices.dtype == torch.float32 and matrices.dim() == 3
        if not plain or not matrices[0].is_contiguous():
            return None
    return FusedBatch(gradient, residual, rank)


def _address(factor: Tensor, *shape: int) -> int:
    if factor.shape != shape or factor.dtype != torch.float32 or factor.device.type != "cpu":
        found = f"{tuple(factor.shape)} {factor.dtype} on {factor.device}"
        raise ValueError(f"a factor is {found}; expected {shape} torch.float32 on cpu")
    if not factor.is_contiguous():
        raise ValueError(f"a factor of shape {shape} has strides {factor.stride()}; expected a contiguous one")
    return factor.data_ptr()
