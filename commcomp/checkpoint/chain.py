"""A snapshot file and those that it was coded against."""

from __future__ import annotations

import threading
from collections.abc import Callable

from commcomp.checkpoint.container import ParentLink
from commcomp.checkpoint.container_reader import SnapshotReader
from commcomp.checkpoint.errors import DamagedFileError, WrongParentError


class SnapshotChain:
    """`chain[0]` is the snapshot itself, `chain[i + 1]` the parent of `chain[i]`, opened when it is first asked for.

    `path_of`: the file of a step. Raises as SnapshotReader does, and WrongParentError before anything is decoded.
    """

    def __init__(self, step: int, path_of: Callable[[int], str]) -> None:
        self._path_of, self._lock = path_of, threading.Lock()
        self._readers = [SnapshotReader(path_of(step))]

    @classmethod
    def alone(cls, reader: SnapshotReader) -> SnapshotChain:
        """Of an open snapshot that needs no other. Raises DamagedFileError where it names a parent."""
        if reader.parent is not None:
            raise DamagedFileError(reader.path, f"names step {reader.parent.step} as parent; expected none")
        chain = cls.__new__(cls)
        chain._path_of, chain._lock, chain._readers = str, threading.Lock(), [reader]
        return chain

    def __enter__(self) -> SnapshotChain:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def __getitem__(self, index: int) -> SnapshotReader:
        with self._lock:
            while len(self._readers) <= index:
                self._readers.append(self._parent_of(self._readers[-1]))
        return self._readers[index]

    def open_all(self) -> list[SnapshotReader]:
        """The whole chain, down to a snapshot without parent."""
        while self[len(self._readers) - 1].parent is not None:
            self[len(self._readers)]
        return list(self._readers)

    @property
    def opened(self) -> list[SnapshotReader]:
        return list(self._readers)

    @property
    def bytes_read(self) -> int:
        return sum(reader.bytes_read for reader in self._readers)

    def _parent_of(self, child: SnapshotReader) -> SnapshotReader:
        link = child.parent
        assert link is not None  # the directory was refused otherwise
        path = self._path_of(link.step)
        try:
            parent = SnapshotReader(path)
        except FileNotFoundError as error:
            raise _wrong(child, link, f"{path} is missing") from error
        if parent.state_hash != link.state_hash or parent.header.step != link.step:
            parent.close()
            raise _wrong(child, link, f"{path} holds step {parent.header.step} with state hash {parent.state_hash}")
        return parent


def _wrong(child: SnapshotReader, link: ParentLink, found: str) -> WrongParentError:
    return WrongParentError(
        f"{child.path} was coded against step {link.step} with state hash {link.state_hash}, but {found}; "
        "put that file back, or load a step that does not need it"
    )
