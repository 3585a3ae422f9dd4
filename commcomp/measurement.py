"""What a measured step tells about the compression error."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Measurement:
    """Squared norms over some parameters at a measured step, fp64 [k] each, on the gradient's device."""

    names: tuple[str, ...]
    total: Tensor
    """Of gradient plus residual."""
    kept: Tensor
    """Of what was not delivered."""
