"""Writing of packed files (packed_torch.py): what torch.save writes, with all tensors' bytes in one lossless snapshot.

Tensors are coded by storage, as torch.save writes them: each once, and those that share one share it after loading.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commcomp.checkpoint.codec.arithmetic import exact_arithmetic
from commcomp.checkpoint.codec_registry import encoder_for
from commcomp.checkpoint.coded import HostTensor, SnapshotEncoder
from commcomp.checkpoint.container import FileHeader
from commcomp.checkpoint.container_writer import SnapshotWriter
from commcomp.checkpoint.dtypes import dtype_name
from commcomp.checkpoint.packed_torch import load_storage, open_snapshot
from commcomp.checkpoint.packed_torch_storages import (
    PROTOCOL,
    Found,
    Names,
    is_codable,
    storages_of,
    untyped,
    with_storages,
)
from commcomp.checkpoint.state_tree import TensorPlace
from commcomp.checkpoint.store_files import sync_folder
from commcomp.checkpoint.tree_json import to_json


@dataclass(frozen=True)
class PackedReport:
    """What a save wrote. `plain_bytes`: what torch.save would have, not counting the padding between its records."""

    bytes: int
    plain_bytes: int
    packed: bool
    """False where the plain file was the smaller one, and was written."""


def save(
    value: Any, path: str, save_plain: Callable[[str], None], *, mode: str = "lossless", threads: int = 1
) -> PackedReport:
    """Write `value` to `path`, or with `save_plain(another path)` where that is no larger; a crash leaves what was.

    Raises what torch.save does, OSError.
    """
    folder, base = os.path.split(os.path.abspath(path))
    aside = os.path.join(folder, f".{base}.unfinished")
    unfinished = os.path.join(aside, base)  # torch.save writes a file's own name into it
    shutil.rmtree(aside, ignore_errors=True)  # of a writer that was killed
    os.makedirs(aside, exist_ok=True)
    try:
        storages, plain_bytes = storages_of(value)
        packed = any(not found.is_raw for found in storages.values())
        if packed:
            label = os.path.join(os.path.basename(folder), base)
            _write_packed(value, storages, unfinished, label, encoder_for(mode, threads), threads)
            packed = os.path.getsize(unfinished) <= plain_bytes
        if not packed:
            save_plain(unfinished)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size = os.path.getsize(path)
    return PackedReport(size, plain_bytes if packed else size, packed)


def _write_packed(
    value: Any, storages: dict[int, Found], path: str, label: str, encoder: SnapshotEncoder, threads: int
) -> None:
    snapshot_path = os.path.join(os.path.dirname(path), "snapshot")
    _write_snapshot(value, storages, snapshot_path, label, encoder, threads)
    size = os.path.getsize(snapshot_path)
    payload = torch.from_file(snapshot_path, shared=False, size=size, dtype=torch.uint8)
    os.unlink(snapshot_path)  # the mapping stays
    snapshot = _Reduced(open_snapshot, payload, label)
    with _checksums():
        torch.save(value, path, pickle_module=_pickle_module(storages, snapshot), pickle_protocol=PROTOCOL)


def _write_snapshot(
    value: Any, storages: dict[int, Found], path: str, label: str, encoder: SnapshotEncoder, threads: int
) -> None:
    info = Names(storages).tree_info(value)
    tensors = {found.name: _host_tensor(found) for found in storages.values() if not found.is_raw}
    tree = to_json({name: TensorPlace(name) for name in tensors})
    header = FileHeader(info.step, "lossless", tree, {"file": label})
    with exact_arithmetic(), SnapshotWriter(path, header, None, threads, sync=False) as writer:
        for coded in encoder(tensors, info, None):
            writer.add(coded, tensors[coded.name])
        writer.finish(tensors)


def _host_tensor(found: Found) -> HostTensor:
    """A storage: of the shape of a tensor that is all of it, or one row."""
    storage, tensor = found.storage, found.whole()
    size = storage.nbytes()
    data: np.ndarray = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu().numpy()
    if tensor is not None:
        return HostTensor(found.name, dtype_name(tensor.dtype), tuple(tensor.shape), data)
    dtype = found.tensors[0].dtype
    if size % dtype.itemsize:
        dtype = torch.uint8
    return HostTensor(found.name, dtype_name(dtype), (size // dtype.itemsize,), data)


def _pickle_module(storages: dict[int, Found], snapshot: _Reduced) -> Any:
    """What torch.save takes as `pickle_module`: storages of tensors are pickled as parts of the snapshot."""
    made: dict[tuple[int, torch.dtype], _Reduced] = {}
    places: dict[torch.device, Tensor] = {}

    def packed(storage: Any) -> Any:
        found = storages.get(untyped(storage)._cdata)
        if found is None or found.is_raw:
            return storage
        dtype = storage.dtype if isinstance(storage, torch.TypedStorage) else torch.uint8
        device, key = found.storage.device, (found.storage._cdata, dtype)
        if device.type != "cpu" and device not in places:
            places[device] = torch.empty(1, dtype=torch.uint8, device=device)
        if key not in made:  # the same object each time: then the pickle has it once
            made[key] = _Reduced(load_storage, snapshot, found.name, found.storage.nbytes(), dtype, places.get(device))
        return made[key]

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            if not isinstance(value, Tensor) or not is_codable(value):
                return NotImplemented
            return with_storages(value.__reduce_ex__(PROTOCOL), packed)

    return SimpleNamespace(__name__="pickle", Pickler=Pickler)


class _Reduced:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@contextlib.contextmanager
def _checksums() -> Iterator[None]:
    """torch.save writes those of its records, whatever the process has chosen."""
    chosen = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(chosen)
