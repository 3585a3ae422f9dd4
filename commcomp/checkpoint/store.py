"""A directory of snapshots of a training state, each coded against the one before."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from commcomp.checkpoint import codec_registry, loading, pruning
from commcomp.checkpoint.background import Background, SaveFuture
from commcomp.checkpoint.chain import SnapshotChain
from commcomp.checkpoint.coded import SnapshotEncoder, TreeInfo
from commcomp.checkpoint.decode_plan import Piece
from commcomp.checkpoint.decoder import decode, whole
from commcomp.checkpoint.errors import MissingSnapshotError, SnapshotError
from commcomp.checkpoint.hashing import require_xxhash
from commcomp.checkpoint.host_copy import host_copies, host_views
from commcomp.checkpoint.parallel import default_threads
from commcomp.checkpoint.saving import HostState, Saver, SaveReport
from commcomp.checkpoint.state_tree import MAX_DEPTH, split
from commcomp.checkpoint.store_files import StoreFiles, require_step
from commcomp.checkpoint.tree_json import is_deeper

MAX_CHAIN = 256  # files that are open at once


class SnapshotStore:
    """Saves state dicts under their training step, and loads them.

    `path`: a directory, made by the first save; a store holds one run. `mode`: one of codec_registry.encoders.
    `keyframe_every`: at most so many snapshots need one another, the first of them none (1: each stands alone).
    `verify_saves`: decode each file before it counts as saved. `keep_reference`: keep a copy of the newest state in
    host memory for the next save, after save_async a second one's memory too; without, the state is decoded again
    then, chunk by chunk, and nothing is kept. `threads`: default the cores, at most 8; files do not depend on it.
    `coder`: "fast", or "max" for files up to some percent smaller that take several times as long to write and to
    read. `encoder`: in place of the mode's.

    One writer at a time, threads and processes counted: another gets StoreLockedError. Readers need no lock.
    Raises ValueError for wrong settings, ImportError without the package xxhash.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        mode: str = "lossless",
        keyframe_every: int = 8,
        *,
        verify_saves: bool = False,
        keep_reference: bool = True,
        threads: int | None = None,
        coder: str = "fast",
        encoder: SnapshotEncoder | None = None,
    ) -> None:
        require_xxhash()
        if sys.byteorder != "little":
            raise SnapshotError("snapshots hold little-endian values; this machine is big-endian")
        if not 1 <= keyframe_every <= MAX_CHAIN:
            raise ValueError(f"keyframe_every={keyframe_every}; expected 1 to {MAX_CHAIN}")
        self._threads = default_threads() if threads is None else threads
        if self._threads < 1:
            raise ValueError(f"threads={threads}; expected at least 1")
        self._files = StoreFiles(path)
        self._saver = Saver(
            self._files,
            mode,
            codec_registry.encoder_for(mode, self._threads, coder) if encoder is None else encoder,
            keyframe_every=keyframe_every,
            keep_reference=keep_reference,
            verify_saves=verify_saves,
            threads=self._threads,
        )
        self._background: Background[SaveReport] = Background("commcomp-save")

    @property
    def path(self) -> str:
        return self._files.path

    def __enter__(self) -> SnapshotStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what is being saved; raises its error if nobody has seen it. The store can be used again."""
        try:
            self._wait()
        finally:
            self._background.close()

    def save(
        self, step: int, state_dict: Any, metadata: dict[str, Any] | None = None, *, overwrite: bool = False
    ) -> SaveReport:
        """Write a snapshot; when this returns it is on the disk.

        `state_dict`: nested containers of tensors and plain values (see state_tree), not to be changed meanwhile;
        `metadata`: JSON. Raises TypeError naming what cannot be saved, SnapshotError where the step is there already
        (unless `overwrite`) or other snapshots need it, StoreLockedError, OSError (disk full): nothing changed then.
        """
        self._wait()
        step = require_step(step)
        with self._files.writing():
            self._require_free(step, overwrite)
            return self._saver.save(self._host_state(step, state_dict, metadata, copy=False))

    def save_async(
        self, step: int, state_dict: Any, metadata: dict[str, Any] | None = None, *, overwrite: bool = False
    ) -> SaveFuture[SaveReport]:
        """Copy the state, then write it on a thread of its own; the future gives the report.

        Waits for the save before. What goes wrong in the thread is raised by the future's result(), or by the next
        call to this store if nobody asked the future; the rest as `save`.
        """
        self._wait()
        step = require_step(step)
        lock = self._files.acquire()
        try:
            self._require_free(step, overwrite)
            states = [self._host_state(step, state_dict, metadata, copy=True)]

            def write() -> SaveReport:
                try:
                    return self._saver.save(states.pop())
                finally:
                    self._files.release(lock)

            return self._background.start(write)
        except BaseException:
            self._files.release(lock)
            raise

    def reserve(self, state_dict: Any) -> None:
        """Take the memory that save_async copies such a state into: its first call is then as quick as later ones.

        Raises TypeError naming what cannot be saved.
        """
        self._wait()
        self._saver.reserve({name: value.nbytes for name, value in split(state_dict).tensors.items()})

    def load(self, step: int | None = None, *, tensors: str | Sequence[str] | None = None, verify: bool = True) -> Any:
        """The state dict of `step`, default the newest, on the CPU.

        `tensors`: only those whose names match one of these globs ("model/*.weight"); others are missing from their
        dicts, and None in lists and tuples. `verify`: check the hash of every tensor, besides the checksums.
        Raises MissingSnapshotError, DamagedFileError, WrongParentError.
        """
        self._wait()
        patterns = [tensors] if isinstance(tensors, str) else tensors
        return self._files.read(
            self._step_or_newest(step), lambda chain: loading.load_state(chain, patterns, self._threads, verify)
        )

    def load_tensor(
        self, step: int, name: str, start: int | None = None, stop: int | None = None, *, verify: bool = True
    ) -> Tensor:
        """One tensor, or its values [start, stop) in row-major order as a 1-D one; little else of the file is read.

        A range is checked by its blocks' checksums, a whole tensor by its hash too (`verify`). Raises as `load`.
        """
        self._wait()
        return self._files.read(
            require_step(step),
            lambda chain: loading.load_values(chain, name, start, stop, self._threads, verify),
        )

    def steps(self) -> list[int]:
        """The steps of the snapshots that are there, rising."""
        return self._files.steps()

    def info(self, step: int | None = None) -> loading.SnapshotInfo:
        """What a snapshot holds, without reading it; default the newest."""
        self._wait()
        return self._files.read(self._step_or_newest(step), lambda chain: loading.describe(chain[0]))

    def verify(self, step: int | None = None) -> list[str]:
        """Decode a snapshot, or all, and compare every hash; what is wrong, empty if nothing is.

        Raises MissingSnapshotError where `step` is not there.
        """
        self._wait()
        problems: list[str] = []
        before: tuple[int, dict[str, Piece]] | None = None  # the last that was decoded: often the next one's parent
        for each in self.steps() if step is None else [require_step(step)]:
            last, before = before, None
            try:
                before = each, self._files.read(each, lambda chain, last=last: self._decoded(chain, last))  # type: ignore[misc]
            except MissingSnapshotError:
                if step is not None:
                    raise  # otherwise it was pruned meanwhile
            except (SnapshotError, OSError) as error:
                problems.append(f"step {each}: {error}")
        return problems

    def prune(self, *, keep: int | None = None, steps: Iterable[int] | None = None) -> pruning.PruneReport:
        """Remove all snapshots but the newest `keep`, or those of `steps`.

        Snapshots that need one of them are first coded anew, exactly, without a parent; where that would take more
        than it frees, as of lossy ones, what they need is kept. Raises MissingSnapshotError, StoreLockedError, OSError
        (disk full), and DamagedFileError or WrongParentError where one that stays cannot be read: nothing is removed
        then.
        """
        self._wait()
        with self._files.writing():
            removed = pruning.steps_to_remove(self._files, keep, None if steps is None else map(require_step, steps))
            self._saver.forget(removed)
            exact = codec_registry.encoder_for("lossless", self._threads)
            return pruning.remove(self._files, removed, exact, self._threads)

    def _wait(self) -> None:
        error = self._background.wait()
        if error is not None:
            raise SnapshotError(f"the snapshot that was being saved in the background failed: {error}") from error

    def _host_state(self, step: int, state_dict: Any, metadata: dict[str, Any] | None, *, copy: bool) -> HostState:
        try:
            metadata = json.loads(json.dumps(metadata or {}, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"metadata is no JSON: {error}") from error
        if is_deeper(metadata, MAX_DEPTH):
            raise TypeError(f"metadata is nested deeper than {MAX_DEPTH} levels")
        if type(metadata) is not dict:
            raise TypeError(f"metadata is a {type(metadata).__name__}; expected a dict")
        state = split(state_dict)
        tensors = (
            host_copies(state.tensors, self._saver.take_spare_memory(), self._threads)
            if copy
            else host_views(state.tensors)
        )
        return HostState(TreeInfo(step, state.skeleton, state.paths), tensors, metadata, owned=copy)

    def _require_free(self, step: int, overwrite: bool) -> None:
        if step not in self.steps():
            return
        if not overwrite:
            raise SnapshotError(f"{self.path} has a snapshot of step {step}; pass overwrite=True to replace it")
        if children := sorted(self._files.children_of({step})):
            needing = ", ".join(map(self._files.path_of, children))
            raise SnapshotError(
                f"{self._files.path_of(step)} cannot be overwritten: {needing} was coded against it; remove that one "
                "first (prune), or save another step"
            )
        self._saver.forget({step})

    def _step_or_newest(self, step: int | None) -> int:
        if step is not None:
            return require_step(step)
        steps = self.steps()
        if not steps:
            raise MissingSnapshotError(f"{self.path} has no snapshot yet")
        return steps[-1]

    def _decoded(self, chain: SnapshotChain, last: tuple[int, dict[str, Piece]] | None) -> dict[str, Piece]:
        reader = chain[0]
        assert reader.tree_info
        link = reader.parent
        parent = last[1] if last is not None and link is not None and link.step == last[0] else None
        return decode(chain, whole(reader), threads=self._threads, parent=parent)
