"""Compressed gradients inside a DeepSpeed engine.

DeepSpeed knows no communication hook. Of the engine or optimizer given here, and of no other, a few methods are
replaced: those to which a gradient is handed to be reduced, and the one that ends a backward pass. What comes is given
to a `GradientSync`; at the end the means go the way that DeepSpeed's own would have gone, so that accumulation,
offload, clipping and the step are DeepSpeed's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from commcomp.config import GradientConfig
from commcomp.deepspeed import engine_parts
from commcomp.deepspeed.expert_gradients import average_experts
from commcomp.deepspeed.gradient_buckets import GradientBuckets
from commcomp.deepspeed.loss_scale import scaler_of
from commcomp.deepspeed.refusals import require_supported_engine
from commcomp.deepspeed.zero_model import ZeroModel, ZeroParameter
from commcomp.gradient_sync import GradientSync


def attach_gradients(engine: Any, config: GradientConfig) -> GradientSync:
    """Average the engine's gradients in the form that `config` prescribes; returns what does it.

    ZeRO 0 and 1 reduce once for every optimizer step, ZeRO 2 and 3 for every micro-batch, as they do without.

    Raises:
        NotSupported: naming what of the engine's configuration cannot work with it, and what to do.
        ValueError: as `GradientSync`.
    """
    require_supported_engine(engine)
    model = engine_parts.make_model(engine)
    state = GradientSync.from_config(engine.module, config, grad_scaler=scaler_of(engine), structure=model)
    kinds: list[type[_Reducer]] = [_WholeGradients, _CutBuffers, _CutBuffers, _CutParameters]
    kind = kinds[engine_parts.zero_stage(engine)]
    if engine_parts.is_flat_bf16(engine.optimizer):
        kind = _WholeGradients
    kind(engine, model, state).install()
    return state


class _Reducer(ABC):
    """What all stages share."""

    def __init__(self, engine: Any, model: ZeroModel, state: GradientSync) -> None:
        self.engine, self.optimizer, self.state = engine, engine.optimizer, state
        self.names = {id(member.value): name for name, member in model.members.items()}
        self.factor = engine_parts.factor_over_mean(engine, state.num_ranks)
        self.buckets = GradientBuckets(state, model.groups(state.effective))
        self.experts: list[Any] = []
        """Experts' parameters whose gradients have come in this backward pass, under ZeRO 1 and 2."""
        self._said = False
        self._hooks: list[Any] = []

    def install(self) -> None:
        """Take the places of DeepSpeed's own methods, until the engine is destroyed."""
        self.replace_methods()
        # The engine's hook and not its module's: that may be copied, saved and compiled.
        self._hooks.append(self.engine.register_forward_pre_hook(self._forget_what_raised))
        self._plain_destroy = self.engine.destroy
        self.engine.destroy = self._leave

    @abstractmethod
    def replace_methods(self) -> None:
        """Put this object's methods into the engine or its optimizer."""

    def take_over(self, take: Callable[..., None], finish: Callable[[], None], *needed: str) -> None:
        """Have a ZeRO optimizer hand gradients to `take`, and call `finish` where it ends a backward pass.

        `needed`: what else of it is built on.
        """
        optimizer = self.optimizer
        own = ("reduce_ready_partitions_and_remove_grads", "independent_gradient_partition_epilogue")
        engine_parts.require(optimizer, *own, *needed)
        self.pass_on, self.end_pass = (getattr(optimizer, name) for name in own)
        optimizer.reduce_ready_partitions_and_remove_grads = take
        optimizer.independent_gradient_partition_epilogue = finish

    def take_as_they_come(self, take: Callable[[Tensor], None]) -> None:
        """Have `take` called with every parameter whose gradient is there, while the backward pass goes on."""
        for parameter in self.engine.module.parameters():
            if id(parameter) in self.names:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(take))

    def _leave(self) -> None:
        """`engine.destroy`: another engine may be made of the same model."""
        for hook in self._hooks:
            hook.remove()
        self._plain_destroy()

    def _forget_what_raised(self, engine: nn.Module, arguments: Any) -> None:
        if self.engine.module.training:
            self.buckets.abandon()
            self.experts.clear()

    def is_last_micro_batch(self) -> bool:
        """Whether DeepSpeed reduces when this backward pass has ended."""
        engine = self.engine
        managed = getattr(engine, "managed_gradient_accumulation", lambda: True)()
        return managed and engine.is_gradient_accumulation_boundary() and not engine.inside_no_sync_ctxt

    def say_once(self) -> None:
        """After the first compressed step: what it sent, by rank 0. That it was less is checked by `GradientSync`."""
        if self._said or self.state.step <= self.state.config.start_step:
            return
        self._said = True
        stats = self.state.stats()
        engine_parts.say(
            f"commcomp: gradients of {self.state.step} steps in {stats['wire_bytes'] / 1e6:.3f} MB, plain "
            f"{stats['dense_wire_bytes'] / 1e6:.3f} MB, ratio {stats['ratio']:.2f}"
        )

    def scaled(self, mean: Tensor) -> Tensor:
        """The mean as DeepSpeed would give it; in place."""
        return mean if self.factor == 1.0 else mean.mul_(self.factor)


class _WholeGradients(_Reducer):
    """ZeRO 0, and BF16_Optimizer: gradients lie whole on every rank, and are reduced when the backward pass is over.

    Buckets are sent while it still runs, where gradients are final then.
    """

    def replace_methods(self) -> None:
        engine = self.engine
        engine_parts.require(
            engine, "buffered_allreduce_fallback", "_get_gradients_for_reduction", "_reduce_expert_gradients"
        )
        self._plain_reduce = engine.buffered_allreduce_fallback
        engine.buffered_allreduce_fallback = self._reduce
        if not engine_parts.is_flat_bf16(self.optimizer):
            self.take_as_they_come(self._take_early)

    def _take_early(self, parameter: Tensor) -> None:
        if self.is_last_micro_batch() and engine_parts.is_whole(parameter):
            assert parameter.grad is not None
            self.buckets.add(self.names[id(parameter)], parameter.grad)

    @torch.no_grad()
    def _reduce(self, grads: Any = None, elements_per_buffer: int = 500000000) -> None:
        if grads is not None:  # some of the gradients, chosen by the caller
            self._plain_reduce(grads=grads, elements_per_buffer=elements_per_buffer)
            return
        if engine_parts.is_flat_bf16(self.optimizer):
            _, of_experts = self.optimizer.get_grads_for_reduction()
            gradients = {id(value): part for value, part in engine_parts.flat_bf16_gradients(self.optimizer)}
        else:
            _, of_experts = self.engine._get_gradients_for_reduction()  # it fills what is missing with zeros
            gradients = {id(value): value.grad for value in self.engine.module.parameters()}
        for parameter, mean in self.buckets.finish(lambda parameter: gradients[id(parameter.value)]):
            gradient = gradients[id(parameter.value)]
            gradient.copy_(self.scaled(mean).view(gradient.shape))
        if self.engine.has_moe_layers:
            self.engine._reduce_expert_gradients(of_experts, elements_per_buffer)
        self.say_once()


class _CutBuffers(_Reducer):
    """ZeRO 1 and 2: gradients are copied into buckets, averaged there, and a rank keeps its part of them.

    What comes is taken out before the copy. At the end the means are put in the gradients' places and go through the
    same methods, in which the all-reduce is left out.
    """

    def replace_methods(self) -> None:
        optimizer = self.optimizer
        needed = ("reduce_scatter", "get_gradient_for_reduction", "setup_buckets", "partition_gradients")
        self.take_over(self._take, self._finish, "gradient_reduction_w_predivide", *needed)
        self._reduce_as_is = optimizer.gradient_reduction_w_predivide
        self._group_of = {
            id(value): index for index, group in enumerate(optimizer.bit16_groups) for value in group
        }
        self._averaged = False
        optimizer.reduce_scatter = False  # a way to reduce; with it the means would be divided once more
        optimizer.gradient_reduction_w_predivide = self._reduce_unless_averaged
        self._takes_early = not optimizer.partition_gradients and not optimizer.overlap_comm
        if self._takes_early:  # DeepSpeed would hand them over when the backward pass has ended
            self.take_as_they_come(self._take_early)

    def _take_early(self, parameter: Tensor) -> None:
        """Behind DeepSpeed's own hook, which adds up micro-batches."""
        if self.is_last_micro_batch() and engine_parts.is_whole(parameter):
            self.buckets.add(self.names[id(parameter)], self.optimizer.get_gradient_for_reduction(parameter))

    def _take(self, parameter: nn.Parameter, group: int) -> None:
        optimizer = self.optimizer
        if not (optimizer.partition_gradients or optimizer.is_gradient_accumulation_boundary()):
            return
        if not parameter.numel() or not engine_parts.is_whole(parameter):
            return
        if engine_parts.is_expert(parameter):
            self.experts.append(parameter)
            return
        name = self.names[id(parameter)]
        if self._takes_early and self.buckets.came(name):
            return
        self.buckets.add(name, optimizer.get_gradient_for_reduction(parameter))
        if optimizer.partition_gradients:
            parameter.grad = None

    @torch.no_grad()
    def _finish(self) -> None:
        optimizer = self.optimizer
        optimizer.setup_buckets()
        self._averaged = True
        try:
            for parameter, mean in self.buckets.finish(self._late_gradient):
                self._put(parameter.value, self.scaled(mean))
                self.pass_on(parameter.value, self._group_of[id(parameter.value)])
            experts, self.experts = self.experts, []
            experts.sort(key=lambda value: (self._group_of[id(value)], value.param_idx_in_group))  # alike on all ranks
            average_experts(experts, optimizer.get_gradient_for_reduction, self.state.num_ranks / self.factor)
            for value in experts:
                self.pass_on(value, self._group_of[id(value)])
            self.end_pass()
        finally:
            self._averaged = False
        self.say_once()

    def _late_gradient(self, parameter: ZeroParameter) -> Tensor | None:
        """Under ZeRO 1 with overlap_comm, that of earlier micro-batches where this one has none."""
        optimizer = self.optimizer
        return None if optimizer.partition_gradients else optimizer.get_gradient_for_reduction(parameter.value)

    def _put(self, parameter: Any, mean: Tensor) -> None:
        optimizer = self.optimizer
        mean = mean.view(parameter.shape)
        if optimizer.use_grad_accum_attribute:
            parameter.grad_accum = mean.to(optimizer.gradient_accumulation_dtype)
        else:
            parameter.grad = mean.to(parameter.dtype)

    def _reduce_unless_averaged(self, tensor: Tensor, communication_data_type: torch.dtype) -> Tensor:
        if self._averaged:
            return tensor
        return self._reduce_as_is(tensor, communication_data_type)


class _CutParameters(_Reducer):
    """ZeRO 3: a gradient is taken from its parameter as it comes; DeepSpeed is given this rank's piece of the mean."""

    def replace_methods(self) -> None:
        needed = ("partition_grads", "gradient_accumulation_dtype", "reduce_and_partition_stream")
        self.take_over(self._take, self._finish, *needed)

    @torch.no_grad()
    def _take(self, parameter: Any) -> None:
        optimizer = self.optimizer
        if getattr(optimizer, "_coalesce_grad_reduction", False) or not engine_parts.is_whole(parameter):
            return
        if engine_parts.is_expert(parameter):
            self.pass_on(parameter)
            return
        gradient = parameter.grad
        assert gradient is not None
        if gradient.numel() != parameter.ds_numel:
            raise RuntimeError(
                f"the gradient of {self.names[id(parameter)]!r} has {gradient.numel()} values; expected "
                f"{parameter.ds_numel}, as its parameter"
            )
        self.buckets.add(self.names[id(parameter)], gradient)
        parameter.grad = None

    @torch.no_grad()
    def _finish(self) -> None:
        values, pieces = [], []
        for parameter, mean in self.buckets.finish(lambda parameter: None):
            piece = self._own_piece(parameter, self.scaled(mean))
            values.append(parameter.value)
            pieces.append(piece.to(self.optimizer.gradient_accumulation_dtype))
        # Where DeepSpeed does it: offloading copies without waiting, and the end waits for this stream alone.
        accelerator, stream = get_accelerator(), self.optimizer.reduce_and_partition_stream
        if not accelerator.resolves_data_dependency():
            stream.wait_stream(accelerator.current_stream())
        with accelerator.stream(stream):
            self.optimizer.partition_grads(values, pieces)
        self.end_pass()
        self.say_once()

    def _own_piece(self, parameter: ZeroParameter, mean: Tensor) -> Tensor:
        """What this rank owns of the mean, filled up with zeros to what DeepSpeed calls a partition."""
        value: Any = parameter.value
        size = value.partition_numel()
        if len(mean) == size:  # dealt out already, or a single rank
            return mean
        start = size * self.state.rank
        piece = mean[start : start + size]
        return piece if len(piece) == size else torch.nn.functional.pad(piece, (0, size - len(piece)))
