"""The folder of a run: one folder a checkpoint, in it one snapshot file a rank and the description that makes it count.

docs/format_files.md has the layout.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable

from commcomp.checkpoint.distributed.description import Description, from_text, to_text
from commcomp.checkpoint.errors import DamagedFileError, MissingSnapshotError, SnapshotError
from commcomp.checkpoint.pruning import steps_to_remove
from commcomp.checkpoint.store_files import require_step, sync_folder
from commcomp.complaint import warn

_FOLDER = re.compile(r"step-(\d{12})")
_OURS = re.compile(r"rank-\d{5,}\.ccsnap|\.tmp-[\w-]+")
_DESCRIPTION = "checkpoint.json"
_MAX_DESCRIPTION_BYTES = 1 << 30


class RunFolder:
    """The checkpoints of one run, as DeltaStorageWriter leaves them: which there are, and removing old ones.

    A checkpoint is there when its description is: that is written last. `path` need not exist yet.
    """

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
        return [step for step in self._begun() if os.path.exists(self.description_file(step))]

    def newest(self) -> int:
        """Raises MissingSnapshotError."""
        steps = self.steps()
        if not steps:
            raise MissingSnapshotError(f"{self.path} has no complete checkpoint yet")
        return steps[-1]

    def prune(self, *, keep: int | None = None, steps: Iterable[int] | None = None) -> tuple[int, ...]:
        """Remove all checkpoints but the newest `keep`, or those of `steps`, except what one that stays needs.

        To be called on one rank while nothing is saved or loaded. A folder goes with all that lies in it; so do those
        that a crash left incomplete, before the newest complete one. Where it cannot be read what a checkpoint needs,
        all before it stay, with a warning. Returns the steps that went, rising.

        Raises ValueError without exactly one of the two, MissingSnapshotError for a step that is not there, OSError.
        """
        there = self.steps()
        unwanted = steps_to_remove(self, keep, None if steps is None else map(require_step, steps))
        removed = sorted(unwanted - self._needed_by(set(there) - unwanted, there))
        incomplete = [step for step in self._begun() if step < max(there, default=0) and self._is_incomplete(step)]
        for step in reversed(removed):  # newest first: whatever is left after a crash has its parents
            os.unlink(self.description_file(step))
            sync_folder(self.folder(step))  # from here on it counts no more
            shutil.rmtree(self.folder(step))
        for step in incomplete:
            shutil.rmtree(self.folder(step))
        if removed or incomplete:
            sync_folder(self.path)
        return tuple(removed)

    def begin(self, step: int) -> None:
        """Make the folder of a new checkpoint, and clear away what a save that did not end has left there.

        Raises SnapshotError where that checkpoint is complete already.
        """
        folder = self.folder(step)
        if os.path.exists(self.description_file(step)):
            raise SnapshotError(
                f"{folder} has a complete checkpoint; save under another step, or remove it and the later ones, which "
                "may need it: RunFolder(...).prune(steps=...)"
            )
        os.makedirs(folder, exist_ok=True)
        for name in os.listdir(folder):
            if _OURS.fullmatch(name):
                os.unlink(os.path.join(folder, name))

    def place(self, unfinished: str, path: str) -> None:
        """Give a complete, fsynced file its name."""
        os.rename(unfinished, path)
        sync_folder(os.path.dirname(path))

    def commit(self, description: Description) -> None:
        """From here on the checkpoint is there. Raises OSError where the disk is full: then it is not."""
        path = self.unfinished_file(description.step)
        try:
            with open(path, "xb") as file:
                file.write(to_text(description))
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self.path)
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

    def _begun(self) -> list[int]:
        """Of all folders, rising, complete or not."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for match in map(_FOLDER.fullmatch, names) if match)

    def _is_incomplete(self, step: int) -> bool:
        """Surely: an error of the file system is raised rather than taken for a description that is not there."""
        try:
            os.stat(self.description_file(step))
        except FileNotFoundError:
            return True
        return False

    def _needed_by(self, stay: Iterable[int], there: list[int]) -> set[int]:
        """`stay`, and all that a load of these opens."""
        needed: set[int] = set()
        for newest in stay:
            step: int | None = newest
            while step is not None and step not in needed:
                needed.add(step)
                step = self._parent_of(step, there, needed)
        return needed

    def _parent_of(self, step: int, there: list[int], needed: set[int]) -> int | None:
        """The checkpoint that this one was coded against; where that is not known, all before it become needed."""
        try:
            return self.read(step).parent
        except SnapshotError as error:
            warn(f"checkpoints before step {step} are not removed, since it may need them: {error}")
            needed.update(earlier for earlier in there if earlier < step)
            return None
