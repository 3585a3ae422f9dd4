"""The reading side of torch.distributed.checkpoint."""

from __future__ import annotations

import dataclasses
import io
import os
from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from commcomp.checkpoint import weights_only
from commcomp.checkpoint.chain import SnapshotChain
from commcomp.checkpoint.coded import TensorHeader
from commcomp.checkpoint.decode_plan import Piece, Range
from commcomp.checkpoint.decoder import decode
from commcomp.checkpoint.distributed.description import Description
from commcomp.checkpoint.distributed.run_folder import RunFolder
from commcomp.checkpoint.errors import DamagedFileError, MissingSnapshotError, SnapshotError, shown
from commcomp.checkpoint.host_copy import as_tensor
from commcomp.checkpoint.parallel import default_threads_of_rank
from commcomp.checkpoint.store_files import require_step


class DeltaStorageReader(StorageReader):
    """Loads a checkpoint: `dcp.load(state, storage_reader=DeltaStorageReader("checkpoints"))`.

    `run`: the folder that DeltaStorageWriter was given; `step`: default the newest complete checkpoint. Any number of
    ranks, sharded in any way; each reads the shards that it needs, and of these the rows. `threads`: of each rank;
    default its share of the cores, at most 8.

    Non-tensor items are what the planner made of them, with DefaultSavePlanner files of torch.save, which
    DefaultLoadPlanner unpickles. Those that hold more than plain values and tensors (what torch.load(weights_only=True)
    refuses) could run code, and are refused unless `trusted`.
    In dcp.load errors come as CheckpointException: missing checkpoints, damaged files, wrong parents.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        step: int | None = None,
        *,
        threads: int | None = None,
        trusted: bool = False,
    ) -> None:
        super().__init__()
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads}; expected at least 1")
        self._run, self._asked = RunFolder(run), None if step is None else require_step(step)
        self._threads, self._trusted = default_threads_of_rank() if threads is None else threads, trusted
        self._description: Description | None = None

    @property
    def checkpoint_id(self) -> str:
        """The folder of the checkpoint, or of the run where the step is not known yet."""
        step = self._asked if self._description is None else self._description.step
        return self._run.path if step is None else self._run.folder(step)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None and os.fspath(checkpoint_id) != self.checkpoint_id:
            raise ValueError(
                f"checkpoint_id={os.fspath(checkpoint_id)!r}, but the reader is for {self.checkpoint_id!r}; leave "
                "checkpoint_id out"
            )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # only an instance knows run and step

    def read_metadata(self) -> Metadata:
        self._description = self._run.read(self._run.newest() if self._asked is None else self._asked)
        metadata = self._description.metadata
        metadata.storage_meta = StorageMeta(checkpoint_id=self.checkpoint_id)
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        assert self._description is not None
        hashes = tuple(sorted(self._description.state_hashes.items()))
        return dataclasses.replace(plan, storage_data=(self._description.step, hashes))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        if len({plan.storage_data for plan in plans}) > 1:
            steps = ", ".join(str(plan.storage_data[0]) for plan in plans)
            raise SnapshotError(
                f"{self._run.path} changed while the ranks looked for the newest checkpoint: they found {steps}; name "
                "the step"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        assert self._description is not None
        by_rank: dict[int, list[tuple[str, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            stored = self._description.metadata.storage_data[item.storage_index]
            by_rank[stored.rank].append((stored.tensor, item))
        for rank, wanted in sorted(by_rank.items()):
            self._read_file(rank, wanted, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_file(self, rank: int, wanted: list[tuple[str, ReadItem]], planner: LoadPlanner) -> None:
        with self._open(rank) as chain:
            reader = chain[0]
            ranges: dict[str, Range] = {}
            for name, item in wanted:
                if name not in reader.tensors:
                    raise DamagedFileError(reader.path, "is not in the file, which should have it", tensor=name)
                ranges[name] = _hull(ranges.get(name), self._rows(reader.tensors[name].header, item, reader.path))
            pieces = decode(chain, ranges, threads=self._threads)
            for name, item in wanted:
                header = reader.tensors[name].header
                if item.type == LoadItemType.BYTE_IO:
                    self._load_bytes(item, pieces[name], reader.path, planner)
                else:
                    _load_tensor(item, header, pieces[name], self._rows(header, item, reader.path), planner)

    def _open(self, rank: int) -> SnapshotChain:
        assert self._description is not None
        step = self._description.step
        try:
            chain = SnapshotChain(step, lambda step: self._run.rank_file(step, rank))
        except FileNotFoundError as error:
            path = self._run.rank_file(step, rank)
            raise MissingSnapshotError(f"{path} is missing; put it back, or load another step") from error
        found, due = chain[0].state_hash, self._description.state_hashes.get(rank)
        if found != due:
            chain.close()
            raise DamagedFileError(
                chain[0].path, f"state hash {found}; the checkpoint was completed with a file of {due}: it was replaced"
            )
        return chain

    def _rows(self, header: TensorHeader, item: ReadItem, path: str) -> Range:
        """The values [start, stop) of all rows (slices of the first dim) that an item needs."""
        if item.type == LoadItemType.BYTE_IO:
            return 0, header.num_values
        shape, start, lengths = header.shape, tuple(item.storage_offsets), tuple(item.lengths)
        if len(start) != len(shape) or any(at + length > dim for at, length, dim in zip(start, lengths, shape)):
            raise DamagedFileError(
                path, f"shape {shape}; expected to have {lengths} values from {start} on", tensor=header.name
            )
        if not shape:
            return 0, 1
        row = header.num_values // shape[0] if shape[0] else 0
        return start[0] * row, (start[0] + lengths[0]) * row

    def _load_bytes(self, item: ReadItem, piece: Piece, path: str, planner: LoadPlanner) -> None:
        data = piece.data.tobytes()
        if not self._trusted:
            try:
                weights_only.load(io.BytesIO(data))
            except ValueError as error:
                raise SnapshotError(
                    f"{path}: item {shown(item.storage_index.fqn)} could run code when it is loaded: {error}; where "
                    "you trust these files, pass trusted=True"
                ) from error
        planner.load_bytes(item, io.BytesIO(data))


def _load_tensor(item: ReadItem, header: TensorHeader, piece: Piece, rows: Range, planner: LoadPlanner) -> None:
    shape = header.shape and (item.lengths[0], *header.shape[1:])
    values: Tensor = as_tensor(header, piece.values(*rows), shape)
    for dim in range(1, len(shape)):
        values = values.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
    target = planner.resolve_tensor(item).detach()
    if target.shape != values.shape:
        raise SnapshotError(
            f"tensor {shown(header.name)}: the planner has room of shape {tuple(target.shape)}; expected "
            f"{tuple(values.shape)}"
        )
    target.copy_(values)
    planner.commit_tensor(item, target)


def _hull(one: Range | None, other: Range) -> Range:
    return other if one is None else (min(one[0], other[0]), max(one[1], other[1]))
