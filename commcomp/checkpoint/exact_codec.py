"""The plain exact codec: what equals the parent's or an earlier tensor is stored by reference, the rest as it is.

Methods: "raw", whose payload is a byte 0 and the values' bytes, or a byte 1 and these as a zlib stream where that is
smaller; "same", without payload: the bytes of its only input.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from commcomp.checkpoint.coded import (
    CURRENT,
    PREVIOUS,
    CodedTensor,
    HostTensor,
    Input,
    Reference,
    TensorHeader,
    TreeInfo,
)
from commcomp.checkpoint.inflate import inflate
from commcomp.checkpoint.parallel import ordered_map

CHUNK_BYTES = 1 << 20
_STORED, _ZLIB = 0, 1
_SAMPLE_BYTES = 1 << 14
_WORTH_IT = 0.75  # of a chunk's sample; zlib is far slower than a disk, and does little for floats


def decode_raw(
    header: TensorHeader, side: bytes, payload: bytes, start: int, count: int, inputs: Sequence[np.ndarray]
) -> np.ndarray:
    """Method "raw"."""
    num_bytes = count * header.item_bytes
    if not payload:
        raise ValueError("an empty payload; expected its kind in the first byte")
    if payload[0] == _STORED:
        if len(payload) != 1 + num_bytes:
            raise ValueError(f"{len(payload) - 1} bytes of values; expected {num_bytes}")
        return np.frombuffer(payload, np.uint8, offset=1)
    if payload[0] != _ZLIB:
        raise ValueError(f"the payload's first byte is {payload[0]}; expected 0 or 1")
    return np.frombuffer(inflate(memoryview(payload)[1:], num_bytes), np.uint8)


def decode_same(
    header: TensorHeader, side: bytes, payload: bytes, start: int, count: int, inputs: Sequence[np.ndarray]
) -> np.ndarray:
    """Method "same"."""
    if len(inputs) != 1 or payload or side:
        raise ValueError(f"{len(inputs)} inputs and {len(payload)} bytes of payload; expected 1 and 0")
    return inputs[0]


class ExactEncoder:
    """A `SnapshotEncoder` that keeps every bit."""

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads

    def __call__(
        self, tensors: Mapping[str, HostTensor], tree_info: TreeInfo, previous: Reference | None
    ) -> Iterator[CodedTensor]:
        sources = self.sources(tensors, previous)
        for tensor in tensors.values():
            yield self.coded(tensor, sources[tensor.name])

    def sources(self, tensors: Mapping[str, HostTensor], previous: Reference | None) -> dict[str, Input | None]:
        """By name, the parent's tensor or the earlier one that has the same dtype, shape and bytes; None without."""
        hashes = ordered_map(lambda tensor: tensor.hash, tensors.values(), self.threads)
        earlier: dict[str, str] = {}  # hash -> name
        found: dict[str, Input | None] = {}
        for tensor, value in zip(tensors.values(), hashes):
            source = None
            if len(tensor.data) and value in earlier:
                source = Input(CURRENT, earlier[value])
            elif len(tensor.data) and previous is not None and previous.hash_of(tensor.name) == value:
                source = Input(PREVIOUS, tensor.name)
            earlier.setdefault(value, tensor.name)
            found[tensor.name] = source
        return found

    def coded(self, tensor: HostTensor, source: Input | None) -> CodedTensor:
        """One tensor, by reference where there is a source."""
        item_bytes = TensorHeader(tensor.name, tensor.dtype, tensor.shape, "raw", {}, (), 0, None).item_bytes
        num_values = len(tensor.data) // item_bytes
        chunk_values = min(num_values, CHUNK_BYTES // item_bytes)
        method, inputs = ("same", (source,)) if source else ("raw", ())
        raw = _RawChunks(tensor.data, self.threads)
        chunks: Collection[bytes] = [b""] * len(raw) if source else raw
        return CodedTensor(tensor.name, tensor.dtype, tensor.shape, method, {}, inputs, chunk_values, b"", chunks)


class _RawChunks(Collection[bytes]):
    """Payloads of method "raw", each made when it is its turn."""

    def __init__(self, data: np.ndarray, threads: int) -> None:
        self._data, self._starts = data, range(0, len(data), CHUNK_BYTES)
        self._threads = threads if len(self._starts) > 1 else 1

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[bytes]:
        return ordered_map(lambda at: _raw(self._data[at : at + CHUNK_BYTES]), self._starts, self._threads)

    def __contains__(self, payload: object) -> bool:
        return any(other == payload for other in self)


def _raw(data: np.ndarray) -> bytes:
    middle = max(0, (len(data) - _SAMPLE_BYTES) // 2)
    sample = data[middle : middle + _SAMPLE_BYTES]
    if len(zlib.compress(sample, 1)) < _WORTH_IT * len(sample):
        packed = zlib.compress(data, 1)
        if len(packed) < len(data):
            return b"\x01" + packed
    return b"".join((b"\x00", memoryview(data)))
