"""Writing of packed files (packed_torch.py): what torch.save writes, with all tensors' bytes in one lossless snapshot.

Tensors are coded by storage, as torch.save writes them: each once, and those that share one share it after loading.
"""

from __future__ import annotations

import contextlib
import math
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
from commcomp.checkpoint.coded import HostTensor, TreeInfo
from commcomp.checkpoint.container import FileHeader
from commcomp.checkpoint.container_writer import SnapshotWriter
from commcomp.checkpoint.dtypes import dtype_name
from commcomp.checkpoint.packed_torch import load_storage, open_snapshot
from commcomp.checkpoint.packed_torch_storages import (
    PROTOCOL,
    Cut,
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
    value: Any,
    path: str,
    save_plain: Callable[[str], None],
    *,
    mode: str = "lossless",
    threads: int = 1,
    cut: Callable[[int], list[Cut]] = lambda values: [],
) -> PackedReport:
    """Write `value` to `path`, or with `save_plain(another path)` where that is no larger; a crash leaves what was.

    `cut`: of a number of values, the matrices in a flat tensor of that many (packed_torch_storages.Names).
    Raises what torch.save does, OSError.
    """
    folder, base = os.path.split(os.path.abspath(path))
    aside = os.path.join(folder, f".{base}.unfinished")
    unfinished = os.path.join(aside, base)  # torch.save writes a file's own name into it
    shutil.rmtree(aside, ignore_errors=True)  # of a writer that was killed
    os.makedirs(aside, exist_ok=True)
    try:
        storages, plain_bytes = storages_of(value, os.path.splitext(base)[0])
        packed = any(not found.is_raw for found in storages.values())
        if packed:
            label = os.path.join(os.path.basename(folder), base)
            info = Names(storages, cut).tree_info(value)
            snapshot = _write_snapshot(storages, info, os.path.join(aside, "snapshot"), label, mode, threads)
            module = _pickle_module(storages, snapshot)
            with _checksums():
                torch.save(value, unfinished, pickle_module=module, pickle_protocol=PROTOCOL)
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


def _write_snapshot(
    storages: dict[int, Found], info: TreeInfo, path: str, label: str, mode: str, threads: int
) -> _Reduced:
    """The snapshot as the pickle has it: its bytes are a tensor on a file without a name."""
    found = [each for each in storages.values() if not each.is_raw]
    tensors = {tensor.name: tensor for each in found for tensor in _host_tensors(each)}
    header = FileHeader(info.step, mode, to_json({name: TensorPlace(name) for name in tensors}), {"file": label})
    with exact_arithmetic(), SnapshotWriter(path, header, None, threads, sync=False) as writer:
        for coded in encoder_for(mode, threads)(tensors, info, None):
            writer.add(coded, tensors[coded.name])
        writer.finish(tensors)
    payload = torch.from_file(path, shared=False, size=os.path.getsize(path), dtype=torch.uint8)
    os.unlink(path)  # the mapping stays
    return _Reduced(open_snapshot, payload, label)


def _host_tensors(found: Found) -> Iterator[HostTensor]:
    """A storage's parts."""
    device, dtype = found.storage.device, found.dtype
    data: np.ndarray = torch.empty(0, dtype=torch.uint8, device=device).set_(found.storage).cpu().numpy()
    start = 0
    for name, shape in found.parts.items():
        stop = start + math.prod(shape) * dtype.itemsize
        yield HostTensor(name, dtype_name(dtype), shape, data[start:stop])
        start = stop


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
            size, place = found.storage.nbytes(), places.get(device)
            made[key] = _Reduced(load_storage, snapshot, tuple(found.parts), size, dtype, place)
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
