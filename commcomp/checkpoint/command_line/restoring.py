"""The files that a packed one was made of, again."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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
    """`name`: its own, "" where it is not kept; `description`: its part of the origin."""

    state: FileState
    name: str = ""
    description: Mapping[str, Any] = field(default_factory=dict)
    new_crcs: Mapping[str, int] = field(default_factory=dict)

    def write(self, file: BinaryIO) -> None:
        if self.state.origin["kind"] == TORCH:
            torch.save(_state_dict(self.state), file)
            return
        for piece in self._pieces():
            file.write(piece)

    @property
    def hash(self) -> str:
        """Of its bytes; not of a file of torch. Raises ValueError where description and tensors do not fit."""
        return bytes_hash(self._pieces())

    def _pieces(self) -> Iterable[bytes | np.ndarray]:
        arrays = {name: tensor.data for name, tensor in self.state.tensors.items()}
        if self.state.origin["kind"] == SAFETENSORS:
            return safetensors_file.pieces(self.state.origin["header"], arrays)
        return distcp_files.pieces(self.description, arrays, self.new_crcs)


def files_of(state: FileState) -> list[RestoredFile]:
    """At least one; those of a state that is not packed are the ones that it was read from.

    Raises SnapshotError where the state is not of a packed file, ValueError where it does not say what it is of.
    """
    kind, origin = state.origin.get("kind"), state.origin
    if kind == TORCH:
        return [RestoredFile(state)]
    if kind == SAFETENSORS and type(origin.get("header")) is str:
        return [RestoredFile(state, description=origin)]
    if kind == DISTCP:
        lossy = [name for name, tensor in state.stored.items() if tensor.header.bound is not None]
        crcs = {name: zlib.crc32(state.tensors[name].data) for name in lossy}
        names = distcp_files.names_in(origin.get("files"))
        return [RestoredFile(state, name, part, crcs) for name, part in zip(names, origin["files"])]
    raise SnapshotError(
        f"{state.path} was not made by commcomp ckpt pack; commcomp.checkpoint.SnapshotStore reads snapshots of a store"
    )


def with_hashes(state: FileState) -> dict[str, Any]:
    """The origin of a state that will be kept exactly, with the hashes of its files."""
    if state.origin["kind"] == SAFETENSORS:
        return {**state.origin, "hash": files_of(state)[0].hash}
    if state.origin["kind"] == DISTCP:
        return {**state.origin, "files": [{**file.description, "hash": file.hash} for file in files_of(state)]}
    return state.origin


def check(state: FileState) -> None:
    """Raise DamagedFileError where the files of a packed state are not those that it was made of."""
    try:
        for file in files_of(state):
            if state.origin["kind"] == TORCH:
                continue
            found = file.hash
            if "hash" in file.description and file.description["hash"] != found:
                what = f"{file.name or 'the restored file'} has hash {found}"
                raise ValueError(f"{what}; expected {str(file.description['hash'])[:40]}")
    except ValueError as error:
        raise DamagedFileError(state.path, str(error)) from error


def _state_dict(state: FileState) -> object:
    made: dict[TensorPlace, object] = {}

    def make(place: TensorPlace) -> object:
        if place not in made:
            header, data = state.stored[place.name].header, state.tensors[place.name].data
            made[place] = as_array(header, data) if place.is_array else as_tensor(header, data)
        return made[place]

    return join(state.info.skeleton, make)
