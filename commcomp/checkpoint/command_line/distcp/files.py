"""`.distcp` files as a state: the values of their tensors, and of each file what is left without these, its frame."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from commcomp.checkpoint.coded import HostTensor, TreeInfo
from commcomp.checkpoint.command_line.distcp import archive
from commcomp.checkpoint.command_line.distcp.archive import SavedTensor
from commcomp.checkpoint.command_line.distcp.groups import Group
from commcomp.checkpoint.command_line.distcp.metadata import Item
from commcomp.checkpoint.container import is_count
from commcomp.checkpoint.flat_names import PLAIN_VALUE
from commcomp.checkpoint.hashing import text_hash
from commcomp.checkpoint.state_tree import MAX_NAME_BYTES, TensorPlace, path_text, paths_of


def read(folder: str, group: Group) -> tuple[TreeInfo, dict[str, HostTensor], list[dict[str, Any]]]:
    """The tensors by name, frames with them, which stay in the files until they are used, and what `pieces` needs.

    The tree is {item: {offset: tensor}}, as flat_names.py reads it, with the frames under the files' numbers.
    Raises ValueError naming the file and the item that are not as `.metadata` says; OSError.
    """
    tree: dict[Any, Any] = {}
    tensors: dict[str, HostTensor] = {}

    def add(item: Item, saved: SavedTensor, data: np.ndarray) -> str:
        tensor = _host_tensor(item, saved, data)
        tree.setdefault(item.name, {})[item.offset] = TensorPlace(tensor.name)
        tensors[tensor.name] = tensor
        return tensor.name

    origins = []
    for number, name in enumerate(group.names):
        path = os.path.join(folder, name)
        data = _bytes_of(path)
        found = [(item, _tensor_of(path, item, data)) for item in group.items[name]]
        cuts = [(item, saved, add(item, saved, data)) for item, saved in found if saved is not None]
        tree[number] = TensorPlace(name)
        tensors[name], origin = _frame(name, data, cuts)
        origins.append(origin)
    for item in group.steps:
        with contextlib.suppress(ValueError, OSError):  # told where that file is packed
            data = _bytes_of(path := os.path.join(folder, item.file))
            if (saved := _tensor_of(path, item, data)) is not None:
                add(item, saved, data)
    for name, value in group.settings.items():
        tree.setdefault(name, {PLAIN_VALUE: value})
    return TreeInfo(0, tree, paths_of(tree)), tensors, origins


def _bytes_of(path: str) -> np.ndarray:
    """A file, mapped without keeping it open: a group may have many."""
    num_bytes = os.path.getsize(path)
    if not num_bytes:
        return np.empty(0, np.uint8)
    data = torch.from_file(path, shared=False, size=num_bytes, dtype=torch.uint8).numpy()
    data.flags.writeable = False
    return data


def _tensor_of(path: str, item: Item, data: np.ndarray) -> SavedTensor | None:
    """None where the item stays in the frame."""
    if item.start + item.length > len(data):
        end = item.start + item.length
        raise ValueError(f"{path}, {item.text}: ends at byte {end} of {len(data)}; the file is damaged or another's")
    if item.transforms:
        raise ValueError(f"{path}, {item.text}: went through {', '.join(item.transforms)[:100]}; save without that")
    if item.offset is None:
        return None
    try:
        saved = archive.tensor_in(data[item.start : item.start + item.length])
    except ValueError as error:
        raise ValueError(f"{path}, {item.text}: {error}") from error
    if saved is not None and (saved.dtype, saved.sizes) != (item.dtype, item.sizes):
        found = f"{saved.dtype} {saved.sizes}"
        raise ValueError(f"{path}, {item.text}: is {found}; .metadata says {item.dtype} {item.sizes}")
    return saved


def _host_tensor(item: Item, saved: SavedTensor, data: np.ndarray) -> HostTensor:
    name = path_text((item.name, item.offset))
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        name = f"{name[:500]}.../{text_hash(name)}"
    values = data[item.start + saved.start : item.start + saved.stop]
    return HostTensor(name, saved.dtype, saved.shape, values)


def _frame(name: str, data: np.ndarray, cuts: list[tuple[Item, SavedTensor, str]]) -> tuple[HostTensor, dict[str, Any]]:
    """A file without the values of its tensors, and where in it these were and their crc32 stands."""
    kept, places, at, removed = [], [], 0, 0
    for item, saved, tensor in cuts:
        start, stop = item.start + saved.start, item.start + saved.stop
        kept.append(data[at:start])
        in_frame = start - removed
        at, removed = stop, removed + stop - start
        crcs = [
            item.start + place - (removed if item.start + place >= stop else removed - (stop - start))
            for place in saved.crc_places
            if not start - 4 < item.start + place < stop
        ]
        places.append([in_frame, tensor, crcs])
    frame = np.concatenate([*kept, data[at:]])
    return HostTensor(name, "uint8", (len(frame),), frame), {"name": name, "cuts": places}


def names_in(origins: Any) -> list[str]:
    """The names of the packed files. Raises ValueError where the description is none."""
    if type(origins) is not list or not origins:
        raise ValueError("it does not say which files it was made of")
    names = []
    for origin in origins:
        name = origin.get("name") if type(origin) is dict else None
        if type(name) is not str or os.path.basename(name) != name or name in ("", ".", "..") or "\0" in name:
            raise ValueError(f"it was made of a file {str(name)[:100]!r}, which is no name of one")
        names.append(name)
    if len(set(names)) != len(names):
        raise ValueError("it was made of two files of one name")
    return names


def pieces(
    origin: Mapping[str, Any], arrays: Mapping[str, np.ndarray], new_crcs: Mapping[str, int]
) -> Iterator[np.ndarray]:
    """A file again, in order. `new_crcs`: the crc32 of tensors that are not what they were.

    Raises ValueError where the description does not fit the tensors.
    """
    frame, cuts, used = arrays.get(origin["name"]), origin.get("cuts"), 0
    if frame is None or type(cuts) is not list:
        raise ValueError(f"nothing is there of {origin['name'][:200]!r}")
    frame = frame.copy() if new_crcs else frame
    for cut in cuts:
        if type(cut) is not list or len(cut) != 3 or type(cut[2]) is not list or not all(map(is_count, cut[2])):
            raise ValueError(f"a place {str(cut)[:100]} of a tensor")
        start, tensor, crcs = cut
        if not is_count(start) or not used <= start <= len(frame) or type(tensor) is not str or tensor not in arrays:
            raise ValueError(f"a place {str(cut)[:100]} of a tensor")
        used = start
        if tensor in new_crcs:
            _put_crc(frame, crcs, new_crcs[tensor])
    used = 0
    for start, tensor, _ in cuts:
        yield frame[used:start]
        yield arrays[tensor]
        used = start
    yield frame[used:]


def _put_crc(frame: np.ndarray, places: list[int], value: int) -> None:
    for place in places:
        if place + 4 > len(frame):
            raise ValueError(f"a place {place} of a crc32 in a frame of {len(frame)} bytes")
        frame[place : place + 4] = np.frombuffer(value.to_bytes(4, "little"), np.uint8)
