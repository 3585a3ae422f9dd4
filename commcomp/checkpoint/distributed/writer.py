"""The writing side of torch.distributed.checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from commcomp.checkpoint import codec_registry
from commcomp.checkpoint.chain import SnapshotChain
from commcomp.checkpoint.coded import ComparingEncoder, Reference, TreeInfo
from commcomp.checkpoint.decoder import decode, whole
from commcomp.checkpoint.distributed.description import Description, StoredItem
from commcomp.checkpoint.distributed.placement import keep_families_together
from commcomp.checkpoint.distributed.run_folder import RunFolder
from commcomp.checkpoint.distributed.shards import shards_of
from commcomp.checkpoint.errors import SnapshotError
from commcomp.checkpoint.hashing import require_xxhash
from commcomp.checkpoint.host_copy import host_views
from commcomp.checkpoint.parallel import default_threads_of_rank
from commcomp.checkpoint.references import MemoryReference
from commcomp.checkpoint.saving import HostState, write_state
from commcomp.checkpoint.store import MAX_CHAIN
from commcomp.checkpoint.store_files import in_words_of_the_store, require_step
from commcomp.complaint import warn


@dataclass(frozen=True)
class _Base:
    """The checkpoint to code against: its step, and the state hash of this rank's file of it."""

    step: int
    state_hash: str


@dataclass(frozen=True)
class _Task:
    """What the coordinator tells a rank."""

    rank: int
    base: _Base | None
    is_keyframe: bool
    """The base is only to be looked at."""


@dataclass(frozen=True)
class _Written:
    """What a rank tells the coordinator about each item."""

    item: StoredItem
    state_hash: str
    used_parent: bool


class DeltaStorageWriter(StorageWriter):
    """Saves one checkpoint of a run: `dcp.save(state, storage_writer=DeltaStorageWriter("checkpoints", step))`.

    `run`: a folder for the checkpoints of one run, on a file system that all ranks see; `step`: 0 to 10^12 - 1, of
    this one. Each rank codes its shards against its own in the newest complete checkpoint of an earlier step; a shard
    with another name, offset or size is coded alone. `mode`, `keyframe_every`, `coder`: as of SnapshotStore, on all
    ranks the same. `threads`: of each rank; default its share of the cores, at most 8. A writer serves one save,
    dcp.save or dcp.async_save.

    The checkpoint counts when rank 0 has finished; before, the run is as it was. A step that is there already is
    refused (SnapshotError), and so are use_collectives=False and a planner's plan caching. Raises ValueError for wrong
    settings, ImportError without the package xxhash; in dcp.save errors come as CheckpointException.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        step: int,
        mode: str = "lossless",
        keyframe_every: int = 8,
        *,
        threads: int | None = None,
        coder: str = "fast",
    ) -> None:
        super().__init__()
        require_xxhash()
        if not 1 <= keyframe_every <= MAX_CHAIN:
            raise ValueError(f"keyframe_every={keyframe_every}; expected 1 to {MAX_CHAIN}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads}; expected at least 1")
        self._compares = isinstance(codec_registry.encoder_for(mode, 1, coder), ComparingEncoder)
        self._coder = coder
        self._run, self._step = RunFolder(run), require_step(step)
        self._mode, self._keyframe_every = mode, keyframe_every
        self._threads = default_threads_of_rank() if threads is None else threads
        self._own_items: list[WriteItem] = []
        self._base: int | None = None
        self._chain = 1

    @property
    def checkpoint_id(self) -> str:
        """The folder of this checkpoint."""
        return self._run.folder(self._step)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None and os.fspath(checkpoint_id) != self.checkpoint_id:
            raise ValueError(
                f"checkpoint_id={os.fspath(checkpoint_id)!r}, but the writer is for {self.checkpoint_id!r}; leave "
                "checkpoint_id out"
            )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # only an instance knows run and step

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise ValueError("use_collectives=False leaves no rank that completes a checkpoint; leave it out")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if not plan.usable:
            raise SnapshotError(
                "DefaultSavePlanner(enable_plan_caching=True) hides the plan from the storage; leave that out"
            )
        self._own_items = list(plan.items)
        return dataclasses.replace(plan, storage_data={item.index for item in plan.items})

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._run.begin(self._step)
        base = self._find_base()
        is_keyframe = base is None or base.chain >= self._keyframe_every
        self._base, self._chain = (base.step, base.chain + 1) if base else (None, 1)
        hashes = base.state_hashes if base and (self._compares or not is_keyframe) else {}
        placed = keep_families_together(plans, [plan.storage_data for plan in plans])
        tasks = [
            _Task(rank, _Base(base.step, hashes[rank]) if base and rank in hashes else None, is_keyframe)
            for rank in range(len(plans))
        ]
        return [dataclasses.replace(plan, storage_data=task) for plan, task in zip(placed, tasks)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future: Future[list[WriteResult]] = Future()
        future.set_result(self._write(plan.storage_data, plan.items, planner) if plan.items else [])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result for of_rank in results for result in of_rank]
        metadata.storage_data = {result.index: result.storage_data.item for result in written}
        hashes = {result.storage_data.item.rank: result.storage_data.state_hash for result in written}
        used_parent = any(result.storage_data.used_parent for result in written)
        parent, chain = (self._base, self._chain) if used_parent else (None, 1)
        self._run.commit(Description(self._step, self._mode, parent, chain, hashes, metadata))
        metadata.storage_meta = self.storage_meta()

    def _find_base(self) -> Description | None:
        """The newest complete checkpoint before this one."""
        earlier = [step for step in self._run.steps() if step < self._step]
        if not earlier or (self._keyframe_every == 1 and not self._compares):
            return None
        try:
            return self._run.read(earlier[-1])
        except SnapshotError as error:
            warn(f"step {self._step} is saved without a parent: {error}")
            return None

    def _write(self, task: _Task, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        split, names = shards_of(items, self._own_items, planner)
        info = TreeInfo(self._step, split.skeleton, split.paths)
        state = HostState(info, host_views(split.tensors), {"rank": task.rank}, owned=False)
        encoder = codec_registry.encoder_for(self._mode, self._threads, self._coder)
        reference = self._previous(task, state)
        previous, earlier = (None, reference) if task.is_keyframe else (reference, None)
        unfinished = self._run.unfinished_file(self._step)
        try:
            done = write_state(unfinished, state, self._mode, encoder, previous, self._threads, False, earlier)
            self._run.place(unfinished, self._run.rank_file(self._step, task.rank))
        except OSError as error:
            raise in_words_of_the_store(error, self._run.folder(self._step), self._step) from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unfinished)

        def result(index: MetadataIndex) -> WriteResult:
            item = StoredItem(task.rank, names[index])
            size = done.tensors[item.tensor].stored_bytes
            return WriteResult(index, size, _Written(item, done.state_hash, done.parent is not None))

        return [result(item.index) for item in items]

    def _previous(self, task: _Task, state: HostState) -> Reference | None:
        """This rank's shards of the base that are there now too, decoded."""
        if task.base is None:
            return None
        try:
            with SnapshotChain(task.base.step, lambda step: self._run.rank_file(step, task.rank)) as chain:
                reader = chain[0]
                if reader.state_hash != task.base.state_hash:
                    raise SnapshotError(f"{reader.path} is not the file that its checkpoint was completed with")
                kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in state.tensors.items()}
                stored = {
                    name: tensor
                    for name, tensor in reader.tensors.items()
                    if kinds.get(name) == (tensor.header.dtype, tensor.header.shape)
                }
                pieces = decode(chain, whole(reader, stored), threads=self._threads)
                arrays = {name: piece.data for name, piece in pieces.items()}
                return MemoryReference(task.base.step, reader.state_hash, reader.tree_info, stored, arrays)
        except (SnapshotError, FileNotFoundError) as error:
            warn(f"step {self._step} is saved without a parent on rank {task.rank}: {error}")
            return None
