"""Which rank writes what several ranks have: a weight goes with its moments, since they are coded together."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from commcomp.checkpoint.flat_names import Owners


def keep_families_together(plans: Sequence[SavePlan], has: Sequence[set[MetadataIndex]]) -> list[SavePlan]:
    """Plans for the same items, each on one of the ranks that has it; `has`: what each rank has of its own.

    Ranks get about equally many bytes. Plans that have each item on its lowest rank stay: that was asked for.
    """
    holders: dict[MetadataIndex, tuple[int, ...]] = {}
    for plan in plans:
        for item in plan.items:
            holders[item.index] = tuple(rank for rank, indices in enumerate(has) if item.index in indices)
    items = [(rank, item) for rank, plan in enumerate(plans) for item in plan.items]
    movable = [(rank, item) for rank, item in items if len(holders[item.index]) > 1]
    if all(rank == holders[item.index][0] for rank, item in movable):
        return list(plans)
    owners = Owners(index.fqn for index in holders)
    loads = [0] * len(plans)
    for rank, item in items:
        if len(holders[item.index]) < 2:
            loads[rank] += _num_bytes(item)
    families: dict[tuple[str, tuple[int, ...]], list[WriteItem]] = defaultdict(list)
    for _, item in sorted(movable, key=lambda pair: (pair[1].index.fqn, pair[1].index.offset or ())):
        families[owners.family_of(item.index.fqn), holders[item.index]].append(item)
    chosen: dict[MetadataIndex, int] = {}
    for (_, ranks), members in sorted(families.items(), key=lambda pair: -sum(map(_num_bytes, pair[1]))):
        rank = min(ranks, key=loads.__getitem__)
        loads[rank] += sum(map(_num_bytes, members))
        chosen.update((item.index, rank) for item in members)
    placed: list[list[WriteItem]] = [[] for _ in plans]
    for rank, item in items:
        placed[chosen.get(item.index, rank)].append(item)
    return [dataclasses.replace(plan, items=mine) for plan, mine in zip(plans, placed)]


def _num_bytes(item: WriteItem) -> int:
    """Of the part that is written; non-tensor items count for one."""
    if item.tensor_data is None:
        return 1
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
