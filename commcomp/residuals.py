"""How a residual is kept between steps, by the setting `residual_dtype`.

fp32 and bf16 are kept as they are. int8 is kept as bytes: codes with a scale for every 128 values, a power of two. So a
value that was rounded once is rounded no more by saving (bf16 holds it exactly), loading, or another step that adds 0.
Rounding is at random, with the right expectation: to the nearest, what comes in small pieces would be lost every time.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from commcomp.compressors.wire_blocks import BlockFormat
from commcomp.error_feedback import RESIDUAL, FieldSpec, ParameterStore

_FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CODES = BlockFormat(8, 128, stochastic=True, power_of_two_scales=True)


def residual_spec(setting: str, shape: tuple[int, ...]) -> FieldSpec | None:
    """What the store keeps for residuals [W, ...]: themselves, or bytes [W, b]; None for "none"."""
    if setting == "none":
        return None
    if setting == "int8":
        return FieldSpec((shape[0], _CODES.encoded_bytes(1, math.prod(shape[1:]))), torch.uint8)
    return FieldSpec(shape, _FLOATS[setting])


def unpacked(kept: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The residuals, of `shape`, from what is kept; of bytes [..., b] a decoded copy in fp32."""
    if kept.dtype != torch.uint8:
        return kept.reshape(shape)
    return _CODES.decode(kept, 1, math.prod(shape) // math.prod(kept.shape[:-1])).reshape(shape)


def packed(values: Tensor, like: Tensor | FieldSpec, *, name: str, step: int) -> Tensor:
    """What to keep of a parameter's residuals [W, ...] (leading dimensions as those of `like`), as `like` is kept.

    Random numbers are the same in a step whatever the buckets, also after training was resumed. They differ from rank
    to rank and from one `name` to another, so that errors average out.
    """
    if like.dtype != torch.uint8:
        return values.to(like.dtype)
    out = torch.empty(tuple(like.shape), dtype=torch.uint8, device=values.device)
    leading = len(like.shape) - 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator(values.device).manual_seed(zlib.crc32(f"{step} {rank} {name}".encode()))
    _CODES.encode_into(out, values.float().flatten(leading).unsqueeze(leading), generator)
    return out


def for_saving(kept: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The residuals as a state dict holds them: int8 ones as bf16, which is exact."""
    values = unpacked(kept, shape)
    return values if kept.dtype != torch.uint8 else values.to(torch.bfloat16)


class ValueResiduals:
    """The residuals of parameters side by side, [W, sum of their values]."""

    def __init__(
        self,
        store: ParameterStore,
        names: Sequence[str],
        num_rows: int,
        shapes: Sequence[tuple[int, ...]],
        setting: str,
        device: torch.device,
    ) -> None:
        self._names = tuple(names)
        self._sizes = [math.prod(shape) for shape in shapes]
        specs = [spec for shape in shapes if (spec := residual_spec(setting, (num_rows, *shape)))]
        self._kept = store.rows(
            RESIDUAL, names, num_rows, [spec.shape[1:] for spec in specs], dtype=specs[0].dtype, device=device
        )
        self._kept_sizes = [math.prod(spec.shape[1:]) for spec in specs]

    def values(self, scale: Tensor | float) -> Tensor:
        """scale residual, [W, sum], to be read only."""
        residual = self._kept
        if residual.dtype == torch.uint8:
            parts = zip(residual.split(self._kept_sizes, dim=1), self._sizes, strict=True)
            residual = torch.cat([unpacked(part, (len(part), size)) for part, size in parts], dim=1)
        return residual if isinstance(scale, float) and scale == 1.0 else residual * scale

    def memory_for_fp32(self, step_is_finite: Tensor | bool) -> Tensor | None:
        """Where to write the new residual at once, if that can be: fp32, and the step is known to be finite."""
        return self._kept if self._kept.dtype == torch.float32 and step_is_finite is True else None

    def keep(self, values: Tensor, step_is_finite: Tensor | bool, step: int) -> None:
        """Take `values`, fp32 [W, sum], for the residual, if the step is finite (see `BucketPart`)."""
        if self._kept.dtype == torch.uint8:
            parts = values.split(self._sizes, dim=1), self._kept.split(self._kept_sizes, dim=1)
            coded = [
                packed(part, kept, name=name, step=step) for name, part, kept in zip(self._names, *parts, strict=True)
            ]
            values = torch.cat(coded, dim=1)
        finite = torch.as_tensor(step_is_finite, device=values.device)
        self._kept.copy_(values if step_is_finite is True else torch.where(finite, values, self._kept))
