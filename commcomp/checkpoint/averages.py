"""Which tensors of a state are moving averages of its weights (EMA, SWA), and of which."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from commcomp.checkpoint.coded import TreeInfo

Path = tuple[Any, ...]

_WORDS = {"ema", "swa", "average", "averaged", "averages", "shadow", "teacher"}
_WRAPPED = ("module.", "_orig_mod.")
"""What AveragedModel, DistributedDataParallel and torch.compile put before a weight's name."""


def is_of_average(path: Path) -> bool:
    """Whether a weight stands among averages of weights, as their names tell."""
    return any(_WORDS & set(re.split(r"[^a-z]+", str(part).lower())) for part in path[:-1])


def find_averages(names: Collection[str], info: TreeInfo) -> dict[str, str]:
    """Of each tensor that its place tells to be an average, the one that has the same name elsewhere: its weight.

    `names`: of tensors among which both are. Left out is what no weight, or more than one, could belong to, and what
    stands in a weight's place too.
    """
    averages: dict[str, Path] = {}
    weights: dict[Path, set[str]] = {}
    for name in names:
        for path in info.paths.get(name, ()):
            key = _key(path)
            if is_of_average(path):
                averages.setdefault(name, key)
            elif key:
                weights.setdefault(key, set()).add(name)
    originals = set().union(*weights.values())
    found = {}
    for name, key in averages.items():
        named = weights.get(key, set())
        if len(named) == 1 and name not in originals:  # else averages could go round in a circle
            found[name] = next(iter(named))
    return found


def _key(path: Path) -> Path:
    """A place without what it stands in, and without wrappers; of flattened names with the shard's offset."""
    if not path or type(path[0 if _is_flat(path) else -1]) is not str:
        return ()
    name, offset = (path[0].partition(".")[2], path[1]) if _is_flat(path) else (path[-1], ())
    while name.startswith(_WRAPPED):
        name = name.partition(".")[2]
    return (name, offset)


def _is_flat(path: Path) -> bool:
    """As flat_names.py has it: (name, offset)."""
    return len(path) == 2 and type(path[0]) is str and type(path[1]) is tuple
