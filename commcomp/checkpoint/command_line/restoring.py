"""The files that a packed one was made of, again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import torch

from commcomp.checkpoint.command_line import safetensors_file
from commcomp.checkpoint.command_line.distcp import files as distcp_files
from commcomp.checkpoint.command_line.file_state import DISTCP, SAFETENSORS, TORCH, FileState
from commcomp.checkpoint.errors import DamagedFileError, SnapshotError
from commcomp.checkpoint.hashing import bytes_hash
from commcomp.checkpoint.host_copy import as_array, as_tensor
from commcomp.checkpoint.state_tree import TensorPlace, join


@dataclass(frozen=True)
class RestoredFile:
    """`name`: its own, "" where it is not kept; `due`: the hash that it had, where that was kept."""

    write: Callable[[BinaryIO], object]
    hash: str
    """Of its bytes; "" of a file of torch, which is written anew."""
    name: str = ""
    due: Any = None


def files_of(state: FileState, threads: int) -> list[RestoredFile]:
    """At least one; those of a state that is not packed are the ones that it was read from.

    Raises SnapshotError where the state is not of a packed file, ValueError where it does not say what it is of.
    """
    kind, origin = state.origin.get("kind"), state.origin
    arrays = {name: tensor.data for name, tensor in state.tensors.items()}
    if kind == TORCH:
        return [RestoredFile(lambda file: torch.save(_state_dict(state), file), "")]
    if kind == SAFETENSORS and type(origin.get("header")) is str:
        return [_of_pieces(partial(safetensors_file.pieces, origin["header"], arrays), "", origin)]
    if kind == DISTCP:
        made = distcp_files.restored(origin.get("files"), arrays, threads)
        return [_of_pieces(file.pieces, name, part) for (name, file), part in zip(made.items(), origin["files"])]
    raise SnapshotError(
        f"{state.path} was not made by commcomp ckpt pack; commcomp.checkpoint.SnapshotStore reads snapshots of a store"
    )


def _of_pieces(
    pieces: Callable[[], Iterable[bytes | np.ndarray]], name: str, description: Mapping[str, Any]
) -> RestoredFile:
    return RestoredFile(lambda file: file.writelines(pieces()), bytes_hash(pieces()), name, description.get("hash"))


def with_hashes(state: FileState, threads: int) -> dict[str, Any]:
    """The origin of a state that will be kept exactly, with the hashes of its files."""
    if state.origin["kind"] == TORCH:
        return state.origin
    hashes = [file.hash for file in files_of(state, threads)]
    if state.origin["kind"] == SAFETENSORS:
        return {**state.origin, "hash": hashes[0]}
    parts = [{**part, "hash": value} for part, value in zip(state.origin["files"], hashes)]
    return {**state.origin, "files": parts}


def checked_files_of(state: FileState, threads: int) -> list[RestoredFile]:
    """Those of a packed file. Raises DamagedFileError where they are not those that it was made of."""
    try:
        files = files_of(state, threads)
    except ValueError as error:
        raise DamagedFileError(state.path, str(error)) from error
    for file in files:
        if file.due is not None and file.due != file.hash:
            what = f"{file.name or 'the restored file'} has hash {file.hash}; expected {str(file.due)[:40]}"
            raise DamagedFileError(state.path, what)
    return files


def _state_dict(state: FileState) -> object:
    made: dict[TensorPlace, object] = {}

    def make(place: TensorPlace) -> object:
        if place not in made:
            header, data = state.stored[place.name].header, state.tensors[place.name].data
            made[place] = as_array(header, data) if place.is_array else as_tensor(header, data)
        return made[place]

    return join(state.info.skeleton, make)
