"""Residuals beside a DeepSpeed checkpoint: one snapshot file a rank in the tag's folder, docs/format.md to the byte."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from commcomp.checkpoint.chain import SnapshotChain
from commcomp.checkpoint.codec_registry import encoder_for
from commcomp.checkpoint.coded import TreeInfo
from commcomp.checkpoint.container_reader import SnapshotReader
from commcomp.checkpoint.errors import DamagedFileError, MissingSnapshotError
from commcomp.checkpoint.host_copy import host_views
from commcomp.checkpoint.loading import load_state
from commcomp.checkpoint.saving import HostState, write_state
from commcomp.checkpoint.state_tree import split
from commcomp.checkpoint.store_files import sync_folder
from commcomp.error_feedback import rank_overlap

_MOST_RANKS = 1 << 20
_NAME = re.compile(r"commcomp_rank_(\d+)\.ccsnap")


@dataclass(frozen=True)
class SavedResiduals:
    """What the files of one or more ranks hold. `save`: the same for all files that were saved together."""

    state: dict[str, Tensor]
    save: str
    num_ranks: int


def path_of(folder: str, rank: int) -> str:
    """Of a rank's file."""
    return os.path.join(folder, f"commcomp_rank_{rank}.ccsnap")


def ranks_in(folder: str) -> list[int]:
    """Whose files there are."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(int(match[1]) for match in map(_NAME.fullmatch, os.listdir(folder)) if match)
    return []


def write(folder: str, state: Mapping[str, Tensor], rank: int, num_ranks: int, save: str, threads: int) -> int:
    """Write a rank's file in place of one that is there, and return its bytes; a crash leaves the one that was.

    Raises TypeError naming what is no plain tensor, OSError.
    """
    parts = split(dict(state))
    host = HostState(
        TreeInfo(0, parts.skeleton, parts.paths),
        host_views(parts.tensors),
        {"rank": rank, "num_ranks": num_ranks, "save": save},
        owned=False,
    )
    path = path_of(folder, rank)
    unfinished = os.path.join(folder, f".{os.path.basename(path)}.unfinished")
    with contextlib.suppress(FileNotFoundError):  # of a writer that was killed
        os.unlink(unfinished)
    written = write_state(unfinished, host, "lossless", encoder_for("lossless", threads), None, threads)
    os.replace(unfinished, path)
    sync_folder(folder)
    return written.file_bytes


def remove(folder: str) -> None:
    """Remove the files of an earlier save into the same folder: they are not of the state that it will hold."""
    for rank in ranks_in(folder):
        os.unlink(path_of(folder, rank))


def read(folder: str, rank: int, num_ranks: int, threads: int) -> SavedResiduals | None:
    """What rank `rank` of `num_ranks` goes on with: its own file's, or of another number of ranks those that it needs.

    None where the folder has no such files. Raises DamagedFileError, MissingSnapshotError naming a file that is not
    there.
    """
    there = ranks_in(folder)
    if not there:
        return None
    first = _read_file(folder, rank if rank in there else there[0], threads)
    if first.num_ranks == num_ranks and rank in there:
        return first
    old = [other for other in range(first.num_ranks) if rank_overlap(other, first.num_ranks, rank, num_ranks)]
    merged: dict[str, Tensor] = {}
    for other in old:
        if other not in there:
            raise MissingSnapshotError(
                f"{path_of(folder, other)} is missing; it was saved on {first.num_ranks} ranks, each of which wrote a "
                "file: put it back"
            )
        saved = _read_file(folder, other, threads)
        if (saved.save, saved.num_ranks) != (first.save, first.num_ranks):
            raise DamagedFileError(path_of(folder, other), "is of another save than the files beside it")
        merged.update(saved.state)
    return SavedResiduals(merged, first.save, first.num_ranks)


def _read_file(folder: str, rank: int, threads: int) -> SavedResiduals:
    path = path_of(folder, rank)
    with SnapshotReader(path) as reader:
        state: Any = load_state(SnapshotChain.alone(reader), None, threads, verify=True) if reader.tensors else {}
        about = reader.header.metadata
    num_ranks: Any = about.get("num_ranks")
    save: Any = about.get("save")
    known = type(num_ranks) is int and type(save) is str
    if not known or about.get("rank") != rank or not rank < num_ranks <= _MOST_RANKS:
        raise DamagedFileError(path, f"says that it is of {str(about)[:200]}; expected rank {rank}")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DamagedFileError(path, "holds other things than tensors by name")
    return SavedResiduals(state, save, num_ranks)
