"""Blockwise quantisation to 8 or 4 bits, and the rotation that spreads outliers before it.

A block is a run of values with one scale s = max|block| / L, L = 127 (8 bits) or 7 (4 bits); its codes are x / s
rounded to whole numbers from -L to L. Nearest rounding errs by at most s / 2, stochastic rounding by less than s but
with expectation 0 (QSGD, Alistarh et al. 2017, arXiv:1610.02132, section 3.1).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

LEVELS = {8: 127, 4: 7}
"""Largest code by the number of bits."""

BF16_SCALES = 0xFFFF
"""Bits of an fp32 scale that are 0: bf16 then holds it exactly."""

POWERS_OF_TWO = 0x7FFFFF
"""The same, for scales without a mantissa."""

_TINY = torch.finfo(torch.float32).tiny


def quantize_blocks(
    blocks: Tensor, bits: int, noise: Tensor | None = None, *, scale_mask: int = BF16_SCALES
) -> tuple[Tensor, Tensor]:
    """Codes, fp32 whole numbers of the shape of `blocks`, and scales, fp32 [...].

    `blocks`: fp32 [..., block]. `noise`: uniform in [0, 1 - 2^-17] of the same shape, for stochastic rounding.
    `scale_mask`: bits of a scale that are to be 0; it is rounded up. A block that holds Inf or NaN gets the scale NaN
    and codes 0; one below 1e-38 throughout gets codes 0.
    """
    largest = blocks.abs().amax(dim=-1)
    scale = _rounded_up(largest / LEVELS[bits], scale_mask)
    scale = torch.where(scale < _TINY, 1.0, scale)
    codes = blocks / scale.unsqueeze(-1)
    codes = codes.round_() if noise is None else codes.add_(noise).floor_()
    # A denormal below the smallest normal scale, or rounding up at the very end, may pass the largest code by one.
    codes = codes.clamp_(-LEVELS[bits], LEVELS[bits]).nan_to_num_(0.0, 0.0, 0.0)
    return codes, torch.where(torch.isfinite(scale), scale, torch.nan)


def _rounded_up(scale: Tensor, scale_mask: int) -> Tensor:
    """The least such number that is not below each `scale` (>= 0): codes then stay within their levels."""
    bits = scale.contiguous().view(torch.int32)
    rounded = (bits + scale_mask).bitwise_and_(~scale_mask).view(torch.float32)
    return torch.where(torch.isfinite(scale), rounded, torch.nan)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Whole numbers from -8 to 7, [..., 2 n], as uint8 [..., n]: the even positions in the low halves."""
    pairs = codes.to(torch.int8).unflatten(-1, (-1, 2)).bitwise_and(0xF).view(torch.uint8)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`: uint8 [..., n] to int8 [..., 2 n]."""
    halves = torch.stack((packed << 4, packed & 0xF0), dim=-1).view(torch.int8)
    return halves.bitwise_right_shift(4).flatten(-2)


def rotate(blocks: Tensor, signs: Tensor) -> Tensor:
    """Multiply by random signs and a Hadamard matrix: [..., block], block a power of 2; norms and means are kept.

    Every value of a rotated block is a signed sum of all of them, near to normally distributed, so one huge value no
    longer takes the whole range of a 4-bit code (as in QuaRot and SDP4Bit). `signs` [block] holds +-1.
    """
    return _transform(blocks * signs)


def rotate_back(blocks: Tensor, signs: Tensor) -> Tensor:
    """Inverse of `rotate`."""
    return _transform(blocks).mul_(signs)


def _transform(blocks: Tensor) -> Tensor:
    """Times Sylvester's Hadamard matrix over sqrt(block), which is its own inverse."""
    size = blocks.shape[-1]
    if blocks.device.type != "cpu":
        return blocks @ _hadamard(size, blocks.device, blocks.dtype)
    # A library's product may round otherwise for another number of blocks; sums and differences in rounds cannot.
    _require_power_of_two(size)
    for distance in (1 << bit for bit in range(size.bit_length() - 1)):
        pairs = blocks.unflatten(-1, (-1, 2, distance))
        left, right = pairs.unbind(-2)
        blocks = torch.stack((left + right, left - right), dim=-2).flatten(-3)
    return blocks * size**-0.5


def random_signs(block: int, seed: int) -> Tensor:
    """+-1, fp32 [block] on the CPU, fixed by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (block,), generator=generator).mul_(2).sub_(1).float()


@lru_cache(maxsize=32)
def _hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sylvester's Hadamard matrix over sqrt(size): orthonormal and symmetric, [size, size]."""
    _require_power_of_two(size)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (matrix / size**0.5).to(device, dtype)


def _require_power_of_two(size: int) -> None:
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard rotation takes blocks of a power of 2 values, not {size}")
