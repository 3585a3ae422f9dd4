"""Decodes tensors of a snapshot, through its parents, chunk by chunk on several threads."""

from __future__ import annotations

import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import numpy as np

from commcomp.checkpoint import codec_registry
from commcomp.checkpoint.chain import SnapshotChain
from commcomp.checkpoint.codec.arithmetic import exact_arithmetic
from commcomp.checkpoint.coded import CURRENT, Input, SideData
from commcomp.checkpoint.container import StoredTensor
from commcomp.checkpoint.container_reader import SnapshotReader
from commcomp.checkpoint.decode_plan import Piece, Range, check_parent, plan
from commcomp.checkpoint.errors import DamagedFileError, SnapshotError, shown
from commcomp.checkpoint.hashing import tensor_hash

_DAMAGE = (ValueError, ArithmeticError, LookupError, struct.error, zlib.error)


def decode(
    chain: SnapshotChain,
    wanted: Mapping[str, Range],
    *,
    threads: int = 1,
    verify: bool = True,
    parent: Mapping[str, Piece] | None = None,
) -> dict[str, Piece]:
    """The pieces of `chain[0]` that cover the wanted ranges of values, in memory of their own.

    `verify`: check the hash of whatever is decoded whole. `parent`: whole tensors of `chain[1]` where they are at hand.
    Raises DamagedFileError, WrongParentError. Holds the pieces and at most as much again of one parent.
    """
    levels: list[tuple[SnapshotReader, dict[str, Range], Collection[str]]] = []
    needed = dict(wanted)
    while True:
        reader = chain[len(levels)]
        ranges, of_parent = plan(reader, needed)
        levels.append((reader, ranges, needed.keys()))
        if not of_parent:
            break
        check_parent(reader, ranges, chain[len(levels)])
        if parent is not None:
            break
        needed = of_parent
    pieces = dict(parent or {})
    with exact_arithmetic():
        spare = _SpareMemory()
        for number, (reader, ranges, kept) in enumerate(reversed(levels)):
            of_caller = parent is not None and number == 0
            pieces = _LevelDecoder(reader, ranges, pieces, kept, verify, spare, of_caller).run(threads)
    return pieces


def whole(reader: SnapshotReader, names: Collection[str] | None = None) -> dict[str, Range]:
    """All values of the named tensors, or of all."""
    return {name: (0, reader.tensors[name].header.num_values) for name in (reader.tensors if names is None else names)}


class _SpareMemory:
    """Of pieces that nobody needs any more, for those that come: a snapshot has the same sizes as its parent."""

    def __init__(self) -> None:
        self._arrays: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> np.ndarray:
        """uint8, flat. Raises MemoryError."""
        with self._lock:
            arrays = self._arrays.get(num_bytes)
            if arrays:
                return arrays.pop()
        return np.empty(num_bytes, np.uint8)

    def give(self, array: np.ndarray) -> None:
        with self._lock:
            self._arrays.setdefault(len(array), []).append(array)


class _Work:
    """One tensor that is being decoded; its memory is taken when its first chunk is."""

    def __init__(self, reader: SnapshotReader, tensor: StoredTensor, values: Range, spare: _SpareMemory) -> None:
        self.reader, self.tensor, (self.start, self.stop), self._spare = reader, tensor, values, spare
        size = tensor.header.chunk_values or 1
        self.chunks = range(self.start // size, -(-self.stop // size)) if self.start < self.stop else range(0)
        self._left, self._lock = len(self.chunks), threading.Lock()
        self._piece: Piece | None = None
        self._side: SideData | None = None

    @property
    def piece(self) -> Piece:
        with self._lock:
            if self._piece is None:
                header = self.tensor.header
                num_bytes = (self.stop - self.start) * header.item_bytes
                try:
                    self._piece = Piece(self.start, header.item_bytes, self._spare.take(num_bytes))
                except MemoryError as error:
                    raise SnapshotError(
                        f"{self.reader.path}: tensor {shown(header.name)} declares {num_bytes} bytes, more than the "
                        "memory has; load fewer tensors, or a range of this one"
                    ) from error
            return self._piece

    @property
    def side(self) -> SideData:
        with self._lock:
            if self._side is None:
                self._side = SideData(self.reader.side(self.tensor))
            return self._side

    def drop(self) -> None:
        """Give up the memory; whoever has the piece keeps it."""
        self._piece = None

    def one_less(self) -> bool:
        """Whether that was the last chunk."""
        with self._lock:
            self._left -= 1
            return self._left <= 0


class _LevelDecoder:
    """Decodes ranges of one snapshot, given what they need of its parent, and drops inputs after their last use.

    `of_caller`: the memory of `of_parent` is not to be used for others.
    """

    def __init__(
        self,
        reader: SnapshotReader,
        ranges: Mapping[str, Range],
        of_parent: dict[str, Piece],
        kept: Collection[str],
        verify: bool,
        spare: _SpareMemory,
        of_caller: bool,
    ) -> None:
        self._reader, self._of_parent, self._kept, self._verify = reader, of_parent, kept, verify
        self._spare, self._of_caller = spare, of_caller
        self._works = {name: _Work(reader, reader.tensors[name], values, spare) for name, values in ranges.items()}
        self._pieces: dict[str, Piece] = {}
        self._uses = Counter(source for name in ranges for source in set(reader.tensors[name].header.inputs))

    def run(self, threads: int) -> dict[str, Piece]:
        if threads == 1 or sum(len(work.chunks) for work in self._works.values()) < 2:
            for work in self._works.values():
                for number in work.chunks:
                    self._decode_chunk(work, number)
                self._check(work)
                self._finish(work)
        else:
            self._run_on(threads)
        return {name: self._pieces[name] for name in self._kept}

    def _run_on(self, threads: int) -> None:
        """A tensor starts when all its inputs of this snapshot are there."""
        done: SimpleQueue[tuple[_Work, BaseException | None]] = SimpleQueue()
        missing, users = self._dependencies()
        with ThreadPoolExecutor(threads, "commcomp-decode") as pool:

            def start(work: _Work) -> None:
                for number in work.chunks:
                    pool.submit(self._job, work, number, done.put)
                if not work.chunks:
                    pool.submit(self._job, work, None, done.put)

            try:
                for name, work in self._works.items():
                    if not missing[name]:
                        start(work)
                for _ in range(len(self._works)):
                    work, error = done.get()
                    if error is not None:
                        raise error
                    self._finish(work)
                    for user in users[work.tensor.header.name]:
                        missing[user] -= 1
                        if not missing[user]:
                            start(self._works[user])
            finally:
                pool.shutdown(cancel_futures=True)

    def _dependencies(self) -> tuple[dict[str, int], dict[str, list[str]]]:
        """Of each tensor how many of this snapshot it waits for, and which wait for it."""
        users: dict[str, list[str]] = {name: [] for name in self._works}
        missing = {}
        for name, work in self._works.items():
            sources = {s.tensor for s in work.tensor.header.inputs if s.snapshot == CURRENT} & self._works.keys()
            missing[name] = len(sources)
            for source in sources:
                users[source].append(name)
        return missing, users

    def _job(self, work: _Work, number: int | None, done: Callable[[tuple[_Work, BaseException | None]], None]) -> None:
        try:
            if number is not None:
                self._decode_chunk(work, number)
            if work.one_less():
                self._check(work)
                done((work, None))
        except BaseException as error:
            done((work, error))

    def _decode_chunk(self, work: _Work, number: int) -> None:
        header, block = work.tensor.header, work.tensor.chunks[number]
        start = number * header.chunk_values
        count = min(header.chunk_values, header.num_values - start)
        decoder = codec_registry.decoders.get(header.method)
        if decoder is None:
            raise SnapshotError(
                f"{self._reader.path}: tensor {shown(header.name)} is coded by method {header.method[:40]!r}, which "
                f"this commcomp does not have ({', '.join(codec_registry.decoders)}); install a newer one"
            )
        inputs = []
        for source in header.inputs:
            pieces = self._pieces if source.snapshot == CURRENT else self._of_parent
            given = pieces[source.tensor].values(start, start + count)
            given.flags.writeable = False
            inputs.append(given)
        side, payload = work.side, self._reader.chunk(work.tensor, number)
        try:
            result = decoder(header, side, payload, start, count, inputs)
            if result.dtype != np.uint8 or result.shape != (count * header.item_bytes,):
                raise ValueError(f"decoded to {result.dtype}{list(result.shape)}; expected {count} {header.dtype}")
        except MemoryError as error:
            raise SnapshotError(
                f"{self._reader.path}: not enough memory to decode chunk {number} of tensor {shown(header.name)}; use "
                "fewer threads, or load fewer tensors at a time"
            ) from error
        except _DAMAGE as error:
            reason = f"method {header.method!r}: {str(error) or type(error).__name__}"
            raise DamagedFileError(
                self._reader.path, reason, tensor=header.name, chunk=number, offset=block.offset
            ) from error
        work.piece.values(start, start + count)[:] = result

    def _check(self, work: _Work) -> None:
        header, data = work.tensor.header, work.piece.data
        if not self._verify or len(data) != header.num_bytes:
            return
        found = tensor_hash(header.dtype, header.shape, data)
        if found != work.tensor.hash:
            reason = f"decoded values have hash {found}; expected {work.tensor.hash}"
            raise DamagedFileError(self._reader.path, reason, tensor=header.name, offset=work.tensor.side.offset)

    def _finish(self, work: _Work) -> None:
        header = work.tensor.header
        self._pieces[header.name] = work.piece
        for source in set(header.inputs):
            self._uses[source] -= 1
            if not self._uses[source]:
                self._drop(source)
        work.drop()

    def _drop(self, source: Input) -> None:
        """Its last user is done."""
        if source.snapshot != CURRENT:
            piece = self._of_parent.pop(source.tensor, None)
            if piece is not None and not self._of_caller:
                self._spare.give(piece.data)
        elif source.tensor not in self._kept:
            piece = self._pieces.pop(source.tensor, None)
            if piece is not None:
                self._spare.give(piece.data)
