"""Which `.distcp` files of a folder are packed together: those that hold parts of one weight and its moments.

With FSDP each rank's file stands for itself; with DDP, where the ranks share the work of saving, a weight may lie in
one file and its moments in another.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from commcomp.checkpoint.command_line.distcp import metadata
from commcomp.checkpoint.command_line.distcp.metadata import Item
from commcomp.checkpoint.command_line.distcp.settings import is_setting, setting_in
from commcomp.checkpoint.flat_names import Owners

_NAME = ".metadata"
_RANK = re.compile(r"__(\d+)_")


@dataclass(frozen=True)
class Group:
    """`names`: files of one folder, in order, of which the first gives the packed file its name."""

    names: tuple[str, ...]
    items: Mapping[str, tuple[Item, ...]]
    """By file, those that lie in it, in order."""
    steps: tuple[Item, ...]
    """Of other files: how many steps the optimizer has made with the weights of these."""
    settings: Mapping[str, Any]
    """Of an optimizer, by name, in whatever file they lie."""
    roles: Mapping[str, bool]
    """By the names of weights, whether an optimizer has moments of them."""


def group_of(path: str) -> Group:
    """The files that a `.distcp` file is packed with, all of which are there.

    Raises ValueError naming why it cannot be read, or which of them is missing; OSError.
    """
    folder, name = os.path.split(path)
    rank = _RANK.match(name)
    found = []
    for described in (_NAME, f"__{rank[1]}{_NAME}" if rank else None):  # the second without collectives
        if described is not None and os.path.isfile(at := os.path.join(folder, described)):
            stat = os.stat(at)
            found.append(at)
            groups = _groups(at, stat.st_mtime_ns, stat.st_size)
            if isinstance(groups, ValueError):
                raise ValueError(str(groups))
            if name in groups:
                for other in groups[name].names:
                    if not os.path.isfile(os.path.join(folder, other)):
                        raise ValueError(f"{path}: {other} is missing, which by {at} belongs with it")
                return groups[name]
    if not found:
        raise ValueError(f"{path}: {os.path.join(folder, _NAME)} is missing, which says what it holds")
    raise ValueError(f"{path}: {' and '.join(found)} say nothing of it")


def leads(path: str) -> bool:
    """Whether a `.distcp` file is the first of its group."""
    try:
        return group_of(path).names[0] == os.path.basename(path)
    except ValueError:
        return False


@lru_cache(maxsize=4)
def _groups(path: str, changed_ns: int, num_bytes: int) -> dict[str, Group] | ValueError:
    """By each file's name its group, as this `.metadata` has them; or why it cannot be read."""
    try:
        items = metadata.read(path)
    except ValueError as error:
        return error
    owners = Owners(iter(dict.fromkeys(item.name for item in items)))
    of_file: dict[str, list[Item]] = {}
    for item in items:
        of_file.setdefault(item.file, []).append(item)
    leaders = _joined(items, owners)
    members: dict[str, list[str]] = {}
    for file in sorted(of_file):
        members.setdefault(leaders[file], []).append(file)
    folder = os.path.dirname(path)
    settings = {item.name: setting_in(folder, item) for item in items if is_setting(item)}
    known = {name: value for name, value in settings.items() if value is not None}
    steps = {owners[item.name][1]: item for item in items if _is_step(item, owners)}
    groups = {}
    for files in members.values():
        own = {file: tuple(of_file[file]) for file in files}
        families = dict.fromkeys(owners.family_of(item.name) for items in own.values() for item in items)
        others = [steps[family] for family in families if family in steps and steps[family].file not in own]
        names = dict.fromkeys(item.name for items in own.values() for item in items if item.offset is not None)
        roles = {name: owners.weight_of(name) is not None for name in names if name not in owners}
        groups.update(dict.fromkeys(files, Group(tuple(files), own, tuple(others), known, roles)))
    return groups


def _joined(items: Iterable[Item], owners: Owners) -> dict[str, str]:
    """By each file's name that of one of its group, of all of them the same."""
    leaders: dict[str, str] = {}
    holders: dict[tuple[str, metadata.Offset], str] = {}

    def leader(file: str) -> str:
        while leaders.setdefault(file, file) != file:
            leaders[file] = leaders[leaders[file]]
            file = leaders[file]
        return file

    counted = any(owners[item.name][1].isdigit() for item in items if item.name in owners)
    for item in items:
        own = leader(item.file)
        if item.offset is not None and not _is_step(item, owners):
            family = "" if counted else owners.family_of(item.name)  # whose moments number 3 is, all of them tell
            other = holders.setdefault((family, item.offset), own)
            leaders[own] = leader(other)
    return {file: leader(file) for file in list(leaders)}


def _is_step(item: Item, owners: Owners) -> bool:
    return item.name in owners and owners[item.name][2] == "step"
