"""The state in a checkpoint file, whatever its kind: what is packed, and what other files are coded against."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from commcomp.checkpoint import weights_only
from commcomp.checkpoint.chain import SnapshotChain
from commcomp.checkpoint.coded import HostTensor, TensorHeader, TreeInfo
from commcomp.checkpoint.command_line import safetensors_file
from commcomp.checkpoint.command_line.distcp import files as distcp_files
from commcomp.checkpoint.command_line.distcp import groups
from commcomp.checkpoint.command_line.distcp.metadata import DATA
from commcomp.checkpoint.container import Block, StoredTensor
from commcomp.checkpoint.container_reader import SnapshotReader
from commcomp.checkpoint.decode_plan import Piece
from commcomp.checkpoint.decoder import decode, whole
from commcomp.checkpoint.dtypes import item_bytes
from commcomp.checkpoint.errors import WrongParentError
from commcomp.checkpoint.hashing import state_hash
from commcomp.checkpoint.host_copy import host_views
from commcomp.checkpoint.parallel import ordered_map
from commcomp.checkpoint.references import MemoryReference
from commcomp.checkpoint.state_tree import TensorPlace, split

PACKED = ".ccsnap"
SAFETENSORS, TORCH, DISTCP = "safetensors", "torch", "distcp"
_KINDS = {".safetensors": SAFETENSORS, ".pt": TORCH, ".pth": TORCH, ".ckpt": TORCH, ".bin": TORCH, DATA: DISTCP}


@dataclass(frozen=True)
class FileState:
    """`origin`: what else a restored file needs, JSON; `stored`: headers and hashes, of packed files at first."""

    path: str
    info: TreeInfo
    tensors: dict[str, HostTensor]
    origin: dict[str, Any]
    stored: dict[str, StoredTensor] = field(default_factory=dict)

    def hashed(self, threads: int) -> FileState:
        """With `stored`."""
        return self if self.stored else replace(self, stored=_stored(self.tensors, threads))

    @property
    def state_hash(self) -> str:
        """Of a state with `stored`."""
        return state_hash((name, tensor.hash) for name, tensor in self.stored.items())

    def reference(self) -> MemoryReference:
        """As what others are coded against; of a state with `stored`."""
        arrays = {name: tensor.data for name, tensor in self.tensors.items()}
        return MemoryReference(self.info.step, self.state_hash, self.info, self.stored, arrays)


def header_of(tensor: HostTensor) -> TensorHeader:
    """A header that says of a tensor what it is, not how it is coded."""
    return TensorHeader(tensor.name, tensor.dtype, tensor.shape, "raw", {}, (), 0, None)


def kind_of(path: str) -> str | None:
    """How a file that is not packed is read, by its name; None for one that holds no tensors."""
    return _KINDS.get(os.path.splitext(path)[1].lower())


def read_state(path: str, bases: Sequence[str], threads: int) -> FileState:
    """The state of a file, packed or not. `bases`: files among which a packed one finds what it was coded against.

    That of a `.distcp` file is the one of all files that are packed with it.
    Raises ValueError or TypeError naming what cannot be read, SnapshotError for packed files, OSError.
    """
    if path.endswith(PACKED):
        with BasedFile(path, bases, threads) as file:
            return file.read()
    kind = kind_of(path)
    if kind == SAFETENSORS:
        text, tensors = safetensors_file.read(path)
        places = {name: TensorPlace(name) for name in tensors}
        info = TreeInfo(0, places, {name: ((name,),) for name in tensors})
        return FileState(path, info, tensors, {"kind": kind, "header": text})
    if kind == TORCH:
        try:
            state = split(weights_only.load(path))
        except ValueError as error:
            raise ValueError(f"{path} cannot be packed: {error}") from error
        info = TreeInfo(0, state.skeleton, state.paths)
        return FileState(path, info, host_views(state.tensors), {"kind": kind})
    if kind == DISTCP:
        info, tensors, origins = distcp_files.read(os.path.dirname(path), groups.group_of(path), threads)
        return FileState(path, info, tensors, {"kind": kind, "files": origins})
    raise ValueError(f"{path}: no checkpoint by its name; expected one of {', '.join(_KINDS)}, {PACKED}, or a folder")


def _stored(tensors: dict[str, HostTensor], threads: int) -> dict[str, StoredTensor]:
    hashes = ordered_map(lambda tensor: tensor.hash, tensors.values(), threads)
    return {
        tensor.name: StoredTensor(header_of(tensor), value, Block(0, 0, 0), ())
        for tensor, value in zip(tensors.values(), hashes)
    }


@dataclass(frozen=True)
class _Parent:
    """What a chain wants to know of a parent that is a state at hand."""

    path: str
    tensors: dict[str, StoredTensor]

    def close(self) -> None:
        pass


class BasedFile(SnapshotChain):
    """A packed file whose parent is one of `bases`, found by its state hash, packed or not."""

    def __init__(self, path: str, bases: Sequence[str], threads: int) -> None:
        super().__init__(0, lambda _: path)
        self._bases = [base for base in bases if os.path.abspath(base) != os.path.abspath(path)]
        self._threads = threads
        self._parent: FileState | None = None

    def __enter__(self) -> BasedFile:
        return self

    def read(self) -> FileState:
        """Decode all of it and check every hash. Raises DamagedFileError, WrongParentError."""
        reader = self[0]
        parent = None
        if reader.parent is not None:
            self[1]
            assert self._parent is not None
            given = self._parent.tensors
            parent = {name: Piece(0, item_bytes(tensor.dtype), tensor.data) for name, tensor in given.items()}
        pieces = decode(self, whole(reader), threads=self._threads, parent=parent)
        tensors = {
            name: HostTensor(name, tensor.header.dtype, tensor.header.shape, pieces[name].data)
            for name, tensor in reader.tensors.items()
        }
        origin = reader.header.metadata.get("file")
        return FileState(reader.path, reader.tree_info, tensors, origin if type(origin) is dict else {}, reader.tensors)

    def _parent_of(self, child: SnapshotReader) -> SnapshotReader:
        link = child.parent
        assert link is not None
        for number, path in enumerate(self._bases):
            if path.endswith(PACKED):
                with SnapshotReader(path) as reader:
                    if reader.state_hash != link.state_hash:
                        continue
            others = self._bases[:number] + self._bases[number + 1 :]
            state = read_state(path, others, self._threads).hashed(self._threads)
            if state.state_hash == link.state_hash:
                self._parent = state
                return cast(SnapshotReader, _Parent(path, state.stored))
        given = f"none of {', '.join(self._bases)} is that" if self._bases else "no base was given"
        raise WrongParentError(
            f"{child.path} was coded against a file with state hash {link.state_hash}; {given}: name it with --base"
        )
