"""What commcomp._native does on the CPU in one go: the passes of a low-rank step, and int8 rows.

On a CPU a low-rank step is bound by memory: torch's operations read or write gradient or residual ten times a step,
these passes eight. Without commcomp._native (not built), and for other dtypes and devices, torch's operations serve.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import torch
from torch import Tensor

try:
    from commcomp import _native
except ImportError as error:
    _native = None  # type: ignore[assignment]
    if find_spec("commcomp._native") is not None:  # else it was installed without a compiler, or not at all
        warnings.warn(f"commcomp._native cannot be loaded, torch's slower operations serve: {error}", stacklevel=2)

available = _native is not None
"""Whether commcomp._native is installed."""


VALUES_A_THREAD = 1 << 20
"""Starting a thread takes as long as going over some 100 000 values, and memory is soon the limit."""


def arithmetic(device: torch.device) -> str:
    """Whose passes serve on `device` and how they round, in a word."""
    if not available or device.type != "cpu":
        return "torch"
    return "native, plain" if _native.instruction_sets() == ["plain"] else "native, fused multiply-add"


def threads_for(values: int) -> int:
    """Threads for a pass over so many values: torch's of the calling thread, or fewer."""
    return max(1, min(torch.get_num_threads(), values // VALUES_A_THREAD))


class FusedBatch:
    """The batch M = gradient + scale residual, [k, n, m] each, and its passes; results are fp32.

    Sums run in another order than torch's, so factors differ from theirs by rounding. They do not depend on the number
    of threads: torch's of the calling thread, or fewer for small batches.
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
        self._batch.left_factor(address, scale, out.data_ptr(), self._threads())
        return out

    def right_factor(self, left: Tensor, scale: float, *, form: bool) -> Tensor:
        """Q = M^T P: `left` [k, r, n] to [k, r, m]; with `form` the residual's memory then holds M."""
        count, rank, rows, columns = self._sizes
        out = left.new_empty(count, rank, columns)
        address = _address(left, count, rank, rows)
        self._batch.right_factor(address, scale, form, out.data_ptr(), self._threads())
        return out

    def subtract(self, left: Tensor, right: Tensor) -> None:
        """residual -= P Q^T."""
        self._batch.subtract(*self._both(left, right), self._threads())

    def reconstruct(self, left: Tensor, right: Tensor) -> None:
        """gradient = P Q^T, past the caches."""
        self._batch.reconstruct(*self._both(left, right), self._threads())

    def _threads(self) -> int:
        count, _rank, rows, columns = self._sizes
        return threads_for(count * rows * columns)

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


def encode_int8_rows(out: Tensor, values: Tensor, scales_at: int) -> bool:
    """Encode `values`, fp32 [rows, length], as wire.py does: codes from byte 0 of `out` (uint8 [bytes]), scales from
    byte `scales_at`. False, and nothing done, where this cannot be used."""
    if not (available and values.dim() == 2 and values.is_contiguous() and _on_cpu(values, out)):
        return False
    rows, length = values.shape
    if values.dtype != torch.float32:
        raise ValueError(f"int8 rows are encoded from torch.float32, not {values.dtype}")
    _require_bytes(out, rows, length, scales_at)
    _native.encode_rows(values.data_ptr(), rows, length, out.data_ptr(), out.data_ptr() + scales_at)
    return True


def decode_int8_rows(data: Tensor, rows: int, length: int, scales_at: int, *, mean: bool) -> Tensor | None:
    """What `encode_int8_rows` wrote into `data`, uint8 [bytes], as fp32 [rows, length]; with `mean` the mean of N such
    payloads, [N, bytes]. None where this cannot be used."""
    if not (available and data.dim() == 1 + mean and _on_cpu(data)):
        return None
    _require_bytes(data, rows, length, scales_at)
    out = torch.empty(rows, length)
    start = data.data_ptr()
    if mean:
        ranks = (len(data), data.stride(0))
        _native.decode_mean_of_rows(start, start + scales_at, *ranks, rows, length, out.data_ptr())
    else:
        _native.decode_rows(start, start + scales_at, rows, length, out.data_ptr())
    return out


def _require_bytes(data: Tensor, rows: int, length: int, scales_at: int) -> None:
    expected = scales_at + 4 * rows
    if data.dtype != torch.uint8 or data.stride(-1) != 1 or data.shape[-1] < expected or scales_at < rows * length:
        found = f"{data.shape[-1]} of {data.dtype}, stride {data.stride(-1)}"
        raise ValueError(f"int8 rows [{rows}, {length}] take {expected} neighbouring torch.uint8; here are {found}")


def _on_cpu(*tensors: Tensor) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)
