"""What a checkpoint consists of, as JSON: torch.distributed.checkpoint's Metadata, and which rank's file has what."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from commcomp.checkpoint import tree_json
from commcomp.checkpoint.container import MAX_STEP, is_count
from commcomp.checkpoint.dtypes import TORCH_DTYPES, dtype_name
from commcomp.checkpoint.state_tree import split

FORMAT = 1
_MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "preserve": torch.preserve_format,
}


@dataclass(frozen=True)
class StoredItem:
    """Where an item lies: in the file of a rank, the tensor of this name."""

    rank: int
    tensor: str


@dataclass(frozen=True)
class Description:
    """`state_hashes`: by rank, of its file; `chain`: how many checkpoints a load opens at most, with this one."""

    step: int
    mode: str
    parent: int | None
    chain: int
    state_hashes: Mapping[int, str]
    metadata: Metadata  # storage_data: {MetadataIndex: StoredItem}


def to_text(description: Description) -> bytes:
    """Raises TypeError or ValueError naming the item that JSON cannot express, or that no rank has written."""
    metadata, items = description.metadata, []
    for name, item in metadata.state_dict_metadata.items():
        if type(item) is BytesStorageMetadata:
            items.append([name, {"bytes": _place(metadata, MetadataIndex(name))}])
        elif type(item) is TensorStorageMetadata:
            items.append([name, _tensor_to_json(metadata, name, item)])
        else:
            kind = type(item)
            raise TypeError(f"the metadata of {name[:200]!r} is a {kind.__module__}.{kind.__qualname__}")
    content = {
        "format": FORMAT,
        "step": description.step,
        "mode": description.mode,
        "parent": description.parent,
        "chain": description.chain,
        "state_hashes": [list(pair) for pair in sorted(description.state_hashes.items())],
        "items": items,
        "planner_data": _plain(metadata.planner_data),
        "version": metadata.version,
    }
    return json.dumps({"crc32": zlib.crc32(_canonical(content)), "checkpoint": content}).encode("ascii")


def from_text(text: bytes) -> Description:
    """Back. Raises ValueError, TypeError or KeyError with what is wrong."""
    outer = json.loads(text)
    content = outer["checkpoint"]
    if type(found := content["format"]) is not int or found != FORMAT:
        raise ValueError(f"format {str(found)[:40]}; this commcomp reads {FORMAT}")
    if outer["crc32"] != zlib.crc32(_canonical(content)):
        raise ValueError("the crc32 of its content is wrong")
    step, parent, chain = content["step"], content["parent"], content["chain"]
    if not is_count(step) or step > MAX_STEP or not is_count(chain) or not (parent is None or is_count(parent)):
        raise ValueError(f"step {str(step)[:40]}, parent {str(parent)[:40]}, chain {str(chain)[:40]}")
    storage: dict[MetadataIndex, StoredItem] = {}
    items: dict[str, BytesStorageMetadata | TensorStorageMetadata] = {}
    for name, item in content["items"]:
        if type(name) is not str or type(item) is not dict:
            raise ValueError(f"an item {str(name)[:200]!r}: {str(item)[:100]}; expected a name and an object")
        if "bytes" in item:
            storage[MetadataIndex(name)] = _stored(item["bytes"])
            items[name] = BytesStorageMetadata()
        else:
            items[name] = _tensor_from_json(name, item, storage)
    if not (content["version"] is None or type(content["version"]) is str):
        raise ValueError(f"version {str(content['version'])[:100]}")
    metadata = Metadata(
        state_dict_metadata=items,
        planner_data=tree_json.from_json(content["planner_data"]),
        storage_data=storage,
        version=content["version"],
    )
    hashes = {int(rank): str(value) for rank, value in content["state_hashes"]}
    return Description(step, str(content["mode"]), parent, chain, hashes, metadata)


def _canonical(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":"), sort_keys=True, allow_nan=False).encode("ascii")


def _plain(planner_data: Any) -> Any:
    try:
        state = split(planner_data)
        if state.tensors:
            raise TypeError(f"{next(iter(state.tensors))[:200]!r} in it is a tensor")
        return tree_json.to_json(state.skeleton)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"the planner's data cannot be kept: {error}; use a planner whose data are containers of plain values, as "
            "DefaultSavePlanner"
        ) from error


def _tensor_to_json(metadata: Metadata, name: str, item: TensorStorageMetadata) -> dict[str, Any]:
    properties = item.properties
    memory_format = [key for key, value in _MEMORY_FORMATS.items() if value == properties.memory_format]
    if properties.layout != torch.strided or not memory_format or dtype_name(properties.dtype) not in TORCH_DTYPES:
        raise TypeError(
            f"tensor {name[:200]!r} has dtype {properties.dtype}, layout {properties.layout} and memory format "
            f"{properties.memory_format}, which cannot be kept; make it a plain strided tensor, or leave it out"
        )
    return {
        "dtype": dtype_name(properties.dtype),
        "memory_format": memory_format[0],
        "requires_grad": bool(properties.requires_grad),
        "pin_memory": bool(properties.pin_memory),
        "size": list(item.size),
        "chunks": [
            [list(chunk.offsets), list(chunk.sizes), _place(metadata, MetadataIndex(name, chunk.offsets))]
            for chunk in item.chunks
        ],
    }


def _tensor_from_json(name: str, item: Any, storage: dict[MetadataIndex, StoredItem]) -> TensorStorageMetadata:
    chunks = []
    for number, (offsets, sizes, place) in enumerate(item["chunks"]):
        chunk = ChunkStorageMetadata(_size(offsets), _size(sizes))
        storage[MetadataIndex(name, chunk.offsets, number)] = _stored(place)
        chunks.append(chunk)
    properties = TensorProperties(
        dtype=TORCH_DTYPES[item["dtype"]],
        requires_grad=bool(item["requires_grad"]),
        memory_format=_MEMORY_FORMATS[item["memory_format"]],
        pin_memory=bool(item["pin_memory"]),
    )
    return TensorStorageMetadata(properties, _size(item["size"]), chunks)


def _place(metadata: Metadata, index: MetadataIndex) -> list[Any]:
    stored = metadata.storage_data.get(index)
    if type(stored) is not StoredItem:
        raise ValueError(f"no rank has written {index.fqn[:200]!r} at offset {index.offset}")
    return [stored.rank, stored.tensor]


def _stored(place: Any) -> StoredItem:
    rank, tensor = place
    if not is_count(rank) or type(tensor) is not str:
        raise ValueError(f"a place {str(place)[:100]}; expected a rank and a tensor's name")
    return StoredItem(rank, tensor)


def _size(dims: Any) -> torch.Size:
    if type(dims) is not list or not all(map(is_count, dims)):
        raise ValueError(f"dims {str(dims)[:100]}")
    return torch.Size(dims)
