"""`GradientSync`: the state object behind the communication hooks."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import StorageReader

from commcomp import sync_state
from commcomp.bucket_plan import BucketPlanner, GradientGroup
from commcomp.complaint import complain
from commcomp.compressors import native
from commcomp.config import GradientConfig, Method, Rule
from commcomp.error_feedback import RESIDUAL, WARM_LEFT, WARM_RIGHT, ParameterStore
from commcomp.flat_model import find_flat_model
from commcomp.loss_scale import ResidualScale
from commcomp.model_structure import ModelStructure
from commcomp.module_tree import device_of, find_ddp
from commcomp.ranks import Ranks
from commcomp.sharded_model import find_sharded_model, groups_of
from commcomp.step_runner import StepRunner, named
from commcomp.synchronised_model import SynchronisedModel
from commcomp.telemetry.counters import TrafficCounters
from commcomp.version import __version__
from commcomp.watchdog import FirstUseWatch

_ROUNDING = "way of rounding (processor, libraries, OMP_NUM_THREADS)"
_SAME_CHECKPOINT = "restore on every rank from the same checkpoint, or on none"


class GradientSync:
    """Synchronises a model's gradients over a process group in compressed form, with error feedback.

    Register it with `model.register_comm_hook(state, commcomp.comm_hook)`. Construct it on every rank with the same
    arguments, after `init_process_group`; that is checked by one collective.

    Args:
        model: the DistributedDataParallel module (or the module that will be wrapped), or one after `fully_shard`
            or FullyShardedDataParallel.
        method: one method for all parameters, e.g. `LowRank(rank=4)`; or
        policy: ordered `(glob, method)` pairs or `Rule`s over parameter names; the first match wins.
        start_step: synchronised steps that travel dense before compression starts.
        residual_dtype: "fp32", "bf16", "int8" or "none" (no error feedback).
        measure_every: steps between measurements of the compression error (0: never).
        strict: raise (default) instead of warning when something is off.
        seed: of the first right factors.
        grad_scaler: the `torch.amp.GradScaler` in use, if any. Gradients reach the hook multiplied by its scale;
            knowing it, residuals are converted whenever the scale changes. Without it they would count wrongly then.
        process_group: ranks that average gradients; by default the DDP module's group, or all ranks for a bare module.
        exchange_group: a group of the same ranks that nothing else uses; made here if not given. Only needed where
            torch cannot make one, which is said then.
        structure: what a framework made of the model, from its adapter (commcomp.deepspeed); FSDP's is found here.

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
        structure: ModelStructure | None = None,
    ) -> None:
        settings = {
            "start_step": start_step,
            "residual_dtype": residual_dtype,
            "measure_every": measure_every,
            "strict": strict,
            "seed": seed,
        }
        subject, problem = None, None
        sharded = structure
        try:
            if sharded is None and isinstance(model, nn.Module):
                sharded = find_sharded_model(model) or find_flat_model(model)
            subject = SynchronisedModel(model, method, policy, settings, sharded)
            ResidualScale(grad_scaler, torch.device("cpu"))
        except Exception as error:  # the other ranks wait for this one: tell them before raising
            problem = error
        if problem is None and sharded is not None and process_group is not None:
            problem = ValueError("process_group was given for a sharded model, which has its own: leave it out")
        wrapper = find_ddp(model)
        # Given a bare module we cannot know how DDP will be set up: then parameters may be unused.
        flags = ("find_unused_parameters", "static_graph")
        find_unused = sharded is None and (wrapper is None or any(getattr(wrapper, flag, False) for flag in flags))
        self._device = device_of(model) if sharded is None else sharded.device
        self._ranks = _ranks_of(model, sharded, process_group, exchange_group, self._device)
        try:
            self._ranks.require_given()
        except ValueError as error:
            problem = problem or error
        try:
            self._ranks.agree(_facts(subject, problem, self._ranks, find_unused))
            if problem is None:
                self._ranks.make_groups()
        except RuntimeError as error:
            raise named(error, "construction") from error
        except ValueError:
            self._ranks.close()
            raise
        if problem is not None:
            raise problem
        assert subject is not None
        self._model = subject
        self.num_ranks, self.rank = self._ranks.num_ranks, self._ranks.rank
        self.saved_form = subject.saved_form()
        """How residuals are saved."""
        self._store = ParameterStore()
        self._scale = ResidualScale(grad_scaler, self._device)
        self._counters = TrafficCounters(self)
        self._planner = BucketPlanner(
            subject, self._store, self._ranks.group, self._counters.add_exchange, find_unused=find_unused
        )
        self._runner = StepRunner(
            subject.config,
            self._scale,
            self._counters,
            weakref.WeakMethod(self._agree_on_start),  # else a cycle would keep this object until a collection
            self._device,
            compresses=subject.compresses,
            find_unused=find_unused,
            vote=self._ranks.make_vote(self._counters.add_bytes, sharded=sharded is not None),
        )
        weakref.finalize(self, self._runner.executor.close)
        self._watch = FirstUseWatch(subject.optimized(), strict=strict)
        self._closed = False
        self._seen: list[Sequence[Tensor]] = []
        self._complain_of_missing = True

    @classmethod
    def from_config(
        cls,
        model: nn.Module,
        config: GradientConfig | Mapping[str, Any],
        *,
        grad_scaler: torch.amp.GradScaler | None = None,
        process_group: dist.ProcessGroup | None = None,
        exchange_group: dist.ProcessGroup | None = None,
        structure: ModelStructure | None = None,
    ) -> GradientSync:
        """Construct from a `GradientConfig`, or a configuration file's dictionary (`GradientConfig.from_dict`)."""
        if isinstance(config, Mapping):
            config = GradientConfig.from_dict(config)
        return cls(
            model,
            **{field.name: getattr(config, field.name) for field in fields(config)},
            grad_scaler=grad_scaler,
            process_group=process_group,
            exchange_group=exchange_group,
            structure=structure,
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
        started = self._runner.started
        if not self._planner.has_bucket(parameters, started=started):
            self._runner.executor.drain()  # batches of buckets that there were will be stale
        reduction = self._planner.of_bucket(buffer, parameters, gradients, started=started)
        self._counters.add_bucket(buffer.numel() * buffer.element_size())
        promise = self._runner.add(reduction, buffer.unsqueeze(0), buffer, first=first)
        self._seen.append(parameters)
        if last:
            self._require_all_parameters()
            self._runner.close_step()
        return promise.future

    def reduce_rows(
        self, rows: Tensor, target: Tensor, group: GradientGroup, *, first: bool, again: bool = False
    ) -> torch.futures.Future[Tensor]:
        """Average the bucket `rows`, fp32 [W, S], of a sharded model; after `finish_rows` the mean is in `target`.

        Args:
            rows: one row for every rank that owns a piece; with replicas, this rank's piece alone; for FSDP1 one row.
            target: for this rank's row of the mean, fp32 [S]; where W is 1, `rows[0]`.
            group: which parameters they are.
            first: whether this is the first bucket of the step.
            again: whether the group has had a bucket in this step; then this one goes whole.
        """
        self._make_ready(first=first)
        reduction = self._planner.of_group(rows, group, started=self._runner.started, again=again)
        self._counters.add_bucket(rows.numel() * group.gradient_dtype.itemsize, scattered=group.scattered)
        return self._runner.add(reduction, rows, target, first=first).future

    def finish_rows(self) -> None:
        """Wait for all buckets since the first one. Raises what went wrong on the way."""
        for promise in self._runner.close_step():
            promise.future.wait()

    def stats(self) -> dict[str, Any]:
        """Traffic, memory and error figures so far; see docs/telemetry.md for every key. Waits for the device."""
        self._runner.executor.drain()
        memory = {
            "residual": self._store.num_bytes(RESIDUAL),
            "warm_start": self._store.num_bytes(WARM_LEFT, WARM_RIGHT),
            "planned": sync_state.planned_bytes(self),
        }
        return {**self._counters.summary(self.step, memory), "arithmetic": native.arithmetic(self._device)}

    def state_dict(self, *, mean_residual: bool = False) -> dict[str, Tensor]:
        """Residuals, warm starts and the step as a flat dict of tensors, for torch.distributed.checkpoint.

        Residual keys carry the rank ("rank_0/residual/<parameter>"), so every rank saves its own. The values are the
        live tensors, not copies, but for int8 residuals, which are copied as bf16. Load with `load_state_dict`, or with
        `restore` on any number of ranks. RuntimeError after a step that failed half-way.

        With `mean_residual`, one residual stands for all ranks: their mean, which is what the optimizer is still owed,
        whole and in fp32 in the CPU's memory (4 bytes a compressed value). All ranks call it, since it is a collective
        for every parameter; one rank's `torch.save` of what it gets will do, and `load_state_dict` takes it on any
        number of ranks. Such a run goes on as if its number of ranks had changed: as much is owed, but for the rounding
        of `residual_dtype`, by other ranks. Under HSDP each rank gets the warm starts of its own pieces only, and
        those that are missing when it is loaded begin anew. ValueError on every rank where ranks are at different steps
        or one has failed; RuntimeError after `close`.
        """
        self._runner.executor.drain()
        if mean_residual:
            self._require_open()
            self._agree_on_saving()
        if self._runner.failure is not None:
            raise RuntimeError(
                f"GradientSync failed in step {self.step} ({self._runner.failure}), perhaps between a residual and its "
                "gradient: its state is not worth saving; restart from the checkpoint before"
            ) from self._runner.failure
        return sync_state.collect(self, self._store, self._ranks.mean if mean_residual else None)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, on the same number of ranks (or from a dict with all ranks' residuals).

        On every rank: whether all then stand at the same point is checked, in the first step or, after it, here.
        Raises ValueError naming the key where the state does not fit this model, policy or number of ranks.
        """
        self._runner.executor.drain()
        put, problem = None, None
        try:
            put = sync_state.prepare(self, self._store, state)
        except Exception as error:  # after a step the other ranks wait for this one: tell them before raising
            problem = error
        if self._runner.agreed:
            self._ranks.agree({"states that do not fit": problem and str(problem)}, remedy=_SAME_CHECKPOINT)
        if put is None:
            assert problem is not None
            raise problem
        put()
        if self._runner.agreed:
            self._agree_on_start()

    def restore(
        self,
        checkpoint_id: str | os.PathLike[str] | None = None,
        prefix: str = "gradient_sync",
        *,
        storage_reader: StorageReader | None = None,
    ) -> None:
        """Load from a torch.distributed.checkpoint directory saved with `{prefix: state.state_dict()}`.

        `storage_reader` in place of the directory: of a checkpoint that another storage_writer saved, as
        DeltaStorageReader(run, step); of the same step on every rank.

        Works on any number of ranks: the mean of the residuals over ranks, which the optimizer is still owed, is kept.
        Call it on every rank, as `load_state_dict`. ValueError without exactly one of the two, FileNotFoundError where
        the directory holds no checkpoint, and what the reader raises.
        """
        if (checkpoint_id is None) == (storage_reader is None):
            raise ValueError("restore takes either checkpoint_id=<a directory> or storage_reader=<a StorageReader>")
        if storage_reader is None:
            assert checkpoint_id is not None
            storage_reader = sync_state.reader_of(checkpoint_id)
        self.load_state_dict(sync_state.read(self, storage_reader, prefix))

    def close(self) -> None:
        """Let go of the worker thread and of the process group made for it; no step can be made any more.

        On every rank. Only needed where one process makes many, say one for every layer that is unfrozen.
        """
        if self._closed:
            return
        self._closed = True
        self._runner.executor.drain()
        self._runner.executor.close()
        self._ranks.close()

    @property
    def step(self) -> int:
        """Steps synchronised so far, dense and skipped ones included."""
        return self._runner.step

    @step.setter
    def step(self, value: int) -> None:
        self._runner.step = value

    @property
    def config(self) -> GradientConfig:
        """The settings."""
        return self._model.config

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that are synchronised, by name without wrappers' prefixes; of FSDP1 tensors without values."""
        return self._model.parameters

    @property
    def methods(self) -> dict[str, Method]:
        """Each parameter's method by the policy."""
        return self._model.methods

    @property
    def effective(self) -> dict[str, Method]:
        """What each parameter really gets: Dense where its method would not make it smaller."""
        return self._model.effective

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters' shapes as the methods see them."""
        return self._model.shapes

    @property
    def gradient_dtypes(self) -> dict[str, torch.dtype]:
        """In which dtype each parameter's gradient arrives."""
        return self._model.gradient_dtypes

    @property
    def device(self) -> torch.device:
        """Where gradients are exchanged and residuals kept."""
        return self._device

    @property
    def sharded(self) -> ModelStructure | None:
        """What fully_shard, FullyShardedDataParallel or DeepSpeed made of the model, if they did."""
        return self._model.sharded

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

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("this GradientSync was closed; construct a new one and wrap the model anew")

    def _make_ready(self, *, first: bool) -> None:
        self._require_open()
        self._watch.used()
        if first and self._runner.abandon_open_step():
            self._seen.clear()

    def _agree_on_saving(self) -> None:
        failure = self._runner.failure
        remedy = "call it on every rank after the same step; after a failure restart from the checkpoint before"
        try:
            self._ranks.agree({"failure": failure and str(failure), "step": self.step}, remedy=remedy)
        except RuntimeError as error:
            raise named(error, "state_dict") from error

    def _agree_on_start(self) -> None:
        own = {"warm starts": sync_state.warm_start_digest(self, self._store)}  # of its shard, with replicas
        self._ranks.agree({"step": self.step, "loss scale": self.loss_scale}, own, _SAME_CHECKPOINT)

    def _require_all_parameters(self) -> None:
        seen, self._seen = self._seen, []
        if sum(map(len, seen)) == len(self.parameters) or not self._complain_of_missing:
            return
        self._complain_of_missing = False
        missing = sorted(set(self.parameters).difference(self._model.name_of(value) for part in seen for value in part))
        message = (
            f"parameters {missing[:4]} were in no gradient bucket of this step: frozen since, or the state is "
            "another model's; construct a new GradientSync after such changes"
        )
        complain(message, strict=self.config.strict, error=RuntimeError)


def _ranks_of(
    model: nn.Module,
    sharded: ModelStructure | None,
    process_group: dist.ProcessGroup | None,
    exchange_group: dist.ProcessGroup | None,
    device: torch.device,
) -> Ranks:
    """Also where this rank cannot use the model, so that it can tell the others."""
    parent: dist.ProcessGroup | None
    other_shards: dist.ProcessGroup | None
    if sharded is not None:
        parent, other_shards = sharded.process_group, sharded.other_shards
    else:
        own = process_group or getattr(find_ddp(model), "process_group", None)
        parent, other_shards = groups_of(model) or (own, None)
    return Ranks(parent, device, other_shards, exchange_group)


def _facts(
    subject: SynchronisedModel | None, problem: Exception | None, ranks: Ranks, find_unused: bool
) -> dict[str, Any]:
    if subject is None or problem is not None:
        return {"arguments that cannot work": str(problem)}
    return {
        "arguments that cannot work": None,
        "commcomp version": __version__,
        **ranks.facts(),
        "unused parameters allowed": find_unused,
        **subject.facts(),
        **({_ROUNDING: subject.rounding(ranks.device)} if ranks.device.type == "cpu" else {}),
    }
