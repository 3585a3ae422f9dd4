"""The buckets of a step in their order, beside the backward pass: begun one by one, finished together.

Everything but `add`, `close_step` and `drain` runs on the worker thread (CPU) or the side stream (CUDA).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from commcomp.bucket_part import StepContext
from commcomp.executor import Promise, make_executor
from commcomp.loss_scale import ResidualScale
from commcomp.reduction import Reduction

if TYPE_CHECKING:
    from commcomp.config import GradientConfig
    from commcomp.exchange.vote import FiniteVote
    from commcomp.telemetry.counters import TrafficCounters


class StepRunner:
    """Takes buckets through the steps; what goes wrong fails the promises of the whole step, and all later ones.

    `agree` gives what lets the ranks agree on where they start, or None if its owner is gone. `vote` is None where
    every rank receives the same means.
    """

    def __init__(
        self,
        config: GradientConfig,
        scale: ResidualScale,
        counters: TrafficCounters,
        agree: Callable[[], Callable[[], None] | None],
        device: torch.device,
        *,
        compresses: bool,
        find_unused: bool,
        vote: FiniteVote | None,
    ) -> None:
        self._config, self._scale, self._counters, self._agree = config, scale, counters, agree
        self._device, self._compresses, self._find_unused = device, compresses, find_unused
        self._vote = vote
        self.step = 0
        self.agreed = False
        """Whether the ranks have agreed on where they start from: once, in the first step."""
        self.failure: Exception | None = None
        self._not_advanced: list[Reduction] = []
        self._open: list[tuple[Reduction, Tensor, Promise]] = []
        self.executor = make_executor(device)

    @property
    def started(self) -> bool:
        """Whether the policy is in force; before `start_step` everything travels dense."""
        return self.step >= self._config.start_step

    def add(self, reduction: Reduction, rows: Tensor, result: Tensor, *, first: bool) -> Promise:
        """Begin one bucket, [W, S]; the promise is kept with the mean in `result`, [S], when the step is finished."""
        promise = Promise(self._device)
        self._open.append((reduction, result, promise))
        self.executor.run(lambda: self._begin(reduction, rows, result, first))
        return promise

    def close_step(self) -> list[Promise]:
        """No bucket is to come any more. Returns the step's promises."""
        opened, self._open = self._open, []
        self.executor.run(lambda: self._finish(opened))
        return [promise for _, _, promise in opened]

    def abandon_open_step(self) -> bool:
        """Let go of a step whose backward pass raised half-way; returns whether there was one."""
        if not self._open:
            return False
        self.executor.run(self._abandon)
        self.executor.drain()
        self._open.clear()
        return True

    def _begin(self, reduction: Reduction, rows: Tensor, result: Tensor, first: bool) -> None:
        if self.failure is not None:
            return
        try:
            if not self.agreed:
                agree = self._agree()
                if agree is not None:
                    agree()
                self.agreed = True
            if first:
                self._context, self._not_advanced = self._new_context(), []
            reduction.begin(rows, result, self._context)
            if rows.is_cuda:
                rows.record_stream(torch.cuda.current_stream())  # nobody may keep them until the step's end
            self._not_advanced.append(reduction)
            # A dependent collective waits for its first one: on a stream at once, on the worker thread a bucket later,
            # when the first one has had time to cross. Not by whether it has: ranks would differ in the order.
            self._advance(keep=0 if self._device.type == "cuda" else 1)
        except Exception as error:
            self.failure = named(error, f"step {self.step}")

    def _advance(self, *, keep: int) -> None:
        while len(self._not_advanced) > keep:
            self._not_advanced.pop(0).advance()

    def _abandon(self) -> None:
        try:
            self._advance(keep=0)
            for reduction, _, _ in self._open:
                reduction.finish_first()  # nothing may write into the buckets any more
        except Exception as error:
            self.failure = error
        self._counters.abandon_step()

    def _finish(self, opened: list[tuple[Reduction, Tensor, Promise]]) -> None:
        error = self.failure and RuntimeError(
            f"GradientSync failed in step {self.step} and cannot go on: {self.failure}; restart from a checkpoint"
        )
        if error is None:
            try:
                self._reduce_all([reduction for reduction, _, _ in opened])
            except Exception as failure:
                self.failure = error = named(failure, f"step {self.step}")
        if error is not None and self._device.type == "cuda":
            raise error from self.failure  # we are in the hook itself
        for _, result, promise in opened:
            if error is None:
                promise.resolve(result)
            else:
                promise.fail(error)

    def _reduce_all(self, reductions: list[Reduction]) -> None:
        self._advance(keep=0)
        finite = [flag for reduction in reductions if (flag := reduction.finish_first()) is not None]
        step_is_finite: Tensor | bool = True
        if finite:  # on a CPU asking costs nothing; on a device nobody waits for the answer
            together = torch.stack(finite).all()
            if self._vote is not None and (self._vote.always or any(reduction.to_owners for reduction in reductions)):
                together = self._vote(together)
            step_is_finite = bool(together) if self._device.type == "cpu" else together
        for reduction in reductions:
            reduction.start_second(step_is_finite)
        for reduction in reductions:
            reduction.advance_second()
        measured = [item for reduction in reductions for item in reduction.finish(step_is_finite)]
        self._scale.advance(step_is_finite)
        self._counters.end_step(self.started, step_is_finite, measured)
        self._counters.require_saving(strict=self._config.strict)
        self.step += 1

    def _new_context(self) -> StepContext:
        compressing = self.started and self._compresses
        return StepContext(
            step=self.step,
            measure=compressing and self._counters.measurement_due(self._config.measure_every),
            check_finite=compressing,
            residual_scale=self._scale.begin_step(),
            find_unused=self._find_unused,
        )


def named(error: Exception, when: str) -> Exception:
    """`error`, or where a collective failed, one that says whose it was."""
    if not isinstance(error, RuntimeError):
        return error
    said = RuntimeError(f"GradientSync, {when}: {error} (did another rank fail, or not get here?)")
    said.__cause__ = error
    return said
