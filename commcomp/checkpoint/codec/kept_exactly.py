"""What a lossy mode keeps exactly because it was not recognised: said once, with the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from commcomp.checkpoint.codec.families import Family
from commcomp.checkpoint.codec.matrices import matrix_shape
from commcomp.checkpoint.coded import HostTensor
from commcomp.checkpoint.roles import FIRST, MOMENTUM, SECOND
from commcomp.complaint import warn

LEAST_SIDE = 16
"""Smaller matrices, and vectors, are kept exactly."""
_LARGE_VECTOR = 1 << 16
_FLOATS = ("float64", "float32", "bfloat16", "float16")
_MOST_NAMES = 3

_said: set[str] = set()
"""In this process: a writer of torch.distributed.checkpoint serves one save, and would say it at each."""


def is_matrix(tensor: HostTensor) -> bool:
    """Whether a lossy mode codes tensors of this kind."""
    return tensor.dtype == "float32" and min(matrix_shape(tensor.shape)) >= LEAST_SIDE


def tell(families: Sequence[Family], lossy: Sequence[Family], tensors: Mapping[str, HostTensor]) -> None:
    """Warn where nothing was found that could be coded lossily, or moments whose weights are not told."""
    problem = _weights_not_told(lossy, tensors) if lossy else _nothing_lossy(families, tensors)
    if problem and problem not in _said:
        _said.add(problem)
        warn(problem)


def _nothing_lossy(families: Sequence[Family], tensors: Mapping[str, HostTensor]) -> str:
    large = [tensor for tensor in tensors.values() if _is_large(tensor)]
    if not large:
        return ""
    known = [family for family in families if family.first is not None or family.second is not None]
    found = f"{_some(large)}, and no tensor named {FIRST}, {SECOND} or {MOMENTUM}"
    if known:
        moments = [tensors[name] for family in known for name in (family.first, family.second) if name is not None]
        found = f"as moments {_some(moments)}"
    return (
        "this state is kept exactly, though a lossy mode was asked for. It codes float32 matrices (sides of "
        f"{LEAST_SIDE} and more) with their {FIRST} and {SECOND}, or {MOMENTUM}, as torch's optimizers name them; "
        f"found: {found}. Save the optimizer's state_dict() in the same state, after its first step, with matrices in "
        "their own shapes and in float32; or choose mode='lossless'"
    )


def _weights_not_told(lossy: Sequence[Family], tensors: Mapping[str, HostTensor]) -> str:
    """Moments without a weight beside exact matrices of the same shape, one of which must be it."""
    coded = {name for family in lossy for name in family.names}
    left = [tensor for name, tensor in tensors.items() if name not in coded and is_matrix(tensor)]
    shapes = {tensor.shape for tensor in left}
    homeless = [tensors[family.first] for family in lossy if family.weight is None and family.first is not None]
    homeless = [tensor for tensor in homeless if tensor.shape in shapes]
    if not homeless:
        return ""
    alike = [tensor for tensor in left if tensor.shape == homeless[0].shape]
    return (
        f"weights are kept exactly, though a lossy mode was asked for: of {len(homeless)} moments the names, and "
        f"shapes and order, do not tell which weight is theirs: {homeless[0].name[:100]!r} could be of {_some(alike)}. "
        "Name averages of weights so (a key with ema, swa, average, shadow or teacher in it), leave other copies out, "
        "or name the optimizer's states as the weights (torch.distributed.checkpoint.state_dict.get_state_dict does)"
    )


def _is_large(tensor: HostTensor) -> bool:
    if tensor.dtype not in _FLOATS:
        return False
    sides = matrix_shape(tensor.shape)
    return min(sides) >= LEAST_SIDE or sides[0] * sides[1] >= _LARGE_VECTOR


def _some(tensors: Sequence[HostTensor]) -> str:
    """A few by name, dtype and shape."""
    names = [f"{tensor.name[:100]!r} ({tensor.dtype} {list(tensor.shape)})" for tensor in tensors[:_MOST_NAMES]]
    more = len(tensors) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
