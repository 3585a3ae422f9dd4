"""Number formats on the wire: fp32 rows to bytes and back, with one scale a row for int8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
_INT8_LARGEST = 127.0
_ALIGNMENT = 4


@dataclass(frozen=True)
class Section:
    """A block of `rows` x `length` fp32 values that travels as `dtype` (fp32, fp16, bf16 or int8)."""

    rows: int
    length: int
    dtype: str

    def encoded_bytes(self, length: int | None = None) -> int:
        """Bytes of the encoded block (of another row length, if given), a multiple of 4."""
        values = self.rows * (self.length if length is None else length) * _ITEM_BYTES[self.dtype]
        return _aligned(values) + (4 * self.rows if self.dtype == "int8" else 0)


def encode_into(out: Tensor, values: Tensor, dtype: str) -> None:
    """Encode `values`, fp32 [..., rows, length], into `out`, uint8 [..., encoded_bytes].

    int8 rounds to nearest with scale max|row| / 127; a row holding Inf or NaN decodes to non-finite values only.
    """
    rows, length = values.shape[-2:]
    if values.numel() == 0:
        out.zero_()
        return
    flat = values.flatten(-2)
    if dtype != "int8":
        _values_view(out, rows * length, dtype).copy_(flat)
        return
    scale = values.abs().amax(dim=-1) / _INT8_LARGEST
    tiny = scale < torch.finfo(torch.float32).tiny  # zero, or too small for an accurate scale: the row is sent as 0
    safe = torch.where(tiny, 1.0, scale)
    rounded = (values / safe.unsqueeze(-1)).round_().nan_to_num_(0.0, 0.0, 0.0)
    _values_view(out, rows * length, dtype).copy_(rounded.flatten(-2))
    _scales_view(out, rows, length).copy_(torch.where(torch.isfinite(scale), safe, torch.nan))


def decode(data: Tensor, rows: int, length: int, dtype: str) -> Tensor:
    """Inverse of `encode_into`: uint8 [..., encoded_bytes] to fp32 [..., rows, length]."""
    if data.numel() == 0 or rows * length == 0:
        return torch.zeros(*data.shape[:-1], rows, length, device=data.device)
    values = _values_view(data, rows * length, dtype).float().unflatten(-1, (rows, length))
    if dtype == "int8":
        values *= _scales_view(data, rows, length).unsqueeze(-1)
    return values


def _values_view(data: Tensor, count: int, dtype: str) -> Tensor:
    stored = _FLOATS.get(dtype, torch.int8)
    return data[..., : count * _ITEM_BYTES[dtype]].view(stored)


def _scales_view(data: Tensor, rows: int, length: int) -> Tensor:
    start = _aligned(rows * length)
    return data[..., start : start + 4 * rows].view(torch.float32)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
