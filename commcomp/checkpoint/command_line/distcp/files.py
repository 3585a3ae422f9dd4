"""`.distcp` files as a state: the values of their tensors, and of each file what is left without these, its frame."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from commcomp.checkpoint.coded import HostTensor, TreeInfo
from commcomp.checkpoint.command_line.distcp import archive
from commcomp.checkpoint.command_line.distcp.archive import SavedTensor
from commcomp.checkpoint.command_line.distcp.groups import Group
from commcomp.checkpoint.command_line.distcp.metadata import DATA, Item, Offset
from commcomp.checkpoint.container import is_count
from commcomp.checkpoint.flat_names import PLAIN_VALUE
from commcomp.checkpoint.hashing import text_hash
from commcomp.checkpoint.parallel import ordered_map
from commcomp.checkpoint.state_tree import MAX_NAME_BYTES, TensorPlace, path_text, paths_of

_MOST_PLACES = 16
"""Of tied weights; more would make a small packed file a huge one."""


def read(folder: str, group: Group, threads: int) -> tuple[TreeInfo, dict[str, HostTensor], list[dict[str, Any]]]:
    """The tensors by name, frames with them, which stay in the files until they are used, and what `restored` needs.

    The tree is {item: {offset: tensor}}, as flat_names.py reads it, with the frames under the files' numbers.
    Raises ValueError naming the file and the item that are not as `.metadata` says; OSError.
    """
    parts: dict[str, list[_Part]] = {}
    for name in group.names:
        path = os.path.join(folder, name)
        data = _bytes_of(path)
        parts[name] = [part for item in group.items[name] if (part := _part_of(path, item, data)) is not None]
    twins = _twins([part for found in parts.values() for part in found], group.roles)
    tensors: dict[str, HostTensor] = {}
    origins = []
    for name, found in parts.items():
        tensors |= {part.tensor.name: part.tensor for part in found if part.tensor.name not in twins}
        cuts = [(part, twins.get(part.tensor.name, part.tensor.name)) for part in found]
        tensors[name], origin = _frame(name, _bytes_of(os.path.join(folder, name)), cuts, threads)
        origins.append(origin)
    steps = _steps_of(folder, group)
    tensors |= {part.tensor.name: part.tensor for part in steps}
    tree: dict[Any, Any] = {number: TensorPlace(name) for number, name in enumerate(group.names)}
    for part in sorted([*(part for found in parts.values() for part in found), *steps], key=lambda part: part.order):
        place = TensorPlace(twins.get(part.tensor.name, part.tensor.name))
        tree.setdefault(part.item.name, {})[part.item.offset] = place
    for name, value in group.settings.items():
        tree.setdefault(name, {PLAIN_VALUE: value})
    return TreeInfo(0, tree, paths_of(tree)), tensors, origins


@dataclass(frozen=True)
class _Part:
    """An item that is a tensor, with its values where they lie."""

    item: Item
    saved: SavedTensor
    tensor: HostTensor

    @property
    def order(self) -> tuple[int, Offset]:
        """As in the state dict."""
        return self.item.number, self.item.offset or ()


def _steps_of(folder: str, group: Group) -> list[_Part]:
    parts = []
    for item in group.steps:
        with contextlib.suppress(ValueError, OSError):  # told where that file is packed
            path = os.path.join(folder, item.file)
            parts.append(_part_of(path, item, _bytes_of(path)))
    return [part for part in parts if part is not None]


def _twins(parts: list[_Part], roles: Mapping[str, bool]) -> dict[str, str]:
    """By its tensor's name a weight that an optimizer does not know, and the equal one that it knows: they are tied.

    Of more than `_MOST_PLACES` equal ones, as frozen zeros are, the others are tensors of their own.
    """

    def kind(part: _Part) -> tuple[Any, ...]:
        return part.item.offset, part.tensor.dtype, part.tensor.shape

    known: dict[tuple[Any, ...], list[_Part]] = {}
    for part in parts:
        if roles.get(part.item.name) is True:
            known.setdefault(kind(part), []).append(part)
    twins: dict[str, str] = {}
    places: Counter[str] = Counter()
    for part in parts:
        if roles.get(part.item.name) is False and kind(part) in known:
            same = (other.tensor.name for other in known[kind(part)] if other.tensor.hash == part.tensor.hash)
            if (twin := next(same, None)) is not None and places[twin] + 1 < _MOST_PLACES:
                twins[part.tensor.name] = twin
                places[twin] += 1
    return twins


def _bytes_of(path: str) -> np.ndarray:
    """A file, mapped without keeping it open: a group may have many."""
    num_bytes = os.path.getsize(path)
    if not num_bytes:
        return np.empty(0, np.uint8)
    data = torch.from_file(path, shared=False, size=num_bytes, dtype=torch.uint8).numpy()
    data.flags.writeable = False
    return data


def _part_of(path: str, item: Item, data: np.ndarray) -> _Part | None:
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
    if saved is None:
        return None
    if (saved.dtype, saved.sizes) != (item.dtype, item.sizes):
        found = f"{saved.dtype} {saved.sizes}"
        raise ValueError(f"{path}, {item.text}: is {found}; .metadata says {item.dtype} {item.sizes}")
    name = path_text((item.name, item.offset))
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        name = f"{name[:500]}.../{text_hash(name)}"
    values = data[item.start + saved.start : item.start + saved.stop]
    return _Part(item, saved, HostTensor(name, saved.dtype, saved.shape, values))


def _frame(
    name: str, data: np.ndarray, cuts: list[tuple[_Part, str]], threads: int
) -> tuple[HostTensor, dict[str, Any]]:
    """A file without the values of its tensors and their crc32, and where in it these were."""
    pieces: list[np.ndarray] = []
    places: list[tuple[int, str, list[int]]] = []
    at = removed = 0
    crc32s = ordered_map(zlib.crc32, [part.tensor.data for part, _ in cuts], threads)
    for (part, tensor), crc32 in zip(cuts, crc32s):
        item, saved = part.item, part.saved
        start, stop = item.start + saved.start, item.start + saved.stop
        pieces.append(data[at:start])
        length = stop - start
        crcs = [
            place - removed - (length if place >= stop else 0)
            for place in (item.start + place for place in saved.crc_places)
            if (place + 4 <= start or place >= stop)
            and data[place : place + 4].tobytes() == crc32.to_bytes(4, "little")
        ]
        places.append((start - removed, tensor, crcs))
        at, removed = stop, removed + length
    frame = np.concatenate([*pieces, data[at:]])
    for _, _, crcs in places:
        for place in crcs:
            frame[place : place + 4] = 0
    return HostTensor(name, "uint8", (len(frame),), frame), {"name": name, "cuts": [list(place) for place in places]}


def names_in(origins: Any) -> list[str]:
    """The names of the packed files, `.distcp` all: a packed file brings no scripts along.

    Raises ValueError where the description is none.
    """
    if type(origins) is not list or not origins:
        raise ValueError("it does not say which files it was made of")
    names = []
    for origin in origins:
        name = origin.get("name") if type(origin) is dict else None
        if type(name) is not str or os.path.basename(name) != name or not name.endswith(DATA) or "\0" in name:
            raise ValueError(f"it was made of a file {str(name)[:100]!r}, which is no name of a {DATA} file")
        names.append(name)
    if len(set(names)) != len(names):
        raise ValueError("it was made of two files of one name")
    return names


@dataclass(frozen=True)
class Restored:
    """A file again: its frame with the tensors' crc32 in it, and before which of its bytes they stand, in order."""

    frame: np.ndarray
    cuts: list[tuple[int, np.ndarray]]

    def pieces(self) -> Iterator[np.ndarray]:
        used = 0
        for start, values in self.cuts:
            yield self.frame[used:start]
            yield values
            used = start
        yield self.frame[used:]


def restored(origins: Any, arrays: Mapping[str, np.ndarray], threads: int) -> dict[str, Restored]:
    """By name the files of which `read` gave this. Raises ValueError where it does not fit the tensors."""
    found = dict(zip(names_in(origins), (_restored(origin, arrays, threads) for origin in origins)))
    places = Counter(cut[1] for origin in origins for cut in origin["cuts"])
    if places and (most := places.most_common(1)[0])[1] > _MOST_PLACES:
        raise ValueError(f"the tensor {most[0][:200]!r} stands in {most[1]} places; expected {_MOST_PLACES} at most")
    return found


def _restored(origin: Mapping[str, Any], arrays: Mapping[str, np.ndarray], threads: int) -> Restored:
    given, cuts, used = arrays.get(origin["name"]), origin.get("cuts"), 0
    if given is None or type(cuts) is not list:
        raise ValueError(f"nothing is there of {origin['name'][:200]!r}")
    for cut in cuts:
        if not _is_cut(cut) or not used <= cut[0] <= len(given) or cut[1] not in arrays:
            raise ValueError(f"a place {str(cut)[:100]} of a tensor in {origin['name'][:200]!r}")
        used = cut[0]
    frame, with_crc = given.copy(), [cut for cut in cuts if cut[2]]
    crcs = ordered_map(zlib.crc32, [arrays[tensor] for _, tensor, _ in with_crc], threads)
    for (_, _, places), crc32 in zip(with_crc, crcs):
        for place in places:
            if place + 4 > len(frame):
                raise ValueError(f"a place {place} of a crc32 in a frame of {len(frame)} bytes")
            frame[place : place + 4] = np.frombuffer(crc32.to_bytes(4, "little"), np.uint8)
    return Restored(frame, [(start, arrays[tensor]) for start, tensor, _ in cuts])


def _is_cut(cut: Any) -> bool:
    if type(cut) is not list or len(cut) != 3 or not is_count(cut[0]) or type(cut[1]) is not str:
        return False
    return type(cut[2]) is list and all(map(is_count, cut[2]))
