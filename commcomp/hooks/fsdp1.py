"""The communication hook for FSDP1 (`FullyShardedDataParallel`).

torch hands a unit's flat gradient over as soon as it is there and wants this rank's piece of the mean at once. So that
compression can go on beside the backward pass, and no residual moves before the whole step is known to be finite, the
hook hands torch zeros. When torch has ended the backward pass it makes each unit's gradient ready for the optimizer;
there the mean is added. What torch does in between, accumulation, a cast, a copy to the CPU, stays right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.fsdp._flat_param import HandleTrainingState
from torch.futures import Future

from commcomp.flat_model import FlatModel, FlatUnit
from commcomp.gradient_sync import GradientSync


def reduce_unit(state: GradientSync | UnitState, gradient: Tensor, output: Tensor | None) -> Future[Tensor]:
    """Start the mean over the ranks of one unit's flat gradient, [numel]; `output`, this rank's piece, becomes zeros.

    `output` is None with NO_SHARD. The future is the bucket's; torch does not look at it.

    Raises RuntimeError naming the unit's parameters where the gradient cannot be that of the model given to `state`.
    """
    if isinstance(state, GradientSync):
        state = _bind(state, gradient)
    return state.hook.reduce(state.unit, gradient, output)


@dataclass(frozen=True)
class UnitState:
    """What torch hands back with a unit's gradient in place of the GradientSync: it does not say which unit it is."""

    hook: _FlatHook
    unit: FlatUnit


def _bind(state: GradientSync, gradient: Tensor) -> UnitState:
    """Give each unit a state of its own, at the first call; returns that of the unit whose gradient this is.

    Units whose backward pass is over are in BACKWARD_POST until all are through. At the first call that is one.
    """
    model = state.sharded if isinstance(state.sharded, FlatModel) else None
    units = [unit for unit in model.units if unit.module._comm_hook_state is state] if model else []
    done = [
        unit
        for unit in units
        if unit.handle._training_state is HandleTrainingState.BACKWARD_POST and unit.numel == gradient.numel()
    ]
    if model is None:
        raise RuntimeError(
            "this GradientSync was constructed before FullyShardedDataParallel wrapped the model; construct it with "
            "the wrapped one: model.register_comm_hook(commcomp.GradientSync(model, ...), commcomp.comm_hook)"
        )
    if len(done) != 1:
        raise RuntimeError(
            f"cannot tell which unit a gradient of {gradient.numel()} values belongs to ({len(done)} would fit): this "
            "GradientSync was constructed with another model; call model.register_comm_hook(commcomp.GradientSync("
            "model, ...), commcomp.comm_hook) on the root FullyShardedDataParallel module before training"
        )
    hook = _FlatHook(state, model)
    states = {unit: hook.attach(unit) for unit in units}
    for unit, own in states.items():
        unit.module._comm_hook_state = own
    return states[done[0]]


class _FlatHook:
    """What the units of one model share: which of them are on their way in this backward pass."""

    def __init__(self, state: GradientSync, model: FlatModel) -> None:
        self._state = state
        self._pending: dict[FlatUnit, Tensor] = {}
        self._finished = False
        for module in model.modules:
            if module._is_root:
                module.register_forward_pre_hook(self._require_ended)

    def attach(self, unit: FlatUnit) -> UnitState:
        """Add the mean when torch makes the unit's gradient ready for the optimizer."""
        unit.handle.prepare_gradient_for_optim = partial(self._deliver, unit, unit.handle.prepare_gradient_for_optim)
        return UnitState(self, unit)

    def reduce(self, unit: FlatUnit, gradient: Tensor, output: Tensor | None) -> Future[Tensor]:
        """Start the mean of `gradient`, [numel]."""
        self._require_usable(unit, gradient)
        first = not self._pending
        if first:
            self._finished = False
        row = gradient.float()  # fp32 is handed over by torch: the mean may take its place
        unit.clear_frozen(row)
        self._pending[unit] = unit.own_piece(row)
        if output is not None:
            output.zero_()
        return self._state.reduce_rows(row.unsqueeze(0), row, unit, first=first)

    def _require_usable(self, unit: FlatUnit, gradient: Tensor) -> None:
        unit.require_unchanged()
        name = unit.pieces[0].name
        if gradient.numel() != unit.numel:
            raise RuntimeError(f"the unit of {name!r} has {gradient.numel()} gradients; expected {unit.numel}")
        if unit in self._pending:
            raise RuntimeError(
                f"the unit of {name!r} came twice in one backward pass, as it does when parts of a unit are "
                "checkpointed with use_reentrant=True: pass use_reentrant=False, or make each part a unit"
            )
        if unit.handle._has_optim_in_backward:
            raise RuntimeError(
                f"the unit of {name!r} has an optimizer that steps in the backward pass; it would see zeros, since "
                "compressed gradients are there at the end of the pass only: step after it"
            )

    def _deliver(self, unit: FlatUnit, prepare: Callable[[], None]) -> None:
        """When the backward pass has ended: wait for all means, once, and add this unit's to its gradient."""
        prepare()
        if unit not in self._pending:
            return
        if not self._finished:
            self._finished = True
            self._state.finish_rows()
        own, gradient = self._pending.pop(unit), unit.handle.flat_param.grad
        if gradient is None:  # cleared by a hook of the user's
            return
        if unit.scattered:
            gradient.add_(own.to(gradient.device, gradient.dtype))
        elif gradient.data_ptr() != own.data_ptr():  # torch cast or copied it
            gradient.copy_(own)

    def _require_ended(self, *arguments: Any) -> None:
        """A forward pass begins: RuntimeError if a backward pass raised: torch's own gradients would be wrong."""
        if self._pending:
            name = next(iter(self._pending)).pieces[0].name
            raise RuntimeError(
                f"the last backward pass did not end (the unit of {name!r} waits for its mean): it raised, and "
                "FullyShardedDataParallel gives wrong gradients after that; construct the model and its GradientSync "
                "anew, from a checkpoint"
            )
