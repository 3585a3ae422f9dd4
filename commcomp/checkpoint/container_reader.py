"""Reads one snapshot file: header and directory when it is opened, blocks as they are asked for."""

from __future__ import annotations

import os
import threading
import zlib
from functools import cached_property
from typing import Any

from commcomp.checkpoint.coded import TreeInfo
from commcomp.checkpoint.container import (
    FORMAT,
    MAGIC,
    MAX_TEXT_BYTES,
    PREFIX,
    TRAILER,
    FileHeader,
    StoredTensor,
    Trailer,
    read_directory,
    unpack_text,
)
from commcomp.checkpoint.errors import DamagedFileError, SnapshotError
from commcomp.checkpoint.state_tree import paths_of, places
from commcomp.checkpoint.tree_json import from_json


class SnapshotReader:
    """`header`, `tensors` (by name, in decode order), `state_hash`, `parent`, `file_bytes`; `bytes_read` counts.

    `memory`: the file's bytes where they are at hand; `path` is then what errors call it, and nothing is opened.
    Raises FileNotFoundError, and DamagedFileError where the file is not what a writer leaves. Threads may share it.
    """

    def __init__(self, path: str | os.PathLike[str], memory: memoryview | None = None) -> None:
        self.path, self.bytes_read = os.fspath(path), 0
        self._lock, self._memory = threading.Lock(), memory
        self._file = -1 if memory is not None else os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SnapshotReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        file, self._file = getattr(self, "_file", -1), -1
        if file >= 0:
            os.close(file)

    def _open(self) -> None:
        if self._memory is None:
            self.status = os.fstat(self._file)
            self.file_bytes = self.status.st_size
        else:
            self.file_bytes = len(self._memory)
        if self.file_bytes < PREFIX.size + TRAILER.size:
            raise DamagedFileError(self.path, f"{self.file_bytes} bytes, too few for a snapshot")
        magic, stored_bytes, raw_bytes, crc32 = PREFIX.unpack(self._read(0, PREFIX.size))
        if magic != MAGIC:
            raise DamagedFileError(self.path, f"starts with {magic!r}; expected {MAGIC!r}", offset=0)
        end = self.file_bytes - TRAILER.size
        with self._damage_at(end):
            trailer = Trailer.from_bytes(self._read(end, TRAILER.size), self.file_bytes)
        first = PREFIX.size + stored_bytes
        if first > trailer.directory_offset or raw_bytes > MAX_TEXT_BYTES or crc32 != trailer.header_crc32:
            raise DamagedFileError(
                self.path, f"a header of {stored_bytes} bytes ({raw_bytes} raw), crc32 {crc32:#x}", offset=len(MAGIC)
            )
        if (stored_bytes < raw_bytes) != (stored_bytes != raw_bytes):
            raise DamagedFileError(self.path, "a header longer than itself", offset=len(MAGIC))
        node = self._text(PREFIX.size, stored_bytes, raw_bytes, crc32, stored_bytes < raw_bytes)
        if type(node) is dict and type(found := node.get("format")) is int and found > FORMAT:
            raise SnapshotError(f"{self.path} has format {found}; this commcomp reads {FORMAT}: install a newer one")
        with self._damage_at(PREFIX.size):
            self.header = FileHeader.from_json(node)
        at = trailer.directory_offset
        packed, crc32 = bool(trailer.flags), trailer.directory_crc32
        node = self._text(at, trailer.directory_stored, trailer.directory_raw, crc32, packed)
        with self._damage_at(at):
            directory = read_directory(node, first, at, self.header.step)
        self.tensors, self.state_hash, self.parent = directory.tensors, directory.state_hash, directory.parent

    @cached_property
    def names(self) -> list[str]:
        """Of the tensors, in decode order."""
        return list(self.tensors)

    @cached_property
    def position(self) -> dict[str, int]:
        """Of each name in `names`."""
        return {name: number for number, name in enumerate(self.tensors)}

    @cached_property
    def tree_info(self) -> TreeInfo:
        """The state dict around the tensors. Raises DamagedFileError."""
        with self._damage_at(PREFIX.size):
            skeleton = from_json(self.header.tree)
            if {place.name for place in places(skeleton)} != self.tensors.keys():
                raise ValueError("the tree and the directory have different tensors")
            return TreeInfo(self.header.step, skeleton, paths_of(skeleton))

    def side(self, tensor: StoredTensor) -> bytes:
        """A tensor's side data. Raises DamagedFileError."""
        return self._block(tensor, None)

    def chunk(self, tensor: StoredTensor, number: int) -> bytes:
        """The payload of one chunk. Raises DamagedFileError."""
        return self._block(tensor, number)

    def _block(self, tensor: StoredTensor, number: int | None) -> bytes:
        block, name = tensor.side if number is None else tensor.chunks[number], tensor.header.name
        if not block.length and not block.crc32:
            return b""
        data = self._read(block.offset, block.length)
        if len(data) != block.length or zlib.crc32(data) != block.crc32:
            reason = f"crc32 {zlib.crc32(data):#010x} of {len(data)} bytes; expected {block.crc32:#x} of {block.length}"
            raise DamagedFileError(self.path, reason, tensor=name, chunk=number, offset=block.offset)
        return data

    def _text(self, offset: int, stored_bytes: int, raw_bytes: int, crc32: int, is_packed: bool) -> Any:
        data = self._read(offset, stored_bytes)
        if len(data) != stored_bytes or zlib.crc32(data) != crc32:
            raise DamagedFileError(self.path, "the crc32 of header or directory is wrong", offset=offset)
        with self._damage_at(offset):
            return unpack_text(data, raw_bytes, is_packed)

    def _read(self, offset: int, num_bytes: int) -> bytes:
        if self._memory is not None:
            return bytes(self._memory[offset : offset + num_bytes])
        pieces, left = [], num_bytes
        while left:  # one call reads 2 GiB at most
            piece = os.pread(self._file, left, offset)
            if not piece:
                break
            pieces.append(piece)
            offset, left = offset + len(piece), left - len(piece)
        with self._lock:
            self.bytes_read += num_bytes - left
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _damage_at(self, offset: int) -> _Damage:
        return _Damage(self.path, offset)


class _Damage:
    """Makes a ValueError a DamagedFileError at a place."""

    def __init__(self, path: str, offset: int) -> None:
        self._path, self._offset = path, offset

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (ValueError, RecursionError, MemoryError)):
            reason = str(error) or type(error).__name__
            raise DamagedFileError(self._path, reason, offset=self._offset) from error
