"""Inputs that stand for snapshot files whose checksums are right, so that what lies behind them is reached.

One file, or a file and its parent, each as the lengths of header and directory (2 bytes), the length of the payload (4
bytes) and the three of them. In the directory the offset of a block is counted from the first payload.
"""

from __future__ import annotations

import itertools
import json
import struct
import tempfile
import zlib
from pathlib import Path

import xxhash

from commcomp.checkpoint import SnapshotError
from commcomp.checkpoint.chain import SnapshotChain
from commcomp.checkpoint.container import MAGIC, PREFIX, Trailer
from commcomp.checkpoint.container_reader import SnapshotReader
from commcomp.checkpoint.decoder import decode, whole
from commcomp.checkpoint.hashing import state_hash
from commcomp.checkpoint.loading import load_state

REFUSED = "refused"

_LENGTHS = struct.Struct("<HHI")
_MOST_VALUES = 1 << 16


def outcome(data: bytes) -> str:
    """A hash of all that the file holds, or `REFUSED`. Raises what a reader must not raise."""
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        paths = [Path(folder, name) for name in ("file", "parent")]
        for path, content in zip(paths, _files(data) or [b""]):
            path.write_bytes(content)
        steps = itertools.chain(paths, itertools.repeat(paths[1]))
        try:
            with SnapshotChain(0, lambda step: str(next(steps))) as chain:
                if sum(tensor.header.num_values for tensor in chain[0].tensors.values()) > _MOST_VALUES:
                    return "large"  # may take what it declares
                pieces = decode(chain, whole(chain[0]), verify=False)
                load_state(chain, None, 1, verify=False)
        except SnapshotError:
            return REFUSED
    digest = xxhash.xxh3_128()
    for name in sorted(pieces):
        digest.update(name.encode("utf-8", "surrogatepass") + pieces[name].data.tobytes())
    return digest.hexdigest()


_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


def of_files(*paths: str | Path) -> bytes:
    """The input that stands for a snapshot file and, if given, its parent."""
    parts = []
    for path in paths:
        data = Path(path).read_bytes()
        with SnapshotReader(path) as reader:
            _, stored, raw, _ = PREFIX.unpack_from(data)
            header = data[PREFIX.size : PREFIX.size + stored]
            header = zlib.decompress(header) if stored < raw else header
            first, last = PREFIX.size + stored, sum(t.stored_bytes for t in reader.tensors.values())
            tensors = [tensor.to_json() for tensor in reader.tensors.values()]
            parent = reader.parent and reader.parent._asdict()
        for tensor in tensors:
            for block in [tensor["side"], *tensor["chunks"]]:
                block[:] = [block[0] - first, block[1], 0]
        directory = json.dumps({"parent": parent, "state_hash": "", "tensors": tensors}, separators=(",", ":")).encode()
        payload = data[first : first + last]
        parts.append(_LENGTHS.pack(len(header), len(directory), len(payload)) + header + directory + payload)
    return b"".join(parts)


def _files(data: bytes) -> list[bytes]:
    parts = []
    while len(parts) < 2 and len(data) >= _LENGTHS.size:
        lengths = _LENGTHS.unpack_from(data)
        data, part = data[_LENGTHS.size :], []
        for length in lengths:
            part.append(data[:length])
            data = data[length:]
        parts.append(part)
    hashes: str | None = None
    made = []
    for header, text, payload in reversed(parts):
        text, hashes = _repaired(text, payload, PREFIX.size + len(header), hashes)
        made.append(_file(header, text, payload))
    return made[::-1]


def _file(header: bytes, directory: bytes, payload: bytes) -> bytes:
    start = PREFIX.pack(MAGIC, len(header), len(header), zlib.crc32(header)) + header + payload
    sizes = (len(start), len(directory), len(directory), zlib.crc32(directory), zlib.crc32(header), 0)
    trailer = Trailer(*sizes, len(start) + len(directory) + 56)
    return start + directory + trailer.to_bytes()


def _repaired(text: bytes, payload: bytes, first: int, parent_hash: str | None) -> tuple[bytes, str | None]:
    """A directory with right offsets, checksums and hashes where it is near enough to one, and its state hash."""
    try:
        directory = json.loads(text)
        for tensor in directory["tensors"]:
            for block in [tensor["side"], *tensor["chunks"]]:
                offset, length = block[:2]
                block[:] = [first + offset, length, zlib.crc32(payload[offset : offset + length])]
        directory["state_hash"] = state_hash((tensor["name"], tensor["hash"]) for tensor in directory["tensors"])
        if directory["parent"] and parent_hash:
            directory["parent"]["state_hash"] = parent_hash
        return json.dumps(directory).encode(), directory["state_hash"]
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        return text, None
