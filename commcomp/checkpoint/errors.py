"""What can go wrong with snapshots; each message names the file, the tensor and the place, and the way out."""

from __future__ import annotations

import os


class SnapshotError(Exception):
    """Something about a snapshot or its store; the others below are kinds of it."""


class DamagedFileError(SnapshotError):
    """A snapshot file does not hold what it declares.

    Attributes: `path`, and where known `tensor` (its name), `chunk` (its number, or None for the side data) and
    `offset` (bytes from the start of the file).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        reason: str,
        *,
        tensor: str | None = None,
        chunk: int | None = None,
        offset: int | None = None,
    ) -> None:
        place = [os.fspath(path)]
        if tensor is not None:
            place.append(f"tensor {shown(tensor)}")
        if chunk is not None:
            place.append(f"chunk {chunk}")
        if offset is not None:
            place.append(f"at byte {offset}")
        super().__init__(
            f"{', '.join(place)}: {reason}; the file is damaged: restore it from a copy, or remove it and load another "
            "step"
        )
        self.path, self.tensor, self.chunk, self.offset = os.fspath(path), tensor, chunk, offset


class WrongParentError(SnapshotError):
    """The snapshot that a file was coded against is missing, or is not the one that it was coded against."""


class MissingSnapshotError(SnapshotError, LookupError):
    """There is no snapshot of that step, or no tensor of that name."""


class StoreLockedError(SnapshotError):
    """Another writer holds the store."""


def shown(name: str, limit: int = 200) -> str:
    """A name as an error message shows it: quoted, and cut in the middle where it is long."""
    if len(name) > limit:
        name = f"{name[: limit // 2]}...{name[-limit // 2 :]}"
    return repr(name)
