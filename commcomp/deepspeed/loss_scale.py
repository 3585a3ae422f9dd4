"""The loss scale of an engine, in the form in which `GradientSync` asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class EngineScale:
    """Stands for a `torch.amp.GradScaler`: multiplies by the scale that the gradients of this step carry."""

    def __init__(self, optimizer: Any, attribute: str) -> None:
        self._optimizer, self._attribute = optimizer, attribute

    def scale(self, values: Tensor) -> Tensor:
        """`values` times the optimizer's loss scale."""
        return values * float(getattr(self._optimizer, self._attribute))


def scaler_of(engine: Any) -> Any:
    """What scales the engine's loss, None if nothing does."""
    optimizer = engine.optimizer
    for owner, name in ((engine, "torch_autocast_z0_gradscaler"), (optimizer, "torch_autocast_gradscaler")):
        scaler = getattr(owner, name, None)
        if isinstance(scaler, torch.amp.GradScaler):
            return scaler
    if not engine.fp16_enabled():
        return None
    for attribute in ("loss_scale", "cur_scale"):
        if hasattr(optimizer, attribute):
            return EngineScale(optimizer, attribute)
    return None
