"""A rank's part of a checkpoint as a state: {name: {offset: shard}}, as flat_names.py reads it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType

from commcomp.checkpoint.flat_names import PLAIN_VALUE, Owners
from commcomp.checkpoint.state_tree import SplitState, split

_BYTES = "bytes"
_PLAIN = (type(None), bool, int, float, str)


def shards_of(
    items: Iterable[WriteItem], own: Iterable[WriteItem], planner: SavePlanner
) -> tuple[SplitState, dict[MetadataIndex, str]]:
    """The state to write, and under which name it has each of `items`.

    `own`: what the rank could have written. The step counts of the weights that it writes are put in, whoever else
    has them too, and the numbers of the optimizer as plain values: they make the rest smaller.
    Raises TypeError naming what a snapshot cannot hold.
    """
    items, own = list(items), list(own)
    tree: dict[str, dict[Any, Any]] = {}
    for item in items:
        tree.setdefault(item.index.fqn, {})[_key(item)] = _value(item, planner)
    owners = Owners(item.index.fqn for item in own)
    families = {owners.family_of(item.index.fqn) for item in items}
    for item in own:
        name = item.index.fqn
        counts = name in owners and owners[name][2] == "step" and owners.family_of(name) in families
        if item.type == WriteItemType.BYTE_IO:
            value = _plain_value(item, planner) if counts or "param_groups." in name else _NOTHING
            if value is not _NOTHING:
                tree.setdefault(name, {})[PLAIN_VALUE] = value
        elif counts and name not in tree and not item.index.offset:
            tree[name] = {(): _value(item, planner)}
    state = split(tree)
    return state, {item.index: state.skeleton[item.index.fqn][_key(item)].name for item in items}


def _key(item: WriteItem) -> Any:
    return _BYTES if item.type == WriteItemType.BYTE_IO else tuple(item.index.offset or ())


def _value(item: WriteItem, planner: SavePlanner) -> Tensor | np.ndarray:
    value = planner.resolve_data(item)
    if not isinstance(value, Tensor):
        return np.frombuffer(value.getvalue(), np.uint8)
    assert item.tensor_data is not None
    if value.shape != item.tensor_data.chunk.sizes:
        raise ValueError(
            f"the planner resolved {item.index.fqn!r} at offset {tuple(item.index.offset or ())} to a tensor of shape "
            f"{tuple(value.shape)}; its plan says {tuple(item.tensor_data.chunk.sizes)}"
        )
    return value.detach()


_NOTHING = object()


def _plain_value(item: WriteItem, planner: SavePlanner) -> Any:
    """What a number of an optimizer is, where the planner tells (DefaultSavePlanner does)."""
    look_up = getattr(planner, "lookup_object", None)
    if look_up is None:
        return _NOTHING
    value = look_up(item.index)
    parts = value if type(value) in (list, tuple) else [value]
    return value if all(type(part) in _PLAIN for part in parts) else _NOTHING
