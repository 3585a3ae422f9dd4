"""What a TokenCompressor learns from the tokens it meets, as it goes into a state dict."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Learnt:
    """Equal on all ranks."""

    passes: int = 0
    """Training passes so far."""
    setting: float | None = None
    """What is changed to keep the rate (rate_control.py)."""
    rows: int = 0
    tokens: int = 0
    """Rows that the last training pass sent, for how many tokens, all ranks."""
    centres: Tensor | None = None
    """fp32 [experts, width]: the mean of what each expert got when that was last looked at."""
    next_centres: Tensor | None = None
    """What `centres` are to be from the next pass on; this one may be repeated in the backward pass."""

    def __post_init__(self) -> None:
        numbers = (self.passes, self.rows, self.tokens)
        if not all(type(value) is int and value >= 0 for value in numbers):
            raise ValueError(f"passes, rows and tokens are {numbers}; expected whole numbers of at least 0")
        if self.setting is not None and not (type(self.setting) in (int, float) and math.isfinite(self.setting)):
            raise ValueError(f"setting is {self.setting!r}; expected a finite number or None")
        for rows in (self.centres, self.next_centres):
            if rows is not None and not (isinstance(rows, Tensor) and rows.dim() == 2):
                raise ValueError("centres are no [experts, width]")

    def begin_pass(self) -> None:
        """The pass before is over, its backward pass too."""
        if self.next_centres is not None:
            self.centres, self.next_centres = self.next_centres, None

    def to_text(self) -> str:
        """One string, so that every kind of checkpoint takes it, whatever has been learnt yet."""
        return json.dumps({name: _encoded(value) for name, value in asdict(self).items()})

    @classmethod
    def from_text(cls, text: str) -> Learnt:
        """Inverse of `to_text`. Raises ValueError where it is not one."""
        try:
            return cls(**{name: _decoded(value) for name, value in json.loads(text).items()})
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{str(text)[:60]!r} is not what a TokenCompressor has learnt: {error}") from error


def _encoded(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    data = value.detach().cpu().numpy().astype("<f4")
    return {"shape": list(value.shape), "fp32": base64.b64encode(data.tobytes()).decode()}


def _decoded(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    data = np.frombuffer(base64.b64decode(value["fp32"]), dtype="<f4").astype(np.float32)
    return torch.from_numpy(data.reshape(value["shape"]))
