"""Writes one snapshot file, block after block."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from commcomp.checkpoint.coded import CodedTensor, HostTensor, TensorHeader
from commcomp.checkpoint.container import (
    DIRECTORY_IS_PACKED,
    MAGIC,
    PREFIX,
    TRAILER,
    Block,
    Directory,
    FileHeader,
    ParentLink,
    StoredTensor,
    Trailer,
    check_header,
    check_inputs,
    pack_text,
    uses_parent,
)
from commcomp.checkpoint.errors import SnapshotError, shown
from commcomp.checkpoint.hashing import state_hash, tensor_hash

Result = TypeVar("Result")

_WRITE_BUFFER = 1 << 20
_MAX_PENDING_BYTES = 16 << 20  # payloads and values are held until their checksums are there
_MAX_PENDING = 100


class SnapshotWriter:
    """`add` every tensor in decode order, then `finish`; leaving the `with` block otherwise removes the file.

    `parent` may be used as input, and is named in the file if it is. Hashes and checksums run on `threads` threads
    beside the encoder. `sync`: have the disk keep the file; not where it is only copied into another one.
    Raises OSError where the disk is full.
    """

    def __init__(
        self,
        path: str,
        header: FileHeader,
        parent: ParentLink | None = None,
        threads: int = 1,
        *,
        sync: bool = True,
    ) -> None:
        self.path, self._parent, self._sync = path, parent, sync
        self.tensors: dict[str, StoredTensor] = {}
        self.state_hash, self.file_bytes = "", 0
        self.parent: ParentLink | None = None
        self._checked: dict[str, Future[StoredTensor]] = {}
        self._pending: deque[tuple[int, Future[Any]]] = deque()  # bytes held
        self._pending_bytes = 0
        self._headers: dict[str, TensorHeader] = {}
        self._pool = ThreadPoolExecutor(threads, "commcomp-checksum") if threads > 1 else None
        text, raw_bytes = pack_text(header.to_json())
        self._header_crc32 = zlib.crc32(text)
        self._file = open(path, "xb", buffering=_WRITE_BUFFER)  # noqa: SIM115
        self._offset = 0
        self._put(PREFIX.pack(MAGIC, len(text), raw_bytes, self._header_crc32) + text)

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if not self.file_bytes:
            with contextlib.suppress(OSError):  # closing writes what is buffered, which may fail once more
                self._file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)

    def add(self, coded: CodedTensor, given: HostTensor) -> None:
        """`given`: what the encoder got; its bytes are not written while the writer is open.

        Raises SnapshotError where the encoder breaks its word.
        """
        header, values = coded.header, given.data if coded.reconstruction is None else coded.reconstruction
        try:
            if (header.dtype, tuple(header.shape)) != (given.dtype, given.shape):
                raise ValueError(f"as {header.dtype}{list(header.shape)}; it was {given.dtype}{list(given.shape)}")
            check_header(header, len(coded.chunks))
            if header.name in self._headers:
                raise ValueError("it was coded before")
            earlier = {s.tensor: self._stored(s.tensor) for s in header.inputs if s.tensor in self._headers}
            check_inputs(header, earlier, self._parent is not None)
            if values.dtype != np.uint8 or values.shape != (header.num_bytes,):
                raise ValueError(f"{values.dtype}{list(values.shape)} of values; expected uint8 [{header.num_bytes}]")
        except ValueError as error:
            raise SnapshotError(f"the encoder coded tensor {shown(header.name)} wrongly: {error}") from error
        self._headers[header.name] = header
        is_exact = coded.reconstruction is None
        places, crcs = [], []
        for payload in chain([coded.side], coded.chunks):
            places.append((self._offset, len(payload)))
            self._put(payload)
            crcs.append(self._later(len(payload), partial(zlib.crc32, payload)))

        def checked() -> StoredTensor:
            blocks = [Block(*place, crc32.result()) for place, crc32 in zip(places, crcs)]
            value = given.hash if is_exact else tensor_hash(header.dtype, header.shape, values)
            return StoredTensor(header, value, blocks[0], blocks[1:])

        self._checked[header.name] = self._later(0 if is_exact else len(values), checked)

    def _put(self, data: bytes) -> None:
        if data:
            self._file.write(data)
            self._offset += len(data)

    def _later(self, num_bytes: int, work: Callable[[], Result]) -> Future[Result]:
        """`work`, which holds so many bytes, on one of the threads; waits while too much is held for such."""
        if self._pool is None:
            future = Future[Result]()
            future.set_result(work())
            return future
        future = self._pool.submit(work)
        self._pending.append((num_bytes, future))
        self._pending_bytes += num_bytes
        while self._pending_bytes > _MAX_PENDING_BYTES or len(self._pending) > _MAX_PENDING:
            held, oldest = self._pending.popleft()
            oldest.result()
            self._pending_bytes -= held
        return future

    def _stored(self, name: str) -> StoredTensor:
        """For checks of inputs: enough of a tensor whose checksums may still be under way."""
        nothing = Block(0, 0, 0)
        return StoredTensor(self._headers[name], "", nothing, ())

    def finish(self, expected_names: Iterable[str]) -> None:
        """Write directory and trailer and have the disk keep all; then the attributes but `path` hold.

        Raises SnapshotError if the tensors are not those of `expected_names`.
        """
        self.tensors = {name: checked.result() for name, checked in self._checked.items()}
        if missing := sorted(set(expected_names) ^ self.tensors.keys()):
            raise SnapshotError(f"the encoder left out, or made up, tensor {shown(missing[0])}")
        self.parent = self._parent if uses_parent(self._headers.values()) else None
        self.state_hash = state_hash((name, tensor.hash) for name, tensor in self.tensors.items())
        text, raw_bytes = pack_text(Directory(self.tensors, self.state_hash, self.parent).to_json())
        trailer = Trailer(
            directory_offset=self._offset,
            directory_stored=len(text),
            directory_raw=raw_bytes,
            directory_crc32=zlib.crc32(text),
            header_crc32=self._header_crc32,
            flags=DIRECTORY_IS_PACKED if len(text) < raw_bytes else 0,
            file_bytes=self._offset + len(text) + TRAILER.size,
        )
        self._put(text + trailer.to_bytes())
        self._file.flush()
        if self._sync:
            os.fsync(self._file.fileno())
        self._file.close()
        self.file_bytes = self._offset
