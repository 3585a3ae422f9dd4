"""The folder of a run: one folder a checkpoint, in it one snapshot file a rank and the description that makes it count.

docs/format_files.md has the layout.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets

from commcomp.checkpoint.distributed.description import Description, from_text, to_text
from commcomp.checkpoint.errors import DamagedFileError, MissingSnapshotError, SnapshotError

_FOLDER = re.compile(r"step-(\d{12})")
_OURS = re.compile(r"rank-\d{5,}\.ccsnap|\.tmp-[\w-]+")
_DESCRIPTION = "checkpoint.json"
_MAX_DESCRIPTION_BYTES = 1 << 30


class RunFolder:
    """A checkpoint is there when its description is: that is written last."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)

    def folder(self, step: int) -> str:
        return os.path.join(self.path, f"step-{step:012d}")

    def rank_file(self, step: int, rank: int) -> str:
        return os.path.join(self.folder(step), f"rank-{rank:05d}.ccsnap")

    def description_file(self, step: int) -> str:
        return os.path.join(self.folder(step), _DESCRIPTION)

    def unfinished_file(self, step: int) -> str:
        """A new name for what is being written into a checkpoint's folder."""
        return os.path.join(self.folder(step), f".tmp-{os.getpid()}-{secrets.token_hex(4)}")

    def steps(self) -> list[int]:
        """Of the complete checkpoints, rising."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return []
        steps = sorted(int(match[1]) for match in map(_FOLDER.fullmatch, names) if match)
        return [step for step in steps if os.path.exists(self.description_file(step))]

    def newest(self) -> int:
        """Raises MissingSnapshotError."""
        steps = self.steps()
        if not steps:
            raise MissingSnapshotError(f"{self.path} has no complete checkpoint yet")
        return steps[-1]

    def begin(self, step: int) -> None:
        """Make the folder of a new checkpoint, and clear away what a save that did not end has left there.

        Raises SnapshotError where that checkpoint is complete already.
        """
        folder = self.folder(step)
        if os.path.exists(self.description_file(step)):
            raise SnapshotError(
                f"{folder} has a complete checkpoint; save under another step, or remove that folder, and with it the "
                "later ones, which may need it"
            )
        os.makedirs(folder, exist_ok=True)
        for name in os.listdir(folder):
            if _OURS.fullmatch(name):
                os.unlink(os.path.join(folder, name))

    def place(self, unfinished: str, path: str) -> None:
        """Give a complete, fsynced file its name."""
        os.rename(unfinished, path)
        _sync(os.path.dirname(path))

    def commit(self, description: Description) -> None:
        """From here on the checkpoint is there. Raises OSError where the disk is full: then it is not."""
        path = self.unfinished_file(description.step)
        try:
            with open(path, "xb") as file:
                file.write(to_text(description))
                file.flush()
                os.fsync(file.fileno())
            _sync(self.path)
            self.place(path, self.description_file(description.step))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def read(self, step: int) -> Description:
        """Raises MissingSnapshotError naming the steps there are, DamagedFileError."""
        path = self.description_file(step)
        try:
            with open(path, "rb") as file:
                num_bytes = os.fstat(file.fileno()).st_size
                if num_bytes > _MAX_DESCRIPTION_BYTES:
                    raise DamagedFileError(path, f"{num_bytes} bytes; expected at most {_MAX_DESCRIPTION_BYTES}")
                text = file.read(num_bytes)
        except FileNotFoundError as error:
            there = ", ".join(map(str, self.steps()[-10:])) or "none"
            raise MissingSnapshotError(
                f"{self.path} has no complete checkpoint of step {step}; the newest there are: {there}"
            ) from error
        try:
            found = from_text(text)
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            raise DamagedFileError(path, str(error) or type(error).__name__) from error
        if found.step != step:
            raise DamagedFileError(path, f"describes step {found.step}; the folder's name says {step}: it was renamed")
        return found


def _sync(folder: str) -> None:
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
