"""Blocks and sparse rows coded by commcomp._native on the CPU, in one pass over memory.

Bytes and decoded values are those of torch's operations to the bit, but for a rotation (sums in another order), random
rounding (other numbers) and which NaN it is. Functions return None or False, and do nothing, where commcomp._native is
not built and for other devices, dtypes and strides: torch's operations then serve.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from commcomp.compressors import native


@dataclass(frozen=True)
class BlockCode:
    """An encoded [rows, length]: codes of all blocks from byte 0, a bf16 scale a block from byte `scales_at`."""

    rows: int
    length: int
    block: int
    bits: int
    scales_at: int
    signs: Tensor | None
    """Of the rotation, fp32 [block]; None: no rotation."""

    @property
    def _shape(self) -> tuple[int, int]:
        return self.rows, self.length

    def encode(
        self, out: Tensor, values: Tensor, mask: int, generator: torch.Generator | None, *, random: bool
    ) -> bool:
        """Encode `values`, fp32 [..., rows, length], into `out`, uint8 [..., bytes].

        Scales are rounded up to numbers whose bits under `mask` are 0. Random rounding takes one draw of `generator`,
        one number for every member of the batch.
        """
        if not (_usable(torch.uint8, out) and _usable(torch.float32, values)):
            return False
        self._require(out, values)
        passes = self._passes()
        seeds = _seeds(values.shape[:-2], generator) if random else None
        for place in places(values.shape[:-2]):
            seed = None if seeds is None else int(seeds[place])
            one, codes = values[place], out[place].data_ptr()
            address, stride = one.data_ptr(), one.stride(0)
            passes.encode(address, stride, mask, seed, codes, codes + self.scales_at, native.threads_for(one.numel()))
        return True

    def decode(self, data: Tensor) -> Tensor | None:
        """The inverse: uint8 [..., bytes] to fp32 [..., rows, length]."""
        if not _usable(torch.uint8, data):
            return None
        out = torch.empty(*data.shape[:-1], *self._shape)
        self._decode(data.unsqueeze(-2), None, out)
        return out

    def decode_mean(self, data: Tensor) -> Tensor | None:
        """The mean of N encoded blocks, uint8 [N, bytes], as fp32 [rows, length]; added in order."""
        if not _usable(torch.uint8, data):
            return None
        out = torch.empty(*self._shape)
        self._decode(data, None, out)
        return out

    def subtract(self, out: Tensor, total: Tensor, data: Tensor) -> bool:
        """out = total - what `data`, uint8 [..., bytes], decodes to; fp32 [..., rows, length], perhaps the same."""
        if not (_usable(torch.uint8, data) and _usable(torch.float32, out, total)):
            return False
        self._require(data, total)
        self._require(data, out)
        self._decode(data.unsqueeze(-2), total, out)
        return True

    def _decode(self, data: Tensor, total: Tensor | None, out: Tensor) -> None:
        """`data`: uint8 [..., ranks, bytes]."""
        self._require(data, None)
        ranks, distance = data.shape[-2], data.stride(-2)
        passes = self._passes()
        for place in places(data.shape[:-2]):
            codes, to = data[place].data_ptr(), out[place]
            source = codes, codes + self.scales_at, ranks, distance
            minuend = (0, 0) if total is None else (total[place].data_ptr(), total[place].stride(0))
            passes.decode(*source, *minuend, to.data_ptr(), to.stride(0), native.threads_for(to.numel()))

    def _passes(self) -> native._native.BlockCode:
        signs = 0 if self.signs is None else self.signs.data_ptr()
        return native._native.BlockCode(self.rows, self.length, self.block, self.bits, signs)

    def _require(self, data: Tensor, values: Tensor | None) -> None:
        blocks = self.rows * -(-self.length // self.block)
        expected = self.scales_at + 2 * blocks
        if data.shape[-1] < expected or self.scales_at < blocks * self.block * self.bits // 8:
            raise ValueError(f"blocks of [{self.rows}, {self.length}] take {expected} bytes; here are {data.shape[-1]}")
        if values is not None and values.shape != (*data.shape[:-1], *self._shape):
            raise ValueError(f"values are {tuple(values.shape)}; expected {(*data.shape[:-1], *self._shape)}")


@dataclass(frozen=True)
class SparseCode:
    """Positions of up to `capacity` values of a row: counts and offsets from byte 0 of its bytes, or a bitmap."""

    length: int
    capacity: int
    counts: int
    """Bytes of counts, before the offsets; 0: a bitmap."""

    def select(self, out: Tensor, row: Tensor, threshold: Tensor) -> Tensor | None:
        """Put where `row`, fp32 [length], reaches `threshold` (scalar) into `out`, uint8 [bytes]; return the values
        there, fp32 [capacity], with zeros behind them. If anything in the row is Inf or NaN, so is the first one."""
        if not (_usable(torch.uint8, out) and _usable(torch.float32, row, threshold)):
            return None
        self._require(out)
        if row.shape != (self.length,):
            raise ValueError(f"a row is {tuple(row.shape)}; expected {(self.length,)}")
        chosen = row.new_empty(self.capacity)
        passes, threads = self._passes(out), native.threads_for(self.length)
        passes.select(row.data_ptr(), float(threshold), chosen.data_ptr(), threads)
        return chosen

    def usable(self, out: Tensor, data: Tensor, total: Tensor | None) -> bool:
        """Whether `decode` can be used."""
        return _usable(torch.uint8, data) and _usable(torch.float32, out, out if total is None else total)

    def decode(self, out: Tensor, data: Tensor, values: Tensor, total: Tensor | None) -> None:
        """out = the mean over ranks of `values`, fp32 [ranks, capacity], at the positions in `data`, uint8 [ranks,
        bytes], added in order; with `total`, total minus it. `out` and `total` are fp32 [length], perhaps the same."""
        rows, values = [out] if total is None else [out, total], values.contiguous()
        self._require(data)
        if values.shape != (len(data), self.capacity) or any(row.shape != (self.length,) for row in rows):
            found = f"{tuple(values.shape)} for {[tuple(row.shape) for row in rows]}"
            raise ValueError(f"values are {found}; expected {(len(data), self.capacity)} for rows of {self.length}")
        places = values.data_ptr(), len(data), data.stride(0), 0 if total is None else total.data_ptr()
        self._passes(data).decode(*places, out.data_ptr(), native.threads_for(self.length))

    def _passes(self, data: Tensor) -> native._native.SparsePlaces:
        start = data.data_ptr()
        places = (start, start + self.counts, 0) if self.counts else (0, 0, start)
        return native._native.SparsePlaces(self.length, self.capacity, *places)

    def _require(self, data: Tensor) -> None:
        expected = self.counts + self.capacity if self.counts else -(-self.length // 8)
        if data.shape[-1] < expected:
            raise ValueError(f"positions take {expected} bytes; here are {data.shape[-1]}")


def _usable(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether native passes can read and write these: on the CPU, and values of a row side by side."""
    return native.available and all(
        one.device.type == "cpu" and one.dtype == dtype and (one.dim() == 0 or one.stride(-1) == 1 or one.shape[-1] < 2)
        for one in tensors
    )


def places(shape: torch.Size) -> itertools.product[tuple[int, ...]]:
    """Every index of a batch of this shape."""
    return itertools.product(*map(range, shape))


def _seeds(shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    return torch.randint(torch.iinfo(torch.int64).max, shape, generator=generator)
