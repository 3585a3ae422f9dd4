"""Residuals under a loss scaler: they are kept at the scale at which they arose and converted when it changes."""

from __future__ import annotations

import torch
from torch import Tensor


class ResidualScale:
    """Tracks the loss scale that the residuals carry.

    With `scaler=None` it answers 1.0 always. On CUDA the scale stays a device tensor: nothing waits for it.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None, device: torch.device) -> None:
        if scaler is not None and not callable(getattr(scaler, "scale", None)):
            raise ValueError(f"grad_scaler is {scaler!r}; expected the torch.amp.GradScaler itself, or None")
        self._scaler, self._device = scaler, device
        self._kept: Tensor | float | None = None
        self._now: Tensor | float = 1.0

    def begin_step(self) -> Tensor | float:
        """The factor from the residuals' scale to this step's."""
        if self._scaler is None:
            return 1.0
        scale = self._scaler.scale(torch.ones((), device=self._device))  # no host sync, unlike get_scale()
        self._now = float(scale) if scale.device.type == "cpu" else scale
        if self._kept is None:
            self._kept = self._now
        return self._now / self._kept

    def advance(self, step_is_finite: Tensor | bool) -> None:
        """The residuals now carry this step's scale, unless the step left them as they were."""
        if self._kept is None or step_is_finite is False:
            return
        if step_is_finite is True:
            self._kept = self._now
        else:
            self._kept = torch.where(step_is_finite, self._now, self._kept)

    @property
    def in_use(self) -> bool:
        """Whether there is a scaler."""
        return self._scaler is not None

    @property
    def kept(self) -> float:
        """The residuals' loss scale (waits for the device)."""
        return 1.0 if self._kept is None else float(self._kept)

    @kept.setter
    def kept(self, value: float) -> None:
        self._kept = None if self._scaler is None else value
