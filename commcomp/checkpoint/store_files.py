"""The files of a store: which there are, how one comes in and goes out so that a crash at any moment leaves a store."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterator
from typing import TypeVar

from commcomp.checkpoint.chain import SnapshotChain
from commcomp.checkpoint.container import MAX_STEP
from commcomp.checkpoint.container_reader import SnapshotReader
from commcomp.checkpoint.errors import (
    DamagedFileError,
    MissingSnapshotError,
    StoreLockedError,
    WrongParentError,
)

_NAME = re.compile(r"step-(\d{12})\.ccsnap")
UNFINISHED = ".tmp-"
LOCK = ".lock"
_TRIES = 5

Result = TypeVar("Result")


class StoreFiles:
    """A directory of snapshot files."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(os.fspath(path))  # whatever becomes of the working directory
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise NotADirectoryError(f"{self.path} is no directory; a store of snapshots is one")

    def path_of(self, step: int) -> str:
        return os.path.join(self.path, f"step-{step:012d}.ccsnap")

    def steps(self) -> list[int]:
        """Of the snapshots that are there, rising; nothing is read but the directory."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)

    def open(self, step: int) -> SnapshotChain:
        """Raises MissingSnapshotError naming the steps there are, DamagedFileError."""
        try:
            chain = SnapshotChain(step, self.path_of)
        except FileNotFoundError as error:
            steps = self.steps()
            there = f"the steps {_listed(steps)}" if steps else "no snapshot at all"
            raise MissingSnapshotError(f"{self.path} has no snapshot of step {step}; it has {there}") from error
        if chain[0].header.step != step:
            chain.close()
            raise DamagedFileError(
                chain[0].path, f"holds step {chain[0].header.step}; the name says {step}: it was renamed", offset=0
            )
        return chain

    def read(self, step: int, work: Callable[[SnapshotChain], Result]) -> Result:
        """work(chain of the step), tried again where pruning replaced a file meanwhile: readers take no lock."""
        for tries_left in reversed(range(_TRIES)):
            with self.open(step) as chain:
                try:
                    return work(chain)
                except WrongParentError:
                    if not tries_left or all(map(_is_current, chain.opened)):
                        raise
        raise AssertionError("the last try returns or raises")

    def children_of(self, steps: set[int]) -> dict[int, SnapshotReader]:
        """Closed readers of the other snapshots that were coded against one of `steps`. Raises DamagedFileError."""
        found = {}
        for step in sorted(set(self.steps()) - steps):
            with self.open(step) as chain:
                parent = chain[0].parent
                if parent is not None and parent.step in steps:
                    found[step] = chain[0]
        return found

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """`acquire` and `release` around a block."""
        lock = self.acquire()
        try:
            yield
        finally:
            self.release(lock)

    def acquire(self) -> int:
        """Take the store for writing, and clear away what dead writers left. Raises StoreLockedError at once."""
        os.makedirs(self.path, exist_ok=True)
        lock = os.open(os.path.join(self.path, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(lock)
            raise StoreLockedError(
                f"{self.path} is being written by another writer (process {holder}); wait for it, or give each writer "
                "a store of its own"
            ) from error
        except BaseException:
            os.close(lock)
            raise
        os.pwrite(lock, f"{os.getpid():<20d}".encode(), 0)
        self.remove_unfinished()
        return lock

    def release(self, lock: int) -> None:
        fcntl.flock(lock, fcntl.LOCK_UN)  # a forked child may hold a copy of the descriptor
        os.close(lock)

    def remove_unfinished(self) -> None:
        """For who holds the lock: nobody else writes here then."""
        for name in os.listdir(self.path):
            if name.startswith(UNFINISHED):
                os.unlink(os.path.join(self.path, name))

    def unfinished_path(self) -> str:
        """Where a snapshot is written until it is complete."""
        return os.path.join(self.path, f"{UNFINISHED}{os.getpid()}-{secrets.token_hex(4)}")

    def place(self, unfinished: str, step: int) -> None:
        """Make a complete, fsynced file the snapshot of `step`, in place of one that is there."""
        os.rename(unfinished, self.path_of(step))
        sync_folder(self.path)

    def remove(self, steps: set[int]) -> None:
        """Newest first: whatever is left after a crash has its parents."""
        for step in sorted(steps, reverse=True):
            os.unlink(self.path_of(step))
        sync_folder(self.path)


def require_step(step: int) -> int:
    """Raises TypeError or ValueError for what can be no step; bool is none, numpy's integers are."""
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise TypeError(f"step is a {type(step).__name__}; expected an int")
    if not 0 <= step <= MAX_STEP:
        raise ValueError(f"step={step}; expected 0 to {MAX_STEP}")
    return step.__index__()


def in_words_of_the_store(error: OSError, path: str, step: int) -> OSError:
    """An OSError while writing, with what it means."""
    message = (
        f"{error.strerror or error} while the snapshot of step {step} was written; it was given up, the store is as "
        "before: free space or repair the disk and save again"
    )
    return OSError(error.errno, message, path)


def _is_current(reader: SnapshotReader) -> bool:
    """Whether the path still leads to the file that is open."""
    try:
        return os.path.samestat(os.stat(reader.path), reader.status)
    except FileNotFoundError:
        return False


def _listed(steps: list[int]) -> str:
    if len(steps) > 20:
        return f"{', '.join(map(str, steps[:5]))} ... {', '.join(map(str, steps[-10:]))} ({len(steps)} in all)"
    return ", ".join(map(str, steps))


def sync_folder(path: str) -> None:
    """What was renamed, made or removed in it outlives a power cut from here on."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
