"""Folders of files: what is packed, what is copied, and a new folder that is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence

from commcomp.checkpoint.command_line.distcp import groups
from commcomp.checkpoint.command_line.distcp.files import names_in
from commcomp.checkpoint.command_line.distcp.metadata import DATA
from commcomp.checkpoint.command_line.file_state import PACKED
from commcomp.checkpoint.command_line.snapshots import is_snapshot
from commcomp.checkpoint.container_reader import SnapshotReader
from commcomp.checkpoint.store_files import LOCK, UNFINISHED


def files_below(folder: str) -> list[str]:
    """Relative paths of all files, in order, but for what a store has for itself: its lock, files being written.

    Raises ValueError for what is neither file nor folder.
    """
    found = []
    for place, folders, names in os.walk(folder, onerror=_raise):
        folders.sort()
        if any(is_snapshot(os.path.join(place, name)) for name in names):
            names = [name for name in names if name != LOCK and not name.startswith(UNFINISHED)]
        for name in folders:
            if os.path.islink(os.path.join(place, name)):
                raise ValueError(f"{os.path.join(place, name)} is a link to a folder; replace it by the folder itself")
        for name in sorted(names):
            path = os.path.join(place, name)
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ValueError(f"{path} is no regular file; a packed folder cannot hold it")
            found.append(os.path.relpath(path, folder))
    return found


def _raise(error: OSError) -> None:
    raise error


@contextlib.contextmanager
def new_folder(target: str, like: str) -> Iterator[str]:
    """A folder to fill, with the folders of `like` in it, that becomes `target` at the end; else nothing is left.

    Raises FileExistsError, and ValueError where `target` would lie in `like`.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target} is there already; name another folder, or remove it")
    if os.path.realpath(target).startswith(os.path.join(os.path.realpath(like), "")):
        raise ValueError(f"{target} lies in {like}; name a folder outside of it")
    unfinished = f"{target.rstrip(os.sep)}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    os.makedirs(unfinished)
    try:
        for place, folders, _ in os.walk(like):
            for name in folders:
                os.makedirs(os.path.join(unfinished, os.path.relpath(place, like), name), exist_ok=True)
        yield unfinished
        os.rename(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def copy(source: str, target: str) -> None:
    """A file as it is, its mode and times too."""
    shutil.copy2(source, target)


def packed_with(path: str) -> list[str]:
    """The files that go into one packed file with a file, it among them, the one that gives the name first.

    Those of `.distcp` files whose `.metadata` cannot be read stand alone.
    """
    if path.endswith(DATA):
        with contextlib.suppress(ValueError):
            return [os.path.join(os.path.dirname(path), name) for name in groups.group_of(path).names]
    return [path]


def contents(folder: str) -> dict[str, str]:
    """By the name of each file, not packed, in which file it is found; both relative paths.

    Raises SnapshotError for packed files that cannot be read.
    """
    found = {}
    for name in files_below(folder):
        own = name.removesuffix(PACKED)
        found[own] = name
        if name.endswith(DATA + PACKED):
            with SnapshotReader(os.path.join(folder, name)) as reader:
                origin = reader.header.metadata.get("file")
            parts = origin.get("files") if type(origin) is dict else None
            others = names_in(parts)[1:] if type(parts) is list else []
            found |= {os.path.join(os.path.dirname(name), other): name for other in others}
    return found


def bases_of(relative: str | None, bases: Sequence[str]) -> list[str]:
    """The files of `bases` for one file: those that are files, and in folders those of the same relative path.

    Of unpacked `.distcp` files those that a packed file would have its name of.
    `relative`: in its folder, without the packed ending; None for a file that is packed alone.
    """
    found = []
    for base in bases:
        if not os.path.isdir(base):
            if relative is None:
                found.append(base)
            continue
        if relative is not None:
            there = (os.path.join(base, relative + ending) for ending in ("", PACKED))
            files = filter(os.path.isfile, there)
            found += [path for path in files if not path.endswith(DATA) or groups.leads(path)]
    return found
