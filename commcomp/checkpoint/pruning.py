"""Removing snapshots without breaking those that stay."""

from __future__ import annotations

import os
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
    """`removed` steps, and those that were coded anew since they depended on one of them.

    `kept`: steps that were to go, but that others need, and those coded anew would take more than all of them.
    """

    removed: tuple[int, ...]
    recoded: tuple[int, ...]
    kept: tuple[int, ...] = ()


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
    """Code the children of what goes anew, where that saves bytes, then let it go; the caller holds the lock.

    At any moment every snapshot in the store can be loaded. Raises DamagedFileError, WrongParentError (a child that
    cannot be read: nothing was removed), OSError (disk full).
    """
    recoded, kept = [], set[int]()
    for step in sorted(files.children_of(removed)):
        with files.open(step) as chain:
            needed = [reader for reader in chain.open_all()[1:] if reader.header.step in removed]
            pieces = decode(chain, whole(chain[0]), threads=threads)
            arrays = {name: piece.data for name, piece in pieces.items()}
            try:
                alone = write_alone(files, chain[0], arrays, encoder, threads)
                # A lossy snapshot, exact without its parent, takes many times what it did.
                if os.path.getsize(alone) > chain[0].file_bytes + sum(reader.file_bytes for reader in needed):
                    kept |= {reader.header.step for reader in needed}
                else:
                    files.place(alone, step)
                    recoded.append(step)
            except OSError as error:
                raise in_words_of_the_store(error, files.path, step) from error
            finally:
                files.remove_unfinished()
    gone = removed - kept
    if gone:
        files.remove(gone)
    return PruneReport(tuple(sorted(gone)), tuple(recoded), tuple(sorted(kept)))
