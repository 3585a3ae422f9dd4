"""Which tensors of a state are an optimizer's moments, of which weight, and with which numbers.

Told by structure: what stands beside a tensor named exp_avg_sq, exp_avg or momentum_buffer, the parameter groups of
the same optimizer, and the weights of the same shape in the same order; flattened names (flat_names.py) are nested
again before. Where that is not told the lossy modes keep the weight exactly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from commcomp.checkpoint.averages import is_of_average
from commcomp.checkpoint.coded import HostTensor, TreeInfo
from commcomp.checkpoint.flat_names import nested_views
from commcomp.checkpoint.state_tree import TensorPlace

Path = tuple[Any, ...]

FIRST, SECOND, STEP = "exp_avg", "exp_avg_sq", "step"
LARGEST = "max_exp_avg_sq"
MOMENTUM = "momentum_buffer"
_MOMENTS = (FIRST, SECOND, MOMENTUM)


@dataclass(frozen=True)
class Moments:
    """One parameter's moments by name, what they belong to, and the optimizer's numbers as far as they are known.

    `first` is Adam's first moment, or SGD's momentum, which goes without a second; `largest` what the second one has
    been at the most, of amsgrad.
    """

    first: str | None
    second: str | None
    largest: str | None
    weight: str | None
    step: str | float | None
    """The name of the tensor that counts the steps, or their number."""
    step_before: str | float | None
    """The same in the parent snapshot."""
    beta1: float
    beta2: float
    epsilon: float
    rate: float | None
    """The learning rate, as far as it is known."""
    is_momentum: bool = False
    """Whether `first` is SGD's."""


def find_moments(
    tensors: Mapping[str, HostTensor], info: TreeInfo, parent: TreeInfo | None = None
) -> list[Moments]:
    """Every parameter with moments, in the order of the state; of sharded ones every shard.

    `parent`: of the parent snapshot, whose step counts are looked up by the moments' names.
    """
    before = {} if parent is None else _step_counts(parent)
    return [moments for view in _views(info) for moments in _of_nested(tensors, view, before)]


def _views(info: TreeInfo) -> list[TreeInfo]:
    return nested_views(info) or [info]


def _step_counts(info: TreeInfo) -> dict[str, str | float | None]:
    """By the names of moments, what counts the steps."""
    found = {}
    for view in _views(info):
        groups = _Groups(view.skeleton)
        for name, paths in view.paths.items():
            for path in paths:
                if path and path[-1] in _MOMENTS:
                    found[name] = _step_count(view.skeleton, path[:-1], groups.of(path[:-1]))
    return found


def _of_nested(
    tensors: Mapping[str, HostTensor], info: TreeInfo, before: Mapping[str, str | float | None]
) -> list[Moments]:
    states = _states(tensors, info)
    weights = _weights(states, tensors, info)
    groups, found = _Groups(info.skeleton), []
    for path, names in states.items():
        group = groups.of(path)
        beta1, beta2 = _betas(group.get("betas"))
        epsilon = _number(group.get("eps"))
        found.append(
            Moments(
                first=names.get(FIRST, names.get(MOMENTUM)),
                second=names.get(SECOND),
                largest=_name_at(info.skeleton, (*path, LARGEST), tensors) if SECOND in names else None,
                weight=weights.get(path),
                step=_step_count(info.skeleton, path, group),
                step_before=before.get(next(iter(names.values()))),
                beta1=beta1,
                beta2=beta2,
                epsilon=1e-8 if epsilon is None else epsilon,
                rate=_rate(group.get("lr"), tensors),
                is_momentum=MOMENTUM in names and FIRST not in names and SECOND not in names,
            )
        )
    return found


def _name_at(skeleton: Any, path: Path, tensors: Mapping[str, HostTensor]) -> str | None:
    """Of the tensor there, if one is."""
    place = _get(skeleton, path)
    return place.name if type(place) is TensorPlace and place.name in tensors else None


def _step_count(skeleton: Any, path: Path, group: Mapping[str, Any]) -> str | float | None:
    """Of the state at `path`: its own, else that of its parameter group, where fused optimizers keep it."""
    for count in (_get(skeleton, (*path, STEP)), group.get(STEP)):
        if type(count) is TensorPlace:
            return count.name
        if (number := _number(count)) is not None:
            return number
    return None


def _states(tensors: Mapping[str, HostTensor], info: TreeInfo) -> dict[Path, dict[str, str]]:
    """By where a parameter's optimizer state stands: its moments' names."""
    states: dict[Path, dict[str, str]] = {}
    for name in tensors:
        for path in info.paths.get(name, ()):
            if path and path[-1] in _MOMENTS:
                states.setdefault(path[:-1], {})[path[-1]] = name
    return states


def _weights(
    states: Mapping[Path, Mapping[str, str]], tensors: Mapping[str, HostTensor], info: TreeInfo
) -> dict[Path, str]:
    """Whose moments they are: by the parameter's own name where states go by it, else by shape and order."""
    in_optimizers = {path[: path.index("state")] for path in states if "state" in path}
    candidates = {
        name: paths
        for name, paths in info.paths.items()
        if name in tensors and not any(path[: len(root)] == root for path in paths for root in in_optimizers if root)
    }
    originals = {name: paths for name, paths in candidates.items() if not any(map(is_of_average, paths))}
    by_key: dict[str, set[str]] = {}
    for name, places in originals.items():
        for path in filter(None, places):
            by_key.setdefault(str(path[-1]), set()).add(name)
    found: dict[Path, str] = {}
    left: dict[tuple[int, ...], list[Path]] = {}
    for path, names in states.items():
        shape = tensors[next(iter(names.values()))].shape
        if path and isinstance(path[-1], str) and path[-1] in by_key:
            named = [name for name in by_key[path[-1]] if tensors[name].shape == shape]
            if len(named) == 1:  # else which one it is is anybody's guess
                found[path] = named[0]
        else:
            left.setdefault(shape, []).append(path)
    taken = set(found.values())
    for shape, paths in left.items():
        same = [name for name in originals if tensors[name].shape == shape and name not in taken]
        if len(same) == len(paths):  # else which ones are left out is anybody's guess
            found.update(zip(_in_order(paths), same, strict=True))
    return found


def _in_order(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (0, path[-1]) if isinstance(path[-1], int) else (1, 0))


class _Groups:
    """The parameter groups of a state's optimizers, looked up once."""

    def __init__(self, skeleton: Any) -> None:
        self._skeleton = skeleton
        self._by_member: dict[Path, dict[Any, Mapping[str, Any]]] = {}
        self._first: dict[Path, Mapping[str, Any]] = {}

    def of(self, path: Path) -> Mapping[str, Any]:
        """The group that a state belongs to; the first one where that cannot be told."""
        if "state" not in path:
            return {}
        root = path[: path.index("state")]
        if root not in self._first:
            self._read(root)
        return self._by_member[root].get(path[-1], self._first[root])

    def _read(self, root: Path) -> None:
        groups = _get(self._skeleton, (*root, "param_groups"))
        usable = [group for group in groups if isinstance(group, dict)] if isinstance(groups, (list, tuple)) else []
        self._first[root] = usable[0] if usable else {}
        found = self._by_member[root] = {}
        for group in usable:
            members = group.get("params")
            for member in members if isinstance(members, (list, tuple)) else ():
                if isinstance(member, (int, str)):
                    found.setdefault(member, group)


def _get(skeleton: Any, path: Path) -> Any:
    for key in path:
        if isinstance(skeleton, dict):
            skeleton = skeleton.get(key)
        elif isinstance(skeleton, (list, tuple)) and isinstance(key, int) and key < len(skeleton):
            skeleton = skeleton[key]
        else:
            return None
    return skeleton


def _rate(given: Any, tensors: Mapping[str, HostTensor]) -> float | None:
    """A learning rate, which compiled and capturable optimizers have as a tensor."""
    if type(given) is TensorPlace and (tensor := tensors.get(given.name)) is not None:
        return number_of(tensor.data, tensor.dtype)
    return _number(given)


def _betas(given: Any) -> tuple[float, float]:
    """Adam's, or its usual ones where these are none."""
    betas = [_number(beta) for beta in given] if isinstance(given, (list, tuple)) else []
    known = [beta for beta in betas if beta is not None and 0 <= beta < 1]
    return (known[0], known[1]) if len(known) == len(betas) == 2 else (0.9, 0.999)


def _number(value: Any) -> float | None:
    """A finite number as fp64; None for all else."""
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return _finite(float(value))
    return None


def number_of(data: np.ndarray[Any, np.dtype[Any]], dtype: str) -> float | None:
    """What the raw bytes of a tensor of one value hold; None where that is no number."""
    kind = {"float32": np.float32, "float64": np.float64, "int64": np.int64, "int32": np.int32}.get(dtype)
    if kind is None or len(data) != np.dtype(kind).itemsize:
        return None
    return _finite(float(data.view(kind)[0]))


def _finite(number: float) -> float | None:
    return number if np.isfinite(number) else None
