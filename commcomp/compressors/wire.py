"""Number formats on the wire: fp32 rows to bytes and back.

fp16 and int8 carry one fp32 scale a row, so neither leaves its range: int8 spans the row's largest magnitude, fp16 is
scaled by a power of two, which rounds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from commcomp.compressors import native

_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
_SCALED = ("fp16", "int8")
_INT8_LARGEST = 127.0
_FP16_LARGEST_EXPONENT = 15
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
        return _aligned(values) + (4 * self.rows if self.dtype in _SCALED else 0)


def encode_into(out: Tensor, values: Tensor, dtype: str) -> None:
    """Encode `values`, fp32 [..., rows, length], into `out`, uint8 [..., encoded_bytes].

    int8 rounds to nearest with scale max|row| / 127; a row holding Inf or NaN decodes to non-finite values only. In
    the float formats only the values that are not finite themselves do.
    """
    rows, length = values.shape[-2:]
    if values.numel() == 0:
        out.zero_()
        return
    if dtype == "int8" and native.encode_int8_rows(out, values, _aligned(rows * length)):
        return
    if dtype in _SCALED:
        values, scale = _scaled_int8(values) if dtype == "int8" else _scaled_fp16(values)
        _scales_view(out, rows, length, dtype).copy_(scale)
    _values_view(out, rows * length, dtype).copy_(values.flatten(-2))


def _scaled_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    scale = values.abs().amax(dim=-1) / _INT8_LARGEST
    tiny = scale < torch.finfo(torch.float32).tiny  # zero, or too small for an accurate scale: the row is sent as 0
    scale = torch.where(tiny, 1.0, scale)
    rounded = (values / scale.unsqueeze(-1)).round_().nan_to_num_(0.0, 0.0, 0.0)
    return rounded, torch.where(torch.isfinite(scale), scale, torch.nan)


def _scaled_fp16(values: Tensor) -> tuple[Tensor, Tensor]:
    largest = values.abs().amax(dim=-1)
    usable = torch.isfinite(largest) & (largest > torch.finfo(torch.float32).tiny)
    # The power of two above the largest value, brought to fp16's upper range; frexp's exponent is exact.
    exponent = torch.frexp(torch.where(usable, largest, 2.0 ** (_FP16_LARGEST_EXPONENT - 1))).exponent
    scale = torch.ldexp(torch.ones_like(largest), (exponent - _FP16_LARGEST_EXPONENT).clamp(min=-126))
    return values / scale.unsqueeze(-1), scale


def decode(data: Tensor, rows: int, length: int, dtype: str) -> Tensor:
    """Inverse of `encode_into`: uint8 [..., encoded_bytes] to fp32 [..., rows, length]."""
    if data.numel() == 0 or rows * length == 0:
        return torch.zeros(*data.shape[:-1], rows, length, device=data.device)
    if dtype == "int8":
        whole = native.decode_int8_rows(data, rows, length, _aligned(rows * length), mean=False)
        if whole is not None:
            return whole
    values = _values_view(data, rows * length, dtype).float().unflatten(-1, (rows, length))
    if dtype in _SCALED:
        values *= _scales_view(data, rows, length, dtype).unsqueeze(-1)
    return values


def decode_mean(data: Tensor, rows: int, length: int, dtype: str) -> Tensor:
    """The mean of N encoded blocks, uint8 [N, encoded_bytes], as fp32 [rows, length]; added in order, in fp32."""
    if dtype == "int8" and rows * length:
        mean = native.decode_int8_rows(data, rows, length, _aligned(rows * length), mean=True)
        if mean is not None:
            return mean
    # One addition at a time in rank order: sum() over a dimension may associate differently from device to device.
    blocks = decode(data, rows, length, dtype)
    total = blocks[0].clone()
    for block in blocks[1:]:
        total += block
    return total / len(blocks)


def _values_view(data: Tensor, count: int, dtype: str) -> Tensor:
    stored = _FLOATS.get(dtype, torch.int8)
    return data[..., : count * _ITEM_BYTES[dtype]].view(stored)


def _scales_view(data: Tensor, rows: int, length: int, dtype: str) -> Tensor:
    start = _aligned(rows * length * _ITEM_BYTES[dtype])
    return data[..., start : start + 4 * rows].view(torch.float32)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
