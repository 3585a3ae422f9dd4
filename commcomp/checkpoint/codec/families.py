"""Tensors that are coded together: a weight, its moments, and its moving averages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from commcomp.checkpoint.averages import find_averages
from commcomp.checkpoint.coded import HostTensor, Reference, TreeInfo
from commcomp.checkpoint.roles import Moments, find_moments


@dataclass(frozen=True)
class Family:
    """Tensors that are coded together: a weight and its moments, or one alone."""

    weight: str | None
    first: str | None = None
    second: str | None = None
    largest: str | None = None
    moments: Moments | None = None
    averages: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        own = (self.weight, self.first, self.second, self.largest, *self.averages)
        return [name for name in own if name is not None]


def families_of(
    names: list[str], tensors: Mapping[str, HostTensor], info: TreeInfo, previous: Reference | None
) -> list[Family]:
    """The named tensors, each in one family."""
    left = dict.fromkeys(names)
    families = []

    def take(name: str | None) -> str | None:
        return None if name is None or left.pop(name, 0) == 0 else name

    for moments in find_moments(tensors, info, None if previous is None else previous.tree_info):
        roles = [moments.weight, moments.first, moments.second, moments.largest]
        told = [name for name in roles if name is not None]
        if len(set(told)) < len(told):
            continue  # one tensor in two roles would be coded against itself
        weight, largest = take(moments.weight), take(moments.largest)
        family = Family(weight, take(moments.first), take(moments.second), largest, moments)
        if family.names:
            families.append(family)
    return families + [Family(name) for name in left]


def with_averages(families: list[Family], names: list[str], info: TreeInfo) -> list[Family]:
    """The families with the moving averages of their weights, which are none of their own then."""
    of_weight: dict[str, list[str]] = {}
    alone = {family.weight for family in families if family.moments is None}
    for name, weight in find_averages(names, info).items():
        if name in alone:
            of_weight.setdefault(weight, []).append(name)
    weights = {family.weight for family in families}
    moved = {name for weight, averages in of_weight.items() if weight in weights for name in averages}
    return [
        replace(family, averages=tuple(of_weight.get(family.weight or "", ())))
        for family in families
        if family.weight not in moved
    ]
