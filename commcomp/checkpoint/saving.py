"""Writing a snapshot into a store: against which parent, and whether what was written can be read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from commcomp.checkpoint.chain import SnapshotChain
from commcomp.checkpoint.codec.arithmetic import exact_arithmetic
from commcomp.checkpoint.coded import ComparingEncoder, HostTensor, Reference, SnapshotEncoder, TreeInfo
from commcomp.checkpoint.container import FileHeader, ParentLink, StoredTensor
from commcomp.checkpoint.container_reader import SnapshotReader
from commcomp.checkpoint.container_writer import SnapshotWriter
from commcomp.checkpoint.decoder import decode, whole
from commcomp.checkpoint.errors import DamagedFileError, MissingSnapshotError, SnapshotError, WrongParentError
from commcomp.checkpoint.host_copy import host_copies, memory_of
from commcomp.checkpoint.references import FileReference, MemoryReference
from commcomp.checkpoint.store_files import StoreFiles, in_words_of_the_store
from commcomp.checkpoint.tree_json import to_json
from commcomp.complaint import warn

_CANNOT_BE_PARENT = (DamagedFileError, WrongParentError, MissingSnapshotError)


@dataclass(frozen=True)
class SaveReport:
    """What a save did. `kept_bytes`: host memory that the store keeps until the next one."""

    step: int
    path: str
    bytes: int
    raw_bytes: int
    seconds: float
    parent: int | None  # step of the snapshot it was coded against
    kept_bytes: int

    @property
    def ratio(self) -> float:
        """Bytes of all tensors over bytes of the file."""
        return self.raw_bytes / self.bytes

    @property
    def keyframe(self) -> bool:
        return self.parent is None


@dataclass(frozen=True)
class HostState:
    """A state on its way to the disk. `owned`: nobody else has the tensors' memory."""

    info: TreeInfo
    tensors: dict[str, HostTensor]
    metadata: dict[str, Any]
    owned: bool

    @property
    def raw_bytes(self) -> int:
        return sum(tensor.data.nbytes for tensor in self.tensors.values())


@dataclass
class Written:
    """A complete file under a name of its own."""

    path: str
    file_bytes: int
    state_hash: str
    tensors: dict[str, StoredTensor]
    reconstructions: dict[str, np.ndarray]  # of lossy tensors, where they were to be kept
    parent: ParentLink | None


class Saver:
    """Writes states one after another; the caller holds the store's lock."""

    def __init__(
        self,
        files: StoreFiles,
        mode: str,
        encoder: SnapshotEncoder,
        *,
        keyframe_every: int,
        keep_reference: bool,
        verify_saves: bool,
        threads: int,
    ) -> None:
        self._files, self._mode, self._encoder, self._threads = files, mode, encoder, threads
        self._keyframe_every, self._keep_reference, self._verify_saves = keyframe_every, keep_reference, verify_saves
        self._reference: MemoryReference | None = None
        self._spare: dict[str, np.ndarray] = {}  # memory for the next copy of a state

    def take_spare_memory(self) -> dict[str, np.ndarray]:
        """Arrays (uint8) by tensor name whose contents nobody needs."""
        spare, self._spare = self._spare, {}
        return spare

    def reserve(self, sizes: Mapping[str, int]) -> None:
        """Have memory for the next copy, by tensor name: new memory takes several times as long as copying."""
        fitting = {name for name, data in self._spare.items() if len(data) == sizes.get(name)}
        self._spare |= memory_of({name: size for name, size in sizes.items() if name not in fitting})

    def save(self, state: HostState) -> SaveReport:
        """Raises OSError (disk full), SnapshotError; the store is then as before."""
        started = time.perf_counter()
        step = state.info.step
        try:
            written = self._write_best(state)
            if self._verify_saves:
                self._verify(written)
            self._files.place(written.path, step)
        except OSError as error:
            raise in_words_of_the_store(error, self._files.path, step) from error
        finally:
            self._files.remove_unfinished()
        if self._keep_reference:
            self._keep(state, written)
        return SaveReport(
            step=step,
            path=self._files.path_of(step),
            bytes=written.file_bytes,
            raw_bytes=state.raw_bytes,
            seconds=time.perf_counter() - started,
            parent=written.parent and written.parent.step,
            kept_bytes=(self._reference.num_bytes if self._reference else 0) + sum(map(len, self._spare.values())),
        )

    def forget(self, steps: set[int]) -> None:
        """These snapshots change or go."""
        if self._reference is not None and self._reference.step in steps:
            self._reference = None

    def _write_best(self, state: HostState) -> Written:
        """Coded against the newest earlier snapshot, or alone where that is due, smaller or the only way."""
        earlier = [step for step in self._files.steps() if step < state.info.step]
        compares = isinstance(self._encoder, ComparingEncoder)
        if not earlier or (self._keyframe_every == 1 and not compares):
            return self._write(state, None)
        try:
            with self._files.open(earlier[-1]) as chain:
                readers = chain.open_all()
                if len(readers) >= self._keyframe_every:
                    return self._write(state, None, self._reference_to(chain) if compares else None)
                delta = self._write(state, self._reference_to(chain))
        except _CANNOT_BE_PARENT as error:
            warn(f"step {state.info.step} is saved without a parent: {error}")
            return self._write(state, None)
        if delta.parent is None or delta.file_bytes < readers[-1].file_bytes:
            return delta
        alone = self._write(state, None)  # the delta is as large as the last snapshot without parent: try
        return alone if alone.file_bytes <= delta.file_bytes else delta

    def _reference_to(self, chain: SnapshotChain) -> Reference:
        kept, reader = self._reference, chain[0]
        there = kept is not None and kept.is_whole  # after a save that failed it may not be
        if kept is not None and there and (kept.step, kept.state_hash) == (reader.header.step, reader.state_hash):
            return kept
        self._reference = kept = None  # before another takes memory
        if not self._keep_reference:
            return FileReference(chain)
        self._reference = MemoryReference.of_file(chain, self._threads)
        return self._reference

    def _write(self, state: HostState, previous: Reference | None, earlier: Reference | None = None) -> Written:
        path, keep = self._files.unfinished_path(), self._keep_reference
        return write_state(path, state, self._mode, self._encoder, previous, self._threads, keep, earlier)

    def _verify(self, written: Written) -> None:
        """Decode the file that was written, and compare its hashes with those of what was given."""
        step_of_unfinished = -1
        paths = {step_of_unfinished: written.path}
        with SnapshotChain(step_of_unfinished, lambda step: paths.get(step) or self._files.path_of(step)) as chain:
            decode(chain, whole(chain[0]), threads=self._threads)

    def _keep(self, state: HostState, written: Written) -> None:
        """What a decoder will return of this snapshot; the memory of the one before serves the next copy."""
        old = self._reference.arrays if self._reference is not None else {}
        self._reference = None
        exact = {name: tensor.data for name, tensor in state.tensors.items() if name not in written.reconstructions}
        if state.owned:
            old |= {name: state.tensors[name].data for name in written.reconstructions}
            self._spare = {name: old[name] for name in old.keys() & state.tensors.keys()}
            self.reserve({name: tensor.data.nbytes for name, tensor in state.tensors.items()})
        else:
            exact = {name: copy.data for name, copy in host_copies(exact, old, self._threads).items()}
            self._spare = {}
        arrays = written.reconstructions | exact
        self._reference = MemoryReference(state.info.step, written.state_hash, state.info, written.tensors, arrays)


def write_state(
    path: str,
    state: HostState,
    mode: str,
    encoder: SnapshotEncoder,
    previous: Reference | None,
    threads: int,
    keep_reconstructions: bool = True,
    earlier: Reference | None = None,
) -> Written:
    """Write a new file, coded against `previous`; nothing is left of it where that fails.

    `earlier`: without `previous`, what a ComparingEncoder may look at. The encoder may release tensors of both, which
    takes these out of a reference in memory.
    Raises OSError (disk full), SnapshotError where the encoder breaks its word.
    """
    parent = None if previous is None else ParentLink(previous.step, previous.state_hash)
    header = FileHeader(state.info.step, mode, to_json(state.info.skeleton), state.metadata)
    reconstructions = {}
    with exact_arithmetic(), SnapshotWriter(path, header, parent, threads) as writer:
        if isinstance(encoder, ComparingEncoder) and earlier is not None:
            tensors = encoder.keyframe(state.tensors, state.info, earlier)
        else:
            tensors = encoder(state.tensors, state.info, previous)
        for coded in tensors:
            if coded.name not in state.tensors:
                raise SnapshotError(f"the encoder made up a tensor {coded.name[:200]!r}")
            writer.add(coded, state.tensors[coded.name])
            if coded.reconstruction is not None and keep_reconstructions:
                reconstructions[coded.name] = coded.reconstruction
        writer.finish(state.tensors)
    return Written(path, writer.file_bytes, writer.state_hash, writer.tensors, reconstructions, writer.parent)


def write_alone(
    files: StoreFiles, reader: SnapshotReader, arrays: Mapping[str, np.ndarray], encoder: SnapshotEncoder, threads: int
) -> str:
    """Write a decoded snapshot again without a parent, with the same state hash, under a name of its own.

    The declared bounds stay: they hold against what was once saved. `encoder` must be exact.
    """
    tensors = {
        name: HostTensor(name, tensor.header.dtype, tensor.header.shape, arrays[name])
        for name, tensor in reader.tensors.items()
    }
    path = files.unfinished_path()
    with exact_arithmetic(), SnapshotWriter(path, reader.header, None, threads) as writer:
        for coded in encoder(tensors, reader.tree_info, None):
            writer.add(replace(coded, bound=reader.tensors[coded.name].header.bound), tensors[coded.name])
        writer.finish(tensors)
    if writer.state_hash != reader.state_hash:
        raise SnapshotError(f"{reader.path} became another state when coded without its parent; it was left as it is")
    return path
