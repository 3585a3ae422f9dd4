"""`GradientSync`: the state object behind the communication hooks."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from commcomp import policy as policy_module
from commcomp import sync_state
from commcomp.bucket_part import Place, StepContext
from commcomp.bucket_plan import BucketPlanner
from commcomp.compressors import native
from commcomp.compressors.low_rank import folded_shape
from commcomp.compressors.passes import rounding_digest
from commcomp.config import Dense, GradientConfig, LowRank, Method, Rule
from commcomp.error_feedback import RESIDUAL, WARM_LEFT, WARM_RIGHT, ParameterStore
from commcomp.exchange.agreement import require_agreement
from commcomp.exchange.group import make_exchange_group
from commcomp.executor import Promise, make_executor
from commcomp.layout import Entry, effective_method
from commcomp.loss_scale import ResidualScale
from commcomp.module_tree import device_of, find_ddp, memory_shape, trainable_parameters
from commcomp.reduction import Reduction
from commcomp.saved_form import PieceForm, RowsForm, SavedForm, WholeForm
from commcomp.sharded_model import ShardedGroup, ShardedModel, find_sharded_model
from commcomp.telemetry.counters import TrafficCounters
from commcomp.version import __version__
from commcomp.watchdog import FirstUseWatch

_ROUNDING = "way of rounding (processor, libraries, OMP_NUM_THREADS)"


class GradientSync:
    """Synchronises a model's gradients over a process group in compressed form, with error feedback.

    Register it with `model.register_comm_hook(state, commcomp.comm_hook)`. Construct it on every rank with the same
    arguments, after `init_process_group`; that is checked by one collective.

    Args:
        model: the DistributedDataParallel module (or the module that will be wrapped).
        method: one method for all parameters, e.g. `LowRank(rank=4)`; or
        policy: ordered `(glob, method)` pairs or `Rule`s over parameter names; the first match wins.
        start_step: synchronised steps that travel dense before compression starts.
        residual_dtype: "fp32" or "bf16".
        measure_every: steps between measurements of the compression error (0: never).
        strict: raise (default) instead of warning when something is off.
        seed: of the first right factors.
        grad_scaler: the `torch.amp.GradScaler` in use, if any. Gradients reach the hook multiplied by its scale;
            knowing it, residuals are converted whenever the scale changes. Without it they would count wrongly then.
        process_group: ranks that average gradients; by default the DDP module's group, or all ranks for a bare module.
        exchange_group: a group of the same ranks that nothing else uses; made here if not given. Only needed where
            torch cannot make one, which is said then.

    Raises:
        ValueError: naming the parameter, rule or setting that cannot work; or, on every rank, what ranks disagree on.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method | None = None,
        *,
        policy: Sequence[Rule | tuple[str, Method]] | None = None,
        start_step: int = 0,
        residual_dtype: str = "fp32",
        measure_every: int = 50,
        strict: bool = True,
        seed: int = 0,
        grad_scaler: torch.amp.GradScaler | None = None,
        process_group: dist.ProcessGroup | None = None,
        exchange_group: dist.ProcessGroup | None = None,
    ) -> None:
        settings = {"start_step": start_step, "residual_dtype": residual_dtype, "measure_every": measure_every}
        problem = None
        self.sharded: ShardedModel | None = None
        """What fully_shard made of the model, if it did."""
        try:
            self._understand(model, method, policy, {**settings, "strict": strict, "seed": seed})
            ResidualScale(grad_scaler, torch.device("cpu"))
        except Exception as error:  # the other ranks wait for this one: tell them before raising
            problem = error
        wrapper = find_ddp(model)
        self._device = device_of(model)
        parent = process_group or getattr(wrapper, "process_group", None)
        if self.sharded is not None:
            self._device, parent = self.sharded.device, self.sharded.process_group
        # On CUDA every collective is launched from the hook in its order, as DDP's own would be, so the model's group
        # serves (a second NCCL communicator could deadlock with it). The worker thread needs one for itself.
        self._made_group = exchange_group is None and self._device.type != "cuda"
        with _naming("construction"):
            self._group = exchange_group or make_exchange_group(parent, alone=self._made_group)
        self.num_ranks = dist.get_world_size(self._group)
        self.rank = dist.get_rank(self._group)
        # Given a bare module we cannot know how DDP will be set up: then parameters may be unused.
        flags = ("find_unused_parameters", "static_graph")
        self._find_unused = self.sharded is None and (
            wrapper is None or any(getattr(wrapper, flag, False) for flag in flags)
        )
        facts = {"arguments that cannot work": problem and str(problem), **({} if problem else self._facts())}
        with _naming("construction"):
            require_agreement(facts, self._group, self._device)
        if problem is not None:
            raise problem

        self.saved_form = self._make_saved_form()
        """How residuals are saved."""
        self._closed = False
        self._agreed = False  # on where the ranks start from: once, in the first step
        self.step = 0
        """Steps synchronised so far, dense and skipped ones included."""
        self._store = ParameterStore()
        self._scale = ResidualScale(grad_scaler, self._device)
        self._reductions: dict[tuple[int, ...], Reduction] = {}
        self._not_advanced: list[Reduction] = []
        self._open: list[tuple[Reduction, Tensor, Promise]] = []
        self._failure: Exception | None = None
        self._seen: list[Sequence[Tensor]] = []
        self._complain_of_missing = True
        self._executor = make_executor(self._device)
        self._counters = TrafficCounters(self)
        self._planner = BucketPlanner(
            self.config,
            self.effective,
            self._store,
            self._group,
            self._counters.add_exchange,
            find_unused=self._find_unused,
        )
        weakref.finalize(self, self._executor.close)
        self._watch = FirstUseWatch(self.parameters.values(), strict=strict)

    def _understand(
        self,
        model: nn.Module,
        method: Method | None,
        policy: Sequence[Rule | tuple[str, Method]] | None,
        settings: dict[str, Any],
    ) -> None:
        """Everything about the arguments that can be checked on this rank alone."""
        if not isinstance(model, nn.Module):
            raise ValueError(f"GradientSync got {type(model).__name__} as model; expected GradientSync(model, method)")
        if policy is None and method is not None:
            policy = [("*", method)]
        elif policy is None or method is not None:
            raise ValueError("GradientSync needs either one method, e.g. LowRank(rank=4), or policy=[...], not both")
        self.config = GradientConfig(policy=policy_module.as_rules(policy), **settings)
        self.parameters = trainable_parameters(model)
        """The parameters that are synchronised, by name without wrappers' prefixes."""
        self.sharded = find_sharded_model(model)
        if self.sharded is None:
            self.shapes = {name: memory_shape(value) for name, value in self.parameters.items()}
            self._dtypes = {name: value.dtype for name, value in self.parameters.items()}
        else:
            pieces = self.sharded.parameters
            self.parameters = {name: value for name, value in self.parameters.items() if name in pieces}
            self.shapes = {name: self.sharded.seen_shape(name) for name in self.parameters}
            self._dtypes = {name: pieces[name].gradient_dtype for name in self.parameters}
        self.methods = policy_module.assign_methods(self.config.policy, self.parameters, strict=self.config.strict)
        self.effective = {
            name: effective_method(self.methods[name], shape, self._dtypes[name])
            for name, shape in self.shapes.items()
        }
        """What each parameter really gets: Dense where its method would not make it smaller."""
        policy_module.require_effect(
            self.config.policy, self.methods, self.effective, self.shapes, strict=self.config.strict
        )
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}

    @classmethod
    def from_config(
        cls,
        model: nn.Module,
        config: GradientConfig,
        *,
        grad_scaler: torch.amp.GradScaler | None = None,
        process_group: dist.ProcessGroup | None = None,
        exchange_group: dist.ProcessGroup | None = None,
    ) -> GradientSync:
        """Construct from a `GradientConfig`, e.g. `GradientConfig.from_dict(hydra_config["gradient"])`."""
        return cls(
            model,
            **{field.name: getattr(config, field.name) for field in fields(config)},
            grad_scaler=grad_scaler,
            process_group=process_group,
            exchange_group=exchange_group,
        )

    def reduce_bucket(
        self, buffer: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor], *, first: bool, last: bool
    ) -> torch.futures.Future[Tensor]:
        """Average one flat gradient bucket over the ranks; the future's value is `buffer`, overwritten.

        Args:
            buffer: flat gradients, [numel].
            parameters: the bucket's parameters in order.
            gradients: views of `buffer` in the same order, one a parameter.
            first, last: whether this is the first or last bucket of the step. Residuals move after the last.
        """
        self._make_ready(first=first)
        reduction = self._reduction_for(buffer, parameters, gradients)
        self._counters.add_bucket(buffer.numel() * buffer.element_size())
        promise = Promise(self._device)
        self._add(reduction, buffer.unsqueeze(0), buffer, promise, first=first)
        self._seen.append(parameters)
        if last:
            self._require_all_parameters()
            self._close_step()
        return promise.future

    def reduce_rows(self, rows: Tensor, group: ShardedGroup, *, first: bool) -> None:
        """Average the bucket `rows`, fp32 [W, S], of a sharded model; `finish_rows` puts the mean into this rank's row.

        Args:
            rows: one row for every rank that owns a piece; with replicas, this rank's piece alone.
            group: which parameters they are.
            first: whether this is the first bucket of the step.
        """
        self._make_ready(first=first)
        reduction = self._reduction_of_group(rows, group)
        self._counters.add_bucket(rows.numel() * group.parameters[0].gradient_dtype.itemsize)
        self._add(reduction, rows, rows, Promise(self._device), first=first)

    def finish_rows(self) -> None:
        """Wait for all buckets since the first one. Raises what went wrong on the way."""
        promises = [promise for _, _, promise in self._open]
        self._close_step()
        for promise in promises:
            promise.future.wait()

    def _make_ready(self, *, first: bool) -> None:
        if self._closed:
            raise RuntimeError("this GradientSync was closed; construct a new one and wrap the model anew")
        self._watch.used()
        if first and self._open:  # the former backward pass raised half-way
            self._executor.run(self._abandon_step)
            self._executor.drain()
            self._open.clear()
            self._seen.clear()

    def _add(self, reduction: Reduction, rows: Tensor, result: Tensor, promise: Promise, *, first: bool) -> None:
        self._open.append((reduction, result, promise))
        self._executor.run(lambda: self._begin(reduction, rows, first))

    def _close_step(self) -> None:
        opened, self._open = self._open, []
        self._executor.run(lambda: self._finish(opened))

    def stats(self) -> dict[str, Any]:
        """Traffic, memory and error figures so far; see docs/telemetry.md for every key. Waits for the device."""
        self._executor.drain()
        memory = {
            "residual": self._store.num_bytes(RESIDUAL),
            "warm_start": self._store.num_bytes(WARM_LEFT, WARM_RIGHT),
        }
        return {**self._counters.summary(self.step, memory), "arithmetic": native.arithmetic(self._device)}

    def state_dict(self) -> dict[str, Tensor]:
        """Residuals, warm starts and the step as a flat dict of tensors, for torch.distributed.checkpoint.

        Residual keys carry the rank ("rank_0/residual/<parameter>"), so every rank saves its own. The values are the
        live tensors, not copies. Load with `load_state_dict`, or with `restore` on any number of ranks. RuntimeError
        after a step that failed half-way.
        """
        self._executor.drain()
        if self._failure is not None:
            raise RuntimeError(
                f"GradientSync failed in step {self.step} ({self._failure}), perhaps between a residual and its "
                "gradient: its state is not worth saving; restart from the checkpoint before"
            ) from self._failure
        return sync_state.collect(self, self._store)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, on the same number of ranks (or from a dict with all ranks' residuals).

        On every rank: whether all then stand at the same point is checked, in the first step or, after it, here.
        Raises ValueError naming the key where the state does not fit this model, policy or number of ranks.
        """
        self._executor.drain()
        put, problem = None, None
        try:
            put = sync_state.prepare(self, self._store, state)
        except Exception as error:  # after a step the other ranks wait for this one: tell them before raising
            problem = error
        if self._agreed:
            self._agree({"states that do not fit": problem and str(problem)})
        if put is None:
            assert problem is not None
            raise problem
        put()
        if self._agreed:
            self._agree_on_start()

    def restore(self, checkpoint_id: str | os.PathLike[str], prefix: str = "gradient_sync") -> None:
        """Load from a torch.distributed.checkpoint directory saved with `{prefix: state.state_dict()}`.

        Works on any number of ranks: the mean of the residuals over ranks, which the optimizer is still owed, is kept.
        Call it on every rank, as `load_state_dict`.
        """
        self.load_state_dict(sync_state.read(self, checkpoint_id, prefix))

    def close(self) -> None:
        """Let go of the worker thread and of the process group made for it; no step can be made any more.

        On every rank. Only needed where one process makes many, say one for every layer that is unfrozen.
        """
        if self._closed:
            return
        self._closed = True
        self._executor.drain()
        self._executor.close()
        if self._made_group:
            dist.destroy_process_group(self._group)

    @property
    def loss_scale(self) -> float:
        """The loss scale that the residuals carry; 1.0 without a `grad_scaler`."""
        return self._scale.kept

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self._scale.kept = value

    @property
    def uses_loss_scale(self) -> bool:
        """Whether a `grad_scaler` was given."""
        return self._scale.in_use

    def __reduce__(self) -> Any:
        raise TypeError(
            "a GradientSync holds a process group and cannot be pickled or copied; save model.module and "
            "state.state_dict(), and register a new GradientSync after loading"
        )

    # The next four run in the order of the buckets, on the worker thread or the side stream.

    def _begin(self, reduction: Reduction, rows: Tensor, first: bool) -> None:
        if self._failure is not None:
            return
        try:
            if not self._agreed:
                self._agree_on_start()
            if first:
                self._context, self._not_advanced = self._new_context(), []
            reduction.begin(rows, self._context)
            self._not_advanced.append(reduction)
            # A dependent collective waits for its first one: on a stream at once, on the worker thread a bucket later,
            # when the first one has had time to cross. Not by whether it has: ranks would differ in the order.
            self._advance(keep=0 if self._device.type == "cuda" else 1)
        except Exception as error:
            self._failure = _named(error, f"step {self.step}")

    def _advance(self, *, keep: int) -> None:
        while len(self._not_advanced) > keep:
            self._not_advanced.pop(0).advance()

    def _abandon_step(self) -> None:
        try:
            self._advance(keep=0)
            for reduction, _, _ in self._open:
                reduction.finish_first()  # nothing may write into the buckets any more
        except Exception as error:
            self._failure = error
        self._counters.abandon_step()

    def _finish(self, opened: list[tuple[Reduction, Tensor, Promise]]) -> None:
        error = self._failure and RuntimeError(
            f"GradientSync failed in step {self.step} and cannot go on: {self._failure}; restart from a checkpoint"
        )
        if error is None:
            try:
                self._reduce_all([reduction for reduction, _, _ in opened])
            except Exception as failure:
                self._failure = error = _named(failure, f"step {self.step}")
        if error is not None and self._device.type == "cuda":
            raise error from self._failure  # we are in the hook itself
        for _, buffer, promise in opened:
            if error is None:
                promise.resolve(buffer)
            else:
                promise.fail(error)

    def _reduce_all(self, reductions: list[Reduction]) -> None:
        self._advance(keep=0)
        finite = [flag for reduction in reductions if (flag := reduction.finish_first()) is not None]
        step_is_finite: Tensor | bool = True
        if finite:  # on a CPU asking costs nothing; on a device nobody waits for the answer
            together = torch.stack(finite).all()
            step_is_finite = bool(together) if self._device.type == "cpu" else together
        for reduction in reductions:
            reduction.start_second(step_is_finite)
        for reduction in reductions:
            reduction.advance_second()
        measured = [item for reduction in reductions for item in reduction.finish(step_is_finite)]
        self._scale.advance(step_is_finite)
        self._counters.end_step(self._started, step_is_finite, measured)
        self._counters.require_saving(strict=self.config.strict)
        self.step += 1

    def _agree_on_start(self) -> None:
        start = {"step": self.step, "warm starts": sync_state.warm_start_digest(self, self._store)}
        self._agree(start)
        self._agreed = True

    def _agree(self, facts: dict[str, Any]) -> None:
        remedy = "restore on every rank from the same checkpoint, or on none"
        require_agreement(facts, self._group, self._device, remedy=remedy)

    def _require_all_parameters(self) -> None:
        seen, self._seen = self._seen, []
        if sum(map(len, seen)) == len(self.parameters) or not self._complain_of_missing:
            return
        self._complain_of_missing = False
        missing = sorted(set(self.parameters).difference(self._name_of(value) for part in seen for value in part))
        message = (
            f"parameters {missing[:4]} were in no gradient bucket of this step: frozen since, or the state is "
            "another model's; construct a new GradientSync after such changes"
        )
        if self.config.strict:
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=3)

    def _new_context(self) -> StepContext:
        compressing, every = self._started and self._compresses, self.config.measure_every
        return StepContext(
            step=self.step,
            measure=compressing and self._counters.measurement_due(every),
            check_finite=compressing,
            residual_scale=self._scale.begin_step(),
            find_unused=self._find_unused,
        )

    @property
    def _started(self) -> bool:
        """Whether the policy is in force; before `start_step` everything travels dense."""
        return self.step >= self.config.start_step

    def _reduction_for(self, buffer: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Reduction:
        key = (int(self._started), *map(id, parameters))
        if key not in self._reductions:
            self._executor.drain()
            # New buckets hold parameters of old ones, whose batches are stale from now on.
            members = set(key[1:])
            self._reductions = {old: value for old, value in self._reductions.items() if members.isdisjoint(old[1:])}
            self._reductions[key] = self._new_reduction(buffer, parameters, gradients)
        return self._reductions[key]

    def _reduction_of_group(self, rows: Tensor, group: ShardedGroup) -> Reduction:
        key = (int(self._started), id(group))
        if key not in self._reductions:
            assert self.sharded is not None
            place, length = self.sharded.place, rows.shape[1]
            dtype = group.parameters[0].gradient_dtype
            if self._started:
                self._reductions[key] = self._planner.by_methods(length, group.entries(place), place, rows.device)
            else:
                self._reductions[key] = self._planner.dense(length, dtype, place)
        return self._reductions[key]

    def _new_reduction(self, buffer: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Reduction:
        if buffer.is_sparse:
            raise ValueError(
                "a gradient bucket is sparse (an embedding with sparse=True); set sparse=False on that layer"
            )
        entries = [
            Entry(name, int(gradient.storage_offset() - buffer.storage_offset()), self.shapes[name])
            for name, gradient in zip(map(self._name_of, parameters), gradients, strict=True)
        ]
        for entry in entries:
            if buffer.dtype != (dtype := self._dtypes[entry.name]):
                raise ValueError(
                    f"the gradient of {entry.name!r} is {buffer.dtype}; it was {dtype} when GradientSync was "
                    "constructed: construct it after converting the model"
                )
        if not self._started:
            return self._planner.dense(buffer.numel(), buffer.dtype, Place())
        return self._planner.by_methods(buffer.numel(), entries, Place(), buffer.device)

    def _name_of(self, parameter: Tensor) -> str:
        name = self._names.get(id(parameter))
        if name is None:
            raise ValueError(
                f"a bucket holds a parameter of shape {tuple(parameter.shape)} that the model given to GradientSync "
                "did not have with requires_grad=True: construct GradientSync after freezing, unfreezing or replacing, "
                "and register each model's own state"
            )
        return name

    def _facts(self) -> dict[str, Any]:
        settings = self.config.to_dict()
        settings["policy"] = [f"{rule.params!r}: {rule.method}" for rule in self.config.policy]
        return {
            "commcomp version": __version__,
            **({_ROUNDING: self._arithmetic()} if self._device.type == "cpu" else {}),
            "number of ranks": self.num_ranks,
            "settings": settings,
            "unused parameters allowed": self._find_unused,
            "parameters": [
                f"{name} {list(self.shapes[name])} {value.dtype}" for name, value in self.parameters.items()
            ],
        }

    def _arithmetic(self) -> str:
        """What decides the decoded bits on a CPU: the passes, the number of threads, and a trial."""
        low_rank = ((self.effective[name], folded_shape(shape)) for name, shape in self.shapes.items())
        trial = rounding_digest(
            (method.rank, *shape) for method, shape in low_rank if isinstance(method, LowRank) and shape
        )
        return f"{native.arithmetic(self._device)} passes on {torch.get_num_threads()} threads, giving {trial}"

    def _make_saved_form(self) -> SavedForm:
        if self.sharded is None:
            return WholeForm(self.parameters, self.shapes)
        return PieceForm(self.sharded) if self.sharded.has_replicas else RowsForm(self.sharded)

    @property
    def _compresses(self) -> bool:
        return any(not isinstance(method, Dense) for method in self.effective.values())

def _named(error: Exception, when: str) -> Exception:
    """`error`, or where a collective failed, one that says whose it was."""
    if not isinstance(error, RuntimeError):
        return error
    named = RuntimeError(f"GradientSync, {when}: {error} (did another rank fail, or not get here?)")
    named.__cause__ = error
    return named


@contextmanager
def _naming(when: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _named(error, when) from error
