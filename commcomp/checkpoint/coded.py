"""What passes between the container and the codecs.

Values are raw little-endian bytes in flat uint8 arrays, so that bfloat16 and float8 need no dtype of numpy's.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np

from commcomp.checkpoint.dtypes import item_bytes
from commcomp.checkpoint.hashing import tensor_hash

PREVIOUS, CURRENT = "previous", "current"


@dataclass(frozen=True)
class Input:
    """One array that a chunk's decoder needs: the same range of values of another tensor, with equally many values."""

    snapshot: str  # PREVIOUS: the parent snapshot; CURRENT: this one, earlier in decode order
    tensor: str


@dataclass(frozen=True)
class TensorHeader:
    """What is declared about a stored tensor; decoders get it."""

    name: str
    dtype: str  # as dtypes.TORCH_DTYPES names it
    shape: tuple[int, ...]
    method: str  # key of codec_registry.decoders
    settings: Mapping[str, Any]  # JSON: what the method needs for decoding
    inputs: tuple[Input, ...]
    chunk_values: int  # values a chunk, the last one may have fewer; 0 without values
    bound: Mapping[str, Any] | None  # JSON: the declared error bound; None: bit-exact

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        return item_bytes(self.dtype)

    @property
    def num_bytes(self) -> int:
        return self.num_values * self.item_bytes

    @property
    def num_chunks(self) -> int:
        return -(-self.num_values // self.chunk_values) if self.chunk_values else 0


@dataclass(frozen=True)
class CodedTensor:
    """One tensor as an encoder hands it to the container; the first eight fields as in `TensorHeader`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    method: str
    settings: Mapping[str, Any]
    inputs: tuple[Input, ...]
    chunk_values: int
    side: bytes  # payload of the whole tensor: tables, factors; often empty
    chunks: Collection[bytes]  # payload of each chunk, perhaps made as it is asked for
    bound: Mapping[str, Any] | None = None
    reconstruction: np.ndarray | None = None  # uint8, flat: what decoding returns; None: exactly what was given

    @property
    def header(self) -> TensorHeader:
        return TensorHeader(
            self.name,
            self.dtype,
            self.shape,
            self.method,
            self.settings,
            self.inputs,
            self.chunk_values,
            self.bound,
        )


@dataclass(frozen=True)
class HostTensor:
    """A tensor of the state that is to be coded: `data` holds its raw bytes (uint8, flat) and must not be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    @cached_property
    def hash(self) -> str:
        """`hashing.tensor_hash`, computed once."""
        return tensor_hash(self.dtype, self.shape, self.data)


@dataclass(frozen=True)
class TreeInfo:
    """The state dict around the tensors: what stands where.

    `skeleton`: the state dict with a `state_tree.TensorPlace` instead of each tensor and array; `paths`: of each
    tensor's name the places where it stands, each a tuple of keys and list indices.
    """

    step: int
    skeleton: Any
    paths: Mapping[str, tuple[tuple[Any, ...], ...]]


class SideData(bytes):
    """A tensor's side data, with what its decoder made of them: they are unpacked once for all chunks."""

    unpacked: Any = None


class ChunkDecoder(Protocol):
    """Decodes one chunk; the codec registry maps methods to these. Called from several threads at once."""

    def __call__(
        self,
        header: TensorHeader,
        side: bytes,
        payload: bytes,
        start: int,
        count: int,
        inputs: Sequence[np.ndarray],
    ) -> np.ndarray:
        """Raw bytes (uint8, flat) of the values [start, start + count); `inputs`: those of each of header.inputs.

        Raises ValueError with a reason on damage; the container adds file, tensor, chunk and offset.
        """


class Reference(Protocol):
    """The parent snapshot as an encoder sees it: what decoding it returns."""

    @property
    def step(self) -> int: ...

    @property
    def state_hash(self) -> str: ...

    @property
    def tree_info(self) -> TreeInfo: ...

    def names(self) -> Iterable[str]: ...

    def header(self, name: str) -> TensorHeader | None:
        """What is declared about a tensor; None if it has none of that name."""

    def hash_of(self, name: str) -> str | None:
        """`hashing.tensor_hash` of a tensor; None if it has none of that name."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Raw bytes (uint8, flat) of the values [start, stop); not to be written."""

    def release(self, name: str) -> np.ndarray | None:
        """The tensor is not read again; its memory (uint8, flat), to be written at will, where it has such."""


class SnapshotEncoder(Protocol):
    """Codes a state, tensor by tensor, in decode order: an Input of CURRENT names a tensor yielded before."""

    def __call__(
        self, tensors: Mapping[str, HostTensor], tree_info: TreeInfo, previous: Reference | None
    ) -> Iterator[CodedTensor]: ...


@runtime_checkable
class ComparingEncoder(SnapshotEncoder, Protocol):
    """One that wants to see an earlier snapshot even where none of it may be used as an input."""

    def keyframe(
        self, tensors: Mapping[str, HostTensor], tree_info: TreeInfo, earlier: Reference
    ) -> Iterator[CodedTensor]:
        """As a call without parent."""
