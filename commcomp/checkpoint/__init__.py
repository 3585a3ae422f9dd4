"""Snapshots of a training state on disk, each coded against the one before; needs the package xxhash."""

from commcomp.checkpoint.errors import (
    DamagedFileError,
    MissingSnapshotError,
    SnapshotError,
    StoreLockedError,
    WrongParentError,
)
from commcomp.checkpoint.store import SnapshotStore

__all__ = [
    "DamagedFileError",
    "MissingSnapshotError",
    "SnapshotError",
    "SnapshotStore",
    "StoreLockedError",
    "WrongParentError",
]
