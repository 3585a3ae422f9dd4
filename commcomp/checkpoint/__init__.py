"""Snapshots of a training state on disk, each coded against the one before; needs the package xxhash."""

from typing import TYPE_CHECKING, Any

from commcomp.checkpoint.errors import (
    DamagedFileError,
    MissingSnapshotError,
    SnapshotError,
    StoreLockedError,
    WrongParentError,
)
from commcomp.checkpoint.store import SnapshotStore

if TYPE_CHECKING:
    from commcomp.checkpoint.distributed.reader import DeltaStorageReader
    from commcomp.checkpoint.distributed.run_folder import RunFolder
    from commcomp.checkpoint.distributed.writer import DeltaStorageWriter

__all__ = [
    "DamagedFileError",
    "DeltaStorageReader",
    "DeltaStorageWriter",
    "MissingSnapshotError",
    "RunFolder",
    "SnapshotError",
    "SnapshotStore",
    "StoreLockedError",
    "WrongParentError",
]


def __getattr__(name: str) -> Any:
    """torch.distributed.checkpoint takes a second to import: only who needs it waits."""
    if name == "DeltaStorageReader":
        from commcomp.checkpoint.distributed.reader import DeltaStorageReader

        return DeltaStorageReader
    if name == "DeltaStorageWriter":
        from commcomp.checkpoint.distributed.writer import DeltaStorageWriter

        return DeltaStorageWriter
    if name == "RunFolder":
        from commcomp.checkpoint.distributed.run_folder import RunFolder

        return RunFolder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
