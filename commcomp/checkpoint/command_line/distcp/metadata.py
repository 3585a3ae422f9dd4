"""The `.metadata` of torch.distributed.checkpoint: which item lies where in which file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from commcomp.checkpoint.command_line.distcp import pickled
from commcomp.checkpoint.command_line.distcp.pickled import Named, Pairs, Record
from commcomp.checkpoint.container import MAX_DIMS, is_count
from commcomp.checkpoint.dtypes import dtype_name
from commcomp.checkpoint.errors import shown
from commcomp.checkpoint.state_tree import MAX_DEPTH, MAX_NAME_BYTES

DATA = ".distcp"
Offset = tuple[int, ...]

_MAX_BYTES = 1 << 30
_MOST_TRANSFORMS = 16
_CHECKPOINT, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_SIZE, _METADATA, _STORAGE_INFO = Named("torch", "Size"), Named(_CHECKPOINT, "Metadata"), Named(_FILES, "_StorageInfo")
_INDEX, _TENSOR = Named(_CHECKPOINT, "MetadataIndex"), Named(_CHECKPOINT, "TensorStorageMetadata")
_CHUNK, _BYTES = Named(_CHECKPOINT, "ChunkStorageMetadata"), Named(_CHECKPOINT, "BytesStorageMetadata")
_PROPERTIES = Named(_CHECKPOINT, "TensorProperties")

DTYPES = {
    Named("torch", name): dtype_name(value) for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
_NAMES = {
    *DTYPES,
    *(_SIZE, _METADATA, _STORAGE_INFO, _INDEX, _TENSOR, _CHUNK, _BYTES, _PROPERTIES, pickled.ORDERED_DICT),
    Named(_CHECKPOINT, "StorageMeta"),
    Named(_CHECKPOINT, "_MEM_FORMAT_ENCODING"),
    Named("torch.serialization", "_get_layout"),
    *(Named(module, f"{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
}


@dataclass(frozen=True)
class Item:
    """One item of a checkpoint. `offset`: of a shard in its tensor, None for what is no tensor."""

    name: str
    offset: Offset | None
    file: str
    start: int
    length: int
    dtype: str
    sizes: tuple[int, ...]
    transforms: tuple[str, ...]
    number: int
    """The place of `name` in the state dict, as far as that is told; optimizers count their weights in that order."""

    @property
    def text(self) -> str:
        """How a message names it."""
        return f"item {shown(self.name)}" + ("" if self.offset is None else f" at offset {self.offset}")


def read(path: str) -> list[Item]:
    """All items that lie in `.distcp` files, by file and place.

    Raises ValueError naming what is not as torch.distributed.checkpoint writes it; OSError. No code of the file runs.
    """
    if os.path.getsize(path) > _MAX_BYTES:
        raise ValueError(f"{path}: {os.path.getsize(path)} bytes; at most {_MAX_BYTES}")
    with open(path, "rb") as file:
        data = file.read()
    try:
        root = _required(pickled.read(data, _NAMES), _METADATA)
        described = dict(_named_pairs(root.field("state_dict_metadata"), "items"))
        numbers = {name: number for number, name in enumerate(_names_in_order(root, described))}
        places = root.field("storage_data")
        if type(places) is not Pairs:
            raise ValueError("it does not say where its items lie")
        shards: dict[int, dict[Offset, tuple[int, ...]]] = {}  # one entry may stand for many names
        found = (_item(key, place, described, numbers, shards) for key, place in places)
        items = [item for item in found if item is not None]
    except ValueError as error:
        due = "expected what dcp.save writes with torch's own FileSystemWriter and DefaultSavePlanner"
        raise ValueError(f"{path}: {error}; {due}") from error
    return _in_order(path, items)


def _names_in_order(root: Record, described: dict[str, Any]) -> dict[str, None]:
    """Those that the planner knows as they stand in the state dict; the others are behind, rank by rank."""
    planned = root.field("planner_data")
    names = [name for name, _ in planned if type(name) is str] if type(planned) is Pairs else []
    return dict.fromkeys([*(name for name in names if name in described), *described])


def _item(
    key: Any, place: Any, described: dict[str, Any], numbers: dict[str, int], shards: dict[int, Any]
) -> Item | None:
    index, where = _required(key, _INDEX), _required(place, _STORAGE_INFO)
    name, file = index.field("fqn"), where.field("relative_path")
    start, length, transforms = (
        where.field("offset"),
        where.field("length"),
        _texts(where.field("transform_descriptors")),
    )
    if type(name) is not str or type(file) is not str or not is_count(start) or not is_count(length):
        raise ValueError("an item without name, file or place")
    if not file.endswith(DATA):
        return None
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES or name.count(".") > MAX_DEPTH:
        raise ValueError(f"item {shown(name)} has a name of more than {MAX_NAME_BYTES} bytes or {MAX_DEPTH} parts")
    if len(file) > MAX_NAME_BYTES or os.path.basename(file) != file or "\0" in file:
        raise ValueError(f"item {shown(name)} lies in {shown(file)}; expected a file of the same folder")
    kind = described.get(name)
    if type(kind) is not Record or kind.kind not in (_TENSOR, _BYTES):
        raise ValueError(f"item {shown(name)} lies in {shown(file)}, and is not described")
    if kind.kind == _BYTES:
        return Item(name, None, file, start, length, "", (), transforms, numbers[name])
    offset = _size(index.field("offset"))
    if id(kind) not in shards:
        shards[id(kind)] = _shards(kind)
    if offset not in shards[id(kind)]:
        raise ValueError(f"item {shown(name)} at offset {offset} lies in {shown(file)}, and is not described")
    sizes = shards[id(kind)][offset]
    return Item(name, offset, file, start, length, _dtype(kind), sizes, transforms, numbers[name])


def _texts(value: Any) -> tuple[str, ...]:
    """What transforms an item went through, as far as a message shows it."""
    texts = [] if value is None else value if type(value) in (list, tuple) else [value]
    if len(texts) > _MOST_TRANSFORMS or any(type(text) is not str for text in texts):
        raise ValueError("transforms that are not a few strings")
    return tuple(text[:100] for text in texts)


def _shards(tensor: Record) -> dict[Offset, tuple[int, ...]]:
    """The sizes of a tensor's shards, by offset."""
    chunks = tensor.field("chunks")
    if type(chunks) is not list:
        raise ValueError("a tensor without list of shards")
    records = [_required(chunk, _CHUNK) for chunk in chunks]
    return {_size(chunk.field("offsets")): _size(chunk.field("sizes")) for chunk in records}


def _dtype(tensor: Record) -> str:
    properties = _required(tensor.field("properties"), _PROPERTIES)
    found = properties.field("dtype") if type(properties.state) is Pairs else properties.state
    if type(found) is tuple and type(found) is not Named and found:
        found = found[0]
    if type(found) is not Named or found not in DTYPES:
        raise ValueError("a tensor without dtype")
    return DTYPES[found]


def _size(value: Any) -> tuple[int, ...]:
    if type(value) is Record and value.kind == _SIZE and len(value.arguments) == 1:
        value = value.arguments[0]
    if type(value) not in (tuple, list) or len(value) > MAX_DIMS or not all(map(is_count, value)):
        raise ValueError("a size that is not a few integers")
    return tuple(value)


def _required(value: Any, kind: Named) -> Record:
    if type(value) is not Record or value.kind != kind:
        raise ValueError(f"no {kind.name} where one is due")
    return value


def _named_pairs(value: Any, what: str) -> Iterable[tuple[str, Any]]:
    if type(value) is not Pairs or any(type(key) is not str for key, _ in value):
        raise ValueError(f"it has no {what} by their names")
    return value


def _in_order(path: str, items: list[Item]) -> list[Item]:
    """Sorted; none overlap, none is there twice."""
    items.sort(key=lambda item: (item.file, item.start, item.length))
    for one, other in itertools.pairwise(items):
        if one.file == other.file and one.start + one.length > other.start:
            raise ValueError(f"{path}: {one.text} and {other.text} lie over each other in {shown(one.file)}")
    seen: set[tuple[str, Offset | None]] = set()
    for item in items:
        if (item.name, item.offset) in seen:
            raise ValueError(f"{path}: {item.text} is there twice")
        seen.add((item.name, item.offset))
    return items
