"""Hugging Face accelerate: compressed gradients for a prepared model, their residuals in its saved states."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from commcomp import framework_parts
from commcomp.config import Method, Rule
from commcomp.framework_parts import Settings
from commcomp.gradient_sync import GradientSync

if TYPE_CHECKING:
    from accelerate import Accelerator

_served: weakref.WeakSet[Any] = weakref.WeakSet()


def compress(
    accelerator: Accelerator,
    model: nn.Module,
    method: Settings | None = None,
    *,
    policy: Sequence[Rule | tuple[str, Method]] | None = None,
    mean_residual: bool = False,
    **settings: Any,
) -> GradientSync | None:
    """Average the gradients of a model in compressed form; `accelerator.save_state` and `load_state` keep residuals.

    Call it on every rank after `accelerator.prepare`. For DistributedDataParallel, FullyShardedDataParallel and FSDP2.
    A GradScaler of the accelerator's is taken into account.

    Args:
        method, policy, settings: as GradientSync takes them; `method` may be a GradientConfig or its dictionary.
        mean_residual: save one residual for all ranks instead of each rank's own: 4 bytes a compressed value whatever
            the number of ranks, but by other ranks owed. All ranks read and write the same folders in either case.

    Returns None where one process trains alone and strict=False.
    Raises ValueError naming what cannot work; for a second model of one accelerator too.
    """
    config = framework_parts.gradient_config(method, policy, settings, "commcomp.accelerate.compress")
    if accelerator in _served:
        raise ValueError(
            "this Accelerator has a compressed model already, and saves the residuals of one: give each model its own, "
            "or construct a GradientSync and register it by hand"
        )
    state = framework_parts.attach(model, config, accelerator.scaler, "commcomp.accelerate.compress")
    if state is None:
        return None

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        framework_parts.save(state, folder, mean_residual=mean_residual)

    def load(models: list[nn.Module], folder: str) -> None:
        framework_parts.restore(state, folder)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    _served.add(accelerator)
    return state
