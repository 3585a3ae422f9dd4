"""Removing snapshots without breaking those that stay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from commcomp.checkpoint.coded import SnapshotEncoder
from commcomp.checkpoint.decoder import decode, whole
from commcomp.checkpoint.errors import MissingSnapshotError
from commcomp.checkpoint.saving import write_alone
from commcomp.checkpoint.store_files import StoreFiles, in_words_of_the_store


@dataclass(frozen=True)
class PruneReport:
    """`removed` steps, and those that were coded anew since they depended on one of them."""

    removed: tuple[int, ...]
    recoded: tuple[int, ...]


class _Steps(Protocol):
    @property
    def path(self) -> str: ...

    def steps(self) -> list[int]: ...


def steps_to_remove(files: _Steps, keep: int | None, steps: Iterable[int] | None) -> set[int]:
    """All but the newest `keep`, or `steps`. Raises ValueError, MissingSnapshotError."""
    there = files.steps()
    if (keep is None) == (steps is None):
        raise ValueError("prune takes either keep=<how many> or steps=<those to remove>")
    if keep is not None:
        if keep < 1:
            raise ValueError(f"keep={keep}; expected at least 1")
        return set(there[:-keep])
    asked = set(steps or ())
    if missing := sorted(asked - set(there)):
        raise MissingSnapshotError(f"{files.path} has no snapshot of step {missing[0]}; steps() lists those it has")
    return asked


def remove(files: StoreFiles, removed: set[int], encoder: SnapshotEncoder, threads: int) -> PruneReport:
    """Code the children of what goes anew, then let it go; the caller holds the lock.

    At any moment every snapshot in the store can be loaded. Raises DamagedFileError, WrongParentError (a child that
    cannot be read: nothing was removed), OSError (disk full).
    """
    recoded = sorted(files.children_of(removed))
    for step in recoded:
        with files.open(step) as chain:
            pieces = decode(chain, whole(chain[0]), threads=threads)
            arrays = {name: piece.data for name, piece in pieces.items()}
            try:
                files.place(write_alone(files, chain[0], arrays, encoder, threads), step)
            except OSError as error:
                raise in_words_of_the_store(error, files.path, step) from error
            finally:
                files.remove_unfinished()
    if removed:
        files.remove(removed)
    return PruneReport(tuple(sorted(removed)), tuple(recoded))
