"""Shards under flattened names, as torch.distributed.checkpoint has them, seen as nested states again.

Such a state is {name: {offset: shard}}: "optim.state.<weight>.exp_avg" beside "model.<weight>", dots in both. What
belongs together has the same offset; the optimizer's step counts have none, and may be plain values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from commcomp.checkpoint.coded import TreeInfo
from commcomp.checkpoint.state_tree import TensorPlace

Offset = tuple[int, ...]

PLAIN_VALUE = "value"
"""Key, beside offsets, of what a non-tensor item says."""
_FIELDS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
_STATE, _GROUPS = "state", "param_groups"
_MOST_WAYS = 4
"""Of reading a name: those of a file may be made so that there are very many."""


def nested_views(info: TreeInfo) -> list[TreeInfo]:
    """One nested state for each offset at which there are moments; none where the names are not flattened.

    A view has the optimizers' states under the names of their weights, and the weights under the same.
    """
    shards: dict[tuple[str, Offset], str] = {}  # tensor names
    for name, paths in info.paths.items():
        for path in paths:
            if len(path) == 2 and type(path[0]) is str and type(path[1]) is tuple:
                shards[path] = name
    if not shards:
        return []
    owners = Owners(key for key, _ in shards)
    offsets = dict.fromkeys(offset for key, offset in shards if key in owners and owners[key][2] != "step")
    return [_view(info, shards, owners, offset) for offset in offsets]


class Owners:
    """Of each flattened name of an optimizer's state: (optimizer, weight, field); "" is an optimizer without name."""

    def __init__(self, keys: Iterator[str]) -> None:
        split = {key: list(_splits(key)) for key in keys}
        possible = {weight for found in split.values() for _, weight, _ in found}
        endings = {end for key, found in split.items() if not found for end in _endings(key) if end in possible}
        self._found = {
            key: next((one for one in found if one[1] in endings), found[0]) for key, found in split.items() if found
        }
        self._weights = {weight for _, weight, _ in self._found.values()}

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> tuple[str, str, str]:
        return self._found[key]

    def weight_of(self, key: str) -> str | None:
        """Under which name optimizers have the tensor that is no optimizer's; None if none has it."""
        return next((ending for ending in _endings(key) if ending in self._weights), None)

    def family_of(self, key: str) -> str:
        """One name for a weight and all that optimizers keep of it."""
        return self._found[key][1] if key in self._found else self.weight_of(key) or key


def _splits(key: str) -> Iterator[tuple[str, str, str]]:
    """The first ways to read `key` as [optimizer.]state.weight.field."""
    rest, _, field = key.rpartition(".")
    if field not in _FIELDS:
        return
    parts = rest.split(".")
    places = [place for place, part in enumerate(parts[:-1]) if part == _STATE]
    for place in places[:_MOST_WAYS]:
        yield ".".join(parts[:place]), ".".join(parts[place + 1 :]), field


def _endings(key: str) -> Iterator[str]:
    """`key` and what is behind each of its dots, the longest first."""
    yield key
    while "." in key:
        key = key.partition(".")[2]
        yield key


def _view(info: TreeInfo, shards: Mapping[tuple[str, Offset], str], owners: Owners, offset: Offset) -> TreeInfo:
    skeleton: dict[str, Any] = {}
    paths: dict[str, list[tuple[Any, ...]]] = {}
    taken: set[str] = set()
    here = {owners[key][:2] for key, at in shards if at == offset and key in owners and owners[key][2] != "step"}
    for (key, at), name in shards.items():
        path: tuple[Any, ...]
        if key in owners:
            optimizer, weight, field = owners[key]
            if at != (() if field == "step" else offset) or (optimizer, weight) not in here:
                continue
            path = (optimizer, _STATE, _number(weight), field)
            if optimizer not in skeleton:
                skeleton[optimizer] = {_STATE: {}, _GROUPS: _groups(info, owners, optimizer)}
            skeleton[optimizer][_STATE].setdefault(_number(weight), {})[field] = TensorPlace(name)
        elif at == offset:
            known = owners.weight_of(key)
            path = (key,) if known is None or known in taken else ("weights", known)
            taken.add(known or key)
        else:
            continue
        paths.setdefault(name, []).append(path)
    for optimizer, weight in here:
        item = info.skeleton.get(".".join(filter(None, (optimizer, _STATE, weight, "step"))))
        if isinstance(item, dict) and PLAIN_VALUE in item:
            skeleton[optimizer][_STATE][_number(weight)].setdefault("step", item[PLAIN_VALUE])
    return TreeInfo(info.step, skeleton, {name: tuple(found) for name, found in paths.items()})


def _groups(info: TreeInfo, owners: Owners, optimizer: str) -> list[dict[str, Any]]:
    """An optimizer's parameter groups; one a weight where its state was flattened with torch's options."""
    root = f"{optimizer}.{_GROUPS}." if optimizer else f"{_GROUPS}."
    groups: dict[str, dict[str, Any]] = {}
    for key, item in info.skeleton.items():
        if type(key) is str and key.startswith(root) and isinstance(item, dict) and PLAIN_VALUE in item:
            whose, _, field = key[len(root) :].rpartition(".")
            groups.setdefault(whose, {})[field] = item[PLAIN_VALUE]
    for whose, group in groups.items():
        group.setdefault("params", [whose])
    return list(groups.values())


def _number(text: str) -> Any:
    """Raw optimizers count their weights."""
    return int(text) if text.isascii() and text.isdigit() else text
