"""Number formats on the wire: fp32 rows to bytes and back.

`RowFormat` is here; others are in wire_blocks.py and wire_sparse.py. fp16, fp8 and int8 rows carry one fp32 scale each,
so none leaves its range: int8 and fp8 span the row's largest magnitude, fp16 is scaled by a power of two, which rounds
nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from commcomp.compressors import native

_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
_ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1}
_INT8_LARGEST = 127.0
_FP8_LARGEST = 448.0
_FP16_LARGEST_EXPONENT = 15
_ALIGNMENT = 4


class Format(ABC):
    """How fp32 [rows, length] becomes bytes. Whatever it is, a value that is not finite decodes to none that is."""

    random = False
    """Whether encoding takes random numbers."""

    @abstractmethod
    def encoded_bytes(self, rows: int, length: int) -> int:
        """Bytes of encoded rows, a multiple of 4."""

    @abstractmethod
    def encode_into(self, out: Tensor, values: Tensor, generator: torch.Generator | None = None) -> None:
        """Encode `values`, fp32 [..., rows, length], into `out`, uint8 [..., encoded_bytes].

        `generator` is for formats that round at random; it differs from rank to rank.
        """

    @abstractmethod
    def decode(self, data: Tensor, rows: int, length: int) -> Tensor:
        """Inverse of `encode_into`: uint8 [..., encoded_bytes] to fp32 [..., rows, length]."""

    def decode_mean(self, data: Tensor, rows: int, length: int) -> Tensor:
        """The mean of N encoded blocks, uint8 [N, encoded_bytes], as fp32 [rows, length]; added in order, in fp32."""
        # One addition at a time in rank order: sum() over a dimension may associate differently from device to device.
        total = self.decode(data[0], rows, length)
        for block in data[1:]:
            total += self.decode(block, rows, length)
        return total / len(data)

    def subtract_decoded(self, out: Tensor, total: Tensor, data: Tensor, rows: int, length: int) -> None:
        """out = total - decode(data), to the bit; `out` and `total` are [..., rows, length], perhaps the same."""
        torch.sub(total, self.decode(data, rows, length), out=out)

    def of_mean(self, num_ranks: int) -> Format:
        """The format in which the mean of `num_ranks` blocks goes back."""
        return self


@dataclass(frozen=True)
class Section:
    """A block of `rows` x `length` fp32 values that travels in `format`."""

    rows: int
    length: int
    format: Format

    def encoded_bytes(self) -> int:
        """Bytes of the encoded block, a multiple of 4."""
        return self.format.encoded_bytes(self.rows, self.length)

    def of_length(self, length: int) -> Section:
        """The section of rows of another length."""
        return replace(self, length=length)

    def of_mean(self, num_ranks: int) -> Section:
        """The section in which the mean of `num_ranks` such blocks goes back."""
        return replace(self, format=self.format.of_mean(num_ranks))

    def encode_into(self, out: Tensor, values: Tensor, generator: torch.Generator | None = None) -> None:
        """Encode `values`, fp32 [..., rows, length], into `out`, uint8 [..., encoded_bytes]."""
        if values.numel() == 0:
            out.zero_()
        else:
            self.format.encode_into(out, values, generator)

    def decode(self, data: Tensor) -> Tensor:
        """Inverse of `encode_into`."""
        if data.numel() == 0 or self.rows * self.length == 0:
            return torch.zeros(*data.shape[:-1], self.rows, self.length, device=data.device)
        return self.format.decode(data, self.rows, self.length)

    def decode_mean(self, data: Tensor) -> Tensor:
        """The mean of N encoded blocks, uint8 [N, encoded_bytes], as fp32 [rows, length]."""
        if data.numel() == 0 or self.rows * self.length == 0:
            return torch.zeros(self.rows, self.length, device=data.device)
        return self.format.decode_mean(data, self.rows, self.length)

    def subtract_decoded(self, out: Tensor, total: Tensor, data: Tensor) -> None:
        """out = total - decode(data), to the bit; both [..., rows, length], `total` fp32, perhaps the same memory."""
        if total.numel():
            self.format.subtract_decoded(out, total, data, self.rows, self.length)


@dataclass(frozen=True)
class RowFormat(Format):
    """fp32, fp16, bf16, fp8 (4 bits of exponent, 3 of mantissa) or int8.

    int8 rounds to nearest with scale max|row| / 127; a row holding Inf or NaN decodes to non-finite values only, in fp8
    too. In the other float formats only the values that are not finite themselves do.
    """

    dtype: str

    def encoded_bytes(self, rows: int, length: int) -> int:
        return aligned(rows * length * _ITEM_BYTES[self.dtype]) + (4 * rows if self.dtype in _SCALED else 0)

    def encode_into(self, out: Tensor, values: Tensor, generator: torch.Generator | None = None) -> None:
        rows, length = values.shape[-2:]
        if self.dtype == "int8" and native.encode_int8_rows(out, values, aligned(rows * length)):
            return
        if self.dtype in _SCALED:
            values, scale = _SCALED[self.dtype](values)
            self._scales(out, rows, length).copy_(scale)
        self._values(out, rows * length).copy_(values.flatten(-2))

    def decode(self, data: Tensor, rows: int, length: int) -> Tensor:
        if self.dtype == "int8":
            whole = native.decode_int8_rows(data, rows, length, aligned(rows * length), mean=False)
            if whole is not None:
                return whole
        values = self._values(data, rows * length).to(torch.float32, copy=True).unflatten(-1, (rows, length))
        if self.dtype in _SCALED:
            values *= self._scales(data, rows, length).unsqueeze(-1)
        return values

    def decode_mean(self, data: Tensor, rows: int, length: int) -> Tensor:
        if self.dtype == "int8":
            mean = native.decode_int8_rows(data, rows, length, aligned(rows * length), mean=True)
            if mean is not None:
                return mean
        return super().decode_mean(data, rows, length)

    def _values(self, data: Tensor, count: int) -> Tensor:
        return data[..., : count * _ITEM_BYTES[self.dtype]].view(_FLOATS.get(self.dtype, torch.int8))

    def _scales(self, data: Tensor, rows: int, length: int) -> Tensor:
        start = aligned(rows * length * _ITEM_BYTES[self.dtype])
        return data[..., start : start + 4 * rows].view(torch.float32)


FP32 = RowFormat("fp32")


def _scaled_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    scaled, scale = _scaled_to(_INT8_LARGEST, values)
    return scaled.round_(), scale


def _scaled_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    return _scaled_to(_FP8_LARGEST, values)


def _scaled_to(largest: float, values: Tensor) -> tuple[Tensor, Tensor]:
    scale = values.abs().amax(dim=-1) / largest
    tiny = scale < torch.finfo(torch.float32).tiny  # zero, or too small for an accurate scale: the row is sent as 0
    scale = torch.where(tiny, 1.0, scale)
    # Rounding of the scale may take a value past the largest one.
    scaled = (values / scale.unsqueeze(-1)).clamp_(-largest, largest).nan_to_num_(0.0, 0.0, 0.0)
    return scaled, torch.where(torch.isfinite(scale), scale, torch.nan)


def _scaled_fp16(values: Tensor) -> tuple[Tensor, Tensor]:
    largest = values.abs().amax(dim=-1)
    usable = torch.isfinite(largest) & (largest > torch.finfo(torch.float32).tiny)
    # The power of two above the largest value, brought to fp16's upper range; frexp's exponent is exact.
    exponent = torch.frexp(torch.where(usable, largest, 2.0 ** (_FP16_LARGEST_EXPONENT - 1))).exponent
    scale = torch.ldexp(torch.ones_like(largest), (exponent - _FP16_LARGEST_EXPONENT).clamp(min=-126))
    return values / scale.unsqueeze(-1), scale


_SCALED = {"fp16": _scaled_fp16, "fp8": _scaled_fp8, "int8": _scaled_int8}


def aligned(count: int) -> int:
    """`count` bytes and what fills them up to a multiple of 4."""
    return -(-count // _ALIGNMENT) * _ALIGNMENT
