"""Reading of packed files: files of torch.save in which all tensors' bytes are one snapshot file, a uint8 tensor.

Their pickles name the two functions of this module, so that plain `torch.load(..., weights_only=False)` reads them
wherever commcomp is installed; both must stay where they are. The snapshot is data: sizes, checksums and hashes are
checked as those of any snapshot file. The pickle around it is as trustworthy as any file of torch.save.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from commcomp.checkpoint.chain import SnapshotChain
from commcomp.checkpoint.container import MAGIC
from commcomp.checkpoint.container_reader import SnapshotReader
from commcomp.checkpoint.decoder import decode, whole
from commcomp.checkpoint.errors import DamagedFileError
from commcomp.checkpoint.parallel import default_threads_of_rank

MODULE = __name__
_PIECE = 1 << 20
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a record in a zip archive: lengths of its name and extra field
_NO_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error)
"""What the standard library raises for damaged archives."""


class LoadedStorages:
    """The storages of one packed file: what `open_snapshot` makes of its bytes. `pieces`: uint8 by name."""

    def __init__(self, label: str, pieces: dict[str, np.ndarray], device: torch.device) -> None:
        self.label, self._pieces, self._device = label, pieces, device
        self._storages: dict[tuple[str, ...], torch.UntypedStorage] = {}

    def get(self, names: tuple[str, ...], num_bytes: int, place: Tensor | None) -> torch.UntypedStorage:
        """The same object for the same names: tensors that shared their storage share it again."""
        if names not in self._storages:
            data = self._joined(names, num_bytes)
            device = self._device if place is None else place.device
            self._storages[names] = torch.from_numpy(data).to(device).untyped_storage()
        found = self._storages[names]
        if found.nbytes() != num_bytes:
            raise DamagedFileError(self.label, f"{found.nbytes()} bytes; expected {num_bytes}", tensor=names[0])
        return found

    def _joined(self, names: tuple[str, ...], num_bytes: int) -> np.ndarray:
        missing = next((name for name in names if name not in self._pieces), None)
        if missing is not None or not names:
            raise DamagedFileError(self.label, "its snapshot does not hold it, or it is used twice", tensor=missing)
        pieces = [self._pieces.pop(name) for name in names]
        total = sum(len(piece) for piece in pieces)
        if total != num_bytes:
            raise DamagedFileError(self.label, f"{total} bytes; expected {num_bytes}", tensor=names[0])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def open_snapshot(payload: Tensor, label: str) -> LoadedStorages:
    """Named in packed files: decode the snapshot `payload` (uint8 [n]) of the file that was saved as `label`.

    Raises DamagedFileError naming the tensor, SnapshotError.
    """
    if not isinstance(label, str) or not isinstance(payload, Tensor):
        raise DamagedFileError("a packed file", f"holds a {type(payload).__name__} in place of its snapshot")
    if payload.dtype != torch.uint8 or payload.dim() != 1:
        raise DamagedFileError(label, f"its snapshot is {payload.dtype}{list(payload.shape)}; expected uint8 [n]")
    memory = memoryview(payload.detach().cpu().contiguous().numpy())
    reader = SnapshotReader(label, memory)
    pieces = decode(SnapshotChain.alone(reader), whole(reader), threads=default_threads_of_rank())
    return LoadedStorages(label, {name: piece.data for name, piece in pieces.items()}, payload.device)


def load_storage(
    storages: LoadedStorages, names: tuple[str, ...], num_bytes: int, dtype: torch.dtype, place: Tensor | None
) -> torch.TypedStorage:
    """Named in packed files: a storage as torch.load hands them to the functions that rebuild tensors.

    `names`: of what lies in it one after another. `place`: a tensor on the device where the storage was saved, which
    torch.load's map_location has moved; None: the CPU, as the snapshot itself.
    """
    strings = isinstance(names, tuple) and all(isinstance(name, str) for name in names)
    if not isinstance(storages, LoadedStorages) or not isinstance(dtype, torch.dtype) or not strings:
        raise DamagedFileError("a packed file", f"wants storage {str(names)[:80]!r} of what is no snapshot")
    return torch.TypedStorage(wrap_storage=storages.get(names, num_bytes, place), dtype=dtype, _internal=True)


def is_packed(path: str) -> bool:
    """Whether it is a packed file, as its pickle tells, damaged or not; False for what is no zip archive at all."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            return any(
                MODULE.encode() in _stored(file, info)
                for info in archive.infolist()
                if info.filename.endswith("/data.pkl")
            )
    except _NO_ARCHIVE:
        return False


def _stored(file: BinaryIO, info: zipfile.ZipInfo) -> bytes:
    """A record's bytes without a look at its checksum, which torch.save may have been told not to write."""
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size:
        return b""
    name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
    return file.read(info.file_size)


def check(path: str, *, snapshot: bool = False) -> None:
    """Compare the checksums of a packed file's records, which torch.load does not look at.

    `snapshot`: of the one that has checksums of its own too. Raises DamagedFileError naming the record,
    FileNotFoundError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                _check_record(path, archive, info, snapshot)
    except _NO_ARCHIVE as error:
        raise DamagedFileError(path, f"no archive of torch.save ({error})") from error


def _check_record(path: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo, snapshot: bool) -> None:
    try:
        with archive.open(info) as record:
            piece = record.read(len(MAGIC))
            while piece and (snapshot or piece != MAGIC):
                piece = record.read(_PIECE)
    except _NO_ARCHIVE as error:
        raise DamagedFileError(path, f"record {info.filename[:200]!r}: {error}", offset=info.header_offset) from error


def blame_damage(path: str, error: Exception) -> None:
    """For who could not load `path`: raises DamagedFileError where it is an archive that is not whole."""
    with open(path, "rb") as file:
        is_archive = file.read(2) == b"PK"
    if is_archive or zipfile.is_zipfile(path):
        check(path)
    if "PytorchStreamReader" in str(error):  # it looks at more of an archive than the standard library
        raise DamagedFileError(path, str(error).partition(". ")[0]) from error
