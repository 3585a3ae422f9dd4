"""The layout of a snapshot file and what must hold of it; docs/format.md describes it to the byte.

header, payload blocks, directory, trailer. Nothing declared in a file is believed before it was checked against the
size of the file and of what else is declared.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from commcomp.checkpoint.coded import CURRENT, PREVIOUS, Input, TensorHeader
from commcomp.checkpoint.dtypes import item_bytes
from commcomp.checkpoint.hashing import state_hash
from commcomp.checkpoint.inflate import inflate
from commcomp.checkpoint.state_tree import MAX_NAME_BYTES

MAGIC = b"CCSNAP\x00\x01"
FORMAT = 1
PREFIX = struct.Struct("<8sIII")  # magic; header: stored bytes, raw bytes, crc32 of the stored ones
TRAILER = struct.Struct("<QQQIIIQI8s")  # see `Trailer`; then crc32 of all before it and the magic
DIRECTORY_IS_PACKED = 1  # flag

MAX_TEXT_BYTES = 256 << 20
_MOST_TIMES_PACKED = 200  # beyond a MiB: so that a small file cannot take much memory
MAX_DIMS = 64
MAX_STEP = 10**12 - 1
_PACK_FROM = 4 << 10


class Block(NamedTuple):
    """A payload in the file."""

    offset: int
    length: int
    crc32: int


class ParentLink(NamedTuple):
    """The snapshot that a file was coded against."""

    step: int
    state_hash: str


@dataclass(frozen=True)
class FileHeader:
    """What stands in front of a file: `tree` is tree_json's form of the skeleton, `metadata` the user's JSON."""

    step: int
    mode: str
    tree: Any
    metadata: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **vars(self)}

    @classmethod
    def from_json(cls, node: Any) -> FileHeader:
        """Raises ValueError naming what is wrong."""
        fields = _fields(node, "step", "mode", "tree", "metadata", "format")
        step = fields["step"]
        if fields["format"] != FORMAT:
            raise ValueError(f"format {str(fields['format'])[:20]}; expected {FORMAT}")
        if not is_count(step) or step > MAX_STEP:
            raise ValueError(f"step {str(step)[:40]}; expected an integer from 0 to {MAX_STEP}")
        if type(fields["mode"]) is not str or type(fields["metadata"]) is not dict:
            raise ValueError("mode or metadata of the wrong type; expected a string and an object")
        return cls(step, fields["mode"], fields["tree"], fields["metadata"])


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's part of the directory; `hash` is hashing.tensor_hash of what decoding returns."""

    header: TensorHeader
    hash: str
    side: Block
    chunks: Sequence[Block]

    @property
    def stored_bytes(self) -> int:
        return self.side.length + sum(chunk.length for chunk in self.chunks)

    def to_json(self) -> dict[str, Any]:
        header = self.header
        return {
            "name": header.name,
            "dtype": header.dtype,
            "shape": list(header.shape),
            "method": header.method,
            "settings": dict(header.settings),
            "inputs": [[source.snapshot, source.tensor] for source in header.inputs],
            "chunk_values": header.chunk_values,
            "bound": header.bound and dict(header.bound),
            "hash": self.hash,
            "side": list(self.side),
            "chunks": [list(chunk) for chunk in self.chunks],
        }


@dataclass(frozen=True)
class Trailer:
    """The last 56 bytes, without crc32 and magic."""

    directory_offset: int
    directory_stored: int
    directory_raw: int
    directory_crc32: int
    header_crc32: int
    flags: int
    file_bytes: int

    def to_bytes(self) -> bytes:
        fields = struct.pack("<QQQIIIQ", *vars(self).values())
        return fields + struct.pack("<I8s", zlib.crc32(fields), MAGIC)

    @classmethod
    def from_bytes(cls, data: bytes, file_bytes: int) -> Trailer:
        """Raises ValueError naming what is wrong."""
        *fields, crc32, magic = TRAILER.unpack(data)
        if magic != MAGIC:
            raise ValueError(f"ends in {magic!r}; expected {MAGIC!r}: the end is missing, or it is no snapshot")
        if crc32 != zlib.crc32(data[: -struct.calcsize("<I8s")]):
            raise ValueError("the trailer's crc32 is wrong")
        trailer = cls(*fields)
        end = trailer.directory_offset + trailer.directory_stored + TRAILER.size
        if trailer.file_bytes != file_bytes or end != file_bytes:
            raise ValueError(f"{trailer.file_bytes} bytes are declared, {end} described, {file_bytes} there")
        if trailer.directory_raw > MAX_TEXT_BYTES or trailer.flags not in (0, DIRECTORY_IS_PACKED):
            raise ValueError(f"a directory of {trailer.directory_raw} bytes with flags {trailer.flags:#x}")
        if not trailer.flags and trailer.directory_raw != trailer.directory_stored:
            raise ValueError("two different lengths of a directory that is not packed")
        return trailer


def pack_text(value: Any) -> tuple[bytes, int]:
    """JSON as it is stored, packed by zlib if that is worth it, and its raw length.

    Raises ValueError for more than 256 MiB and for NaN or infinity, TypeError for what is no JSON.
    """
    raw = json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
    if len(raw) > MAX_TEXT_BYTES:
        raise ValueError(f"{len(raw)} bytes of JSON; at most {MAX_TEXT_BYTES}: keep large bytes and lists as tensors")
    packed = zlib.compress(raw, 6) if len(raw) > _PACK_FROM else raw
    return (packed if len(packed) < len(raw) <= _most_text(len(packed)) else raw), len(raw)


def _most_text(packed: int) -> int:
    return (1 << 20) + _MOST_TIMES_PACKED * packed


def unpack_text(stored: bytes, raw_bytes: int, is_packed: bool) -> Any:
    """The JSON again. Raises ValueError."""
    if is_packed and raw_bytes > _most_text(len(stored)):
        raise ValueError(f"{raw_bytes} bytes of JSON in {len(stored)}, more than these may hold")
    raw = inflate(stored, raw_bytes) if is_packed else stored
    try:
        return json.loads(raw)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deep") from error


@dataclass(frozen=True)
class Directory:
    """What stands at the end: `tensors` by name in decode order; a parent exactly where one of them has it as input."""

    tensors: dict[str, StoredTensor]
    state_hash: str
    parent: ParentLink | None

    def to_json(self) -> dict[str, Any]:
        tensors = [tensor.to_json() for tensor in self.tensors.values()]
        return {"parent": self.parent and self.parent._asdict(), "state_hash": self.state_hash, "tensors": tensors}


def uses_parent(headers: Iterable[TensorHeader]) -> bool:
    return any(source.snapshot == PREVIOUS for header in headers for source in header.inputs)


def read_directory(node: Any, first: int, end: int, step: int) -> Directory:
    """The directory of a snapshot of `step`. Raises ValueError naming tensor and problem.

    The blocks must fill the bytes from `first` to `end` of the file in order, without gap or overlap.
    """
    fields = _fields(node, "tensors", "state_hash", "parent")
    parent = None
    if fields["parent"] is not None:
        parent = ParentLink(**_fields(fields["parent"], "step", "state_hash"))
        if not is_count(parent.step) or parent.step >= step or not _is_hash(parent.state_hash):
            raise ValueError(f"parent {str(parent)[:100]}; expected an earlier step and 32 hex digits")
    if type(fields["tensors"]) is not list:
        raise ValueError("the directory has no list of tensors")
    tensors: dict[str, StoredTensor] = {}
    for number, item in enumerate(fields["tensors"]):
        try:
            tensor, first = _read_tensor(item, first)
            check_inputs(tensor.header, tensors, parent is not None)
        except (ValueError, OverflowError) as error:
            name = str(item.get("name"))[:200] if type(item) is dict else "?"
            raise ValueError(f"the directory's tensor {number} ({name!r}): {error}") from error
        if tensor.header.name in tensors:
            raise ValueError(f"the directory has two tensors {tensor.header.name[:200]!r}")
        tensors[tensor.header.name] = tensor
    if first != end:
        raise ValueError(f"the blocks end at byte {first}; expected {end}, where the directory starts")
    if fields["state_hash"] != state_hash((name, tensor.hash) for name, tensor in tensors.items()):
        raise ValueError("the state hash is not that of the tensors' hashes")
    if (parent is not None) != uses_parent(tensor.header for tensor in tensors.values()):
        raise ValueError("a parent that no tensor uses")
    return Directory(tensors, fields["state_hash"], parent)


def _read_tensor(item: Any, offset: int) -> tuple[StoredTensor, int]:
    """A tensor whose blocks start at `offset`, and where they end."""
    fields = _fields(item, *_TENSOR_FIELDS)
    hash_of_tensor, side, chunks = fields.pop("hash"), fields.pop("side"), fields.pop("chunks")
    if not _is_hash(hash_of_tensor):
        raise ValueError("a hash that is not 32 hex digits")
    shape, inputs = fields["shape"], fields["inputs"]
    if type(shape) is not list or not all(map(is_count, shape)):
        raise ValueError(f"shape {str(shape)[:100]}")
    if type(inputs) is not list or any(
        type(pair) is not list or len(pair) != 2 or pair[0] not in (PREVIOUS, CURRENT) or type(pair[1]) is not str
        for pair in inputs
    ):
        raise ValueError(f"inputs {str(inputs)[:100]}")
    header = TensorHeader(**{**fields, "shape": tuple(shape), "inputs": tuple(Input(*pair) for pair in inputs)})
    if type(chunks) is not list:
        raise ValueError("no list of chunks")
    check_header(header, len(chunks))
    blocks = []
    for block in [side, *chunks]:
        if type(block) is not list or len(block) != 3 or not all(map(is_count, block)) or block[0] != offset:
            raise ValueError(f"a block {str(block)[:100]}; expected [{offset}, length, crc32]: they follow one another")
        offset += block[1]
        blocks.append(Block(*block))
    return StoredTensor(header, hash_of_tensor, blocks[0], blocks[1:]), offset


_TENSOR_FIELDS = (
    *("name", "dtype", "shape", "method", "settings", "inputs", "chunk_values", "bound"),
    *("hash", "side", "chunks"),
)


def check_header(header: TensorHeader, num_chunks: int) -> None:
    """Raises ValueError where a tensor's fields have wrong types or contradict each other."""
    if type(header.name) is not str or len(header.name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        raise ValueError(f"a name that is no string of at most {MAX_NAME_BYTES} bytes")
    if type(header.dtype) is not str or type(header.method) is not str or type(header.settings) is not dict:
        raise ValueError("dtype, method or settings of the wrong type")
    if header.bound is not None and type(header.bound) is not dict:
        raise ValueError("a bound that is no object")
    if len(header.shape) > MAX_DIMS or math.prod(header.shape) * item_bytes(header.dtype) >= 1 << 63:
        raise ValueError(f"shape {str(header.shape)[:100]}; expected at most {MAX_DIMS} dims and 2^63 bytes")
    values = header.num_values
    if not is_count(header.chunk_values) or not (header.chunk_values > 0) == (values > 0):
        raise ValueError(f"{str(header.chunk_values)[:40]} values a chunk of {values}")
    if num_chunks != header.num_chunks or header.chunk_values > values:
        raise ValueError(f"{num_chunks} chunks of {header.chunk_values} values; the shape has {values}")


def check_inputs(header: TensorHeader, earlier: Mapping[str, StoredTensor], has_parent: bool) -> None:
    """Raises ValueError where an input is not there. Those of the parent are checked when it is open."""
    for source in header.inputs:
        if source.snapshot == PREVIOUS and not has_parent:
            raise ValueError(f"input {source.tensor[:200]!r} of a parent, and there is none")
        if source.snapshot == CURRENT:
            if source.tensor not in earlier:
                raise ValueError(f"input {source.tensor[:200]!r} does not stand before it")
            check_input_size(header, source, earlier[source.tensor].header)


def check_input_size(header: TensorHeader, source: Input, given: TensorHeader) -> None:
    """Raises ValueError if an input has another number of values."""
    if given.num_values != header.num_values:
        raise ValueError(f"input {source.tensor[:200]!r} has {given.num_values} values; expected {header.num_values}")


def _fields(node: Any, *names: str) -> dict[str, Any]:
    if type(node) is not dict or node.keys() != set(names):
        found = sorted(map(str, node))[:20] if type(node) is dict else type(node).__name__
        raise ValueError(f"{str(found)[:300]} where the fields {', '.join(names)} are due")
    return dict(node)


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_hash(value: Any) -> bool:
    return type(value) is str and len(value) == 32 and all(digit in "0123456789abcdef" for digit in value)
