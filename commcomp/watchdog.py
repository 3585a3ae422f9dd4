"""Notices when gradients are applied although the communication hook never ran.

Some frameworks drop a hook without a word (Lightning on a CPU, a DDP module that was saved and loaded): training then
goes on at full traffic. The first optimizer steps tell.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from commcomp.complaint import complain

_STEPS_WITHOUT_HOOK = 2


class FirstUseWatch:
    """Raises RuntimeError (a warning unless `strict`) from the second optimizer step on one of `parameters` that
    happens before `used()`; after `used()` it costs nothing."""

    def __init__(self, parameters: Iterable[Tensor], *, strict: bool) -> None:
        self._parameters = {id(parameter) for parameter in parameters}
        self._strict = strict
        self._steps = 0
        itself = weakref.ref(self)

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            watch = itself()
            if watch is not None:
                watch._count(optimizer)

        self._handle: Any = register_optimizer_step_post_hook(after_step)
        weakref.finalize(self, self._handle.remove)

    def used(self) -> None:
        """The hook has run."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _count(self, optimizer: Optimizer) -> None:
        if self._handle is None:
            return
        groups = optimizer.param_groups
        if not any(id(parameter) in self._parameters for group in groups for parameter in group["params"]):
            return
        self._steps += 1
        if self._steps != _STEPS_WITHOUT_HOOK:  # said once; removing a hook from inside a hook is not allowed
            return
        message = (
            f"{self._steps} optimizer steps were taken, but the communication hook of this GradientSync never ran, and "
            "unless another one serves the model, gradients travel uncompressed. Call model.register_comm_hook(state, "
            "commcomp.comm_hook) on the DDP or FullyShardedDataParallel module that you train, after fully_shard "
            "commcomp.fsdp.register_comm_hook(model, state), or drop this GradientSync"
        )
        complain(message, strict=self._strict, error=RuntimeError)
