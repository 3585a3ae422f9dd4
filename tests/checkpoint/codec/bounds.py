"""Whether what came back keeps the bound that its file declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from commcomp.checkpoint.codec.keys import OCTAVE, key_of


def require_within(
    name: str, bound: Mapping[str, Any], value: torch.Tensor, other: torch.Tensor, second: torch.Tensor | None
) -> None:
    """`other` is what came back of `value`; `second` what came back of the second moment beside a first one."""
    error = (value - other).abs()
    if bound["kind"] == "octaves":
        assert (other > 0).all(), name
        keys = [torch.from_numpy(key_of(one.numpy()).astype("int64")) for one in (value, other)]
        assert ((keys[0] - keys[1]).abs() <= bound["error"] * OCTAVE + 100).all(), name
    elif bound["kind"] == "scaled":
        assert second is not None, name
        assert (error <= 1.0001 * bound["error"] * second.sqrt() + 1e-5 * value.abs()).all(), name
    else:
        assert (error <= 1.0001 * bound["error"] + 1e-5 * value.abs()).all(), name
