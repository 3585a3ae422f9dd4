"""8 and 4 bits a value, with a bf16 scale a block (compressors/quantize.py)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from commcomp.compressors import quantize
from commcomp.compressors.native_codecs import BlockCode
from commcomp.compressors.wire import Format, aligned

_SIGNS_SEED = 0


@dataclass(frozen=True)
class BlockFormat(Format):
    """Every run of `block` values of a row has a scale of its own; rows are padded with zeros to whole blocks.

    A value takes bits / 8 + 2 / block bytes. A block that holds Inf or NaN decodes to NaN throughout.
    """

    bits: int
    """8 or 4."""
    block: int
    """Even; a power of 2 with `rotate`."""
    stochastic: bool = False
    """Round to one of the two neighbours at random, with the right expectation, instead of to the nearer."""
    rotate: bool = False
    """Multiply each block by random signs, equal on all ranks, and a Hadamard matrix before."""
    power_of_two_scales: bool = False
    """Decoded values then have at most 8 significant bits, so bf16 holds them, and encoding them again is exact."""

    @property
    def random(self) -> bool:  # type: ignore[override]
        """Whether encoding takes random numbers."""
        return self.stochastic

    def encoded_bytes(self, rows: int, length: int) -> int:
        count = rows * self._num_blocks(length)
        return self._code_bytes(count) + aligned(2 * count)

    def encode_into(self, out: Tensor, values: Tensor, generator: torch.Generator | None = None) -> None:
        rows, length = values.shape[-2:]
        mask = quantize.POWERS_OF_TWO if self.power_of_two_scales else quantize.BF16_SCALES
        if self._code(rows, length, out).encode(out, values, mask, generator, random=self.stochastic):
            return
        missing = -length % self.block
        blocks = (pad(values, (0, missing)) if missing else values).unflatten(-1, (-1, self.block)).flatten(-3, -2)
        if self.rotate:
            blocks = quantize.rotate(blocks, _signs(self.block, blocks.device))
        noise = None
        if self.stochastic:  # never so near to 1 that a whole code plus noise would round up
            noise = torch.rand(blocks.shape, generator=generator, device=blocks.device).clamp_(max=1 - 2.0**-17)
        codes, scale = quantize.quantize_blocks(blocks, self.bits, noise, scale_mask=mask)
        flat = codes.flatten(-2)
        stored = quantize.pack_nibbles(flat) if self.bits == 4 else flat.to(torch.int8).view(torch.uint8)
        out[..., : stored.shape[-1]] = stored
        self._scales(out, blocks.shape[-2]).copy_(scale)

    def decode(self, data: Tensor, rows: int, length: int) -> Tensor:
        whole = self._code(rows, length, data).decode(data)
        if whole is not None:
            return whole
        return self._rows_of(self._decode_blocks(data, rows * self._num_blocks(length)), rows, length)

    def decode_mean(self, data: Tensor, rows: int, length: int) -> Tensor:
        mean = self._code(rows, length, data).decode_mean(data)
        if mean is not None:
            return mean
        count = rows * self._num_blocks(length)
        total = self._decode_blocks(data[0], count)
        for one in data[1:]:
            total += self._decode_blocks(one, count)
        return self._rows_of(total / len(data), rows, length)  # turned back once: the mean of the turned is turned

    def subtract_decoded(self, out: Tensor, total: Tensor, data: Tensor, rows: int, length: int) -> None:
        if not self._code(rows, length, data).subtract(out, total, data):
            super().subtract_decoded(out, total, data, rows, length)

    def _code(self, rows: int, length: int, data: Tensor) -> BlockCode:
        """How [rows, length] lies in `data`."""
        signs = _signs(self.block, data.device) if self.rotate else None
        scales_at = self._code_bytes(rows * self._num_blocks(length))
        return BlockCode(rows, length, self.block, self.bits, scales_at, signs)

    def _decode_blocks(self, data: Tensor, count: int) -> Tensor:
        stored = data[..., : count * self.block * self.bits // 8]
        codes = quantize.unpack_nibbles(stored) if self.bits == 4 else stored.view(torch.int8)
        blocks = codes.to(torch.float32).unflatten(-1, (count, self.block))
        blocks *= self._scales(data, count).float().unsqueeze(-1)
        return blocks

    def _rows_of(self, blocks: Tensor, rows: int, length: int) -> Tensor:
        if self.rotate:
            blocks = quantize.rotate_back(blocks, _signs(self.block, blocks.device))
        return blocks.flatten(-2).unflatten(-1, (rows, -1))[..., :length]

    def _scales(self, data: Tensor, count: int) -> Tensor:
        start = self._code_bytes(count)
        return data[..., start : start + 2 * count].view(torch.bfloat16)

    def _code_bytes(self, count: int) -> int:
        return aligned(count * self.block * self.bits // 8)

    def _num_blocks(self, length: int) -> int:
        return -(-length // self.block)


@lru_cache(maxsize=32)
def _signs(block: int, device: torch.device) -> Tensor:
    return quantize.random_signs(block, _SIGNS_SEED).to(device)
