"""Whether two objects out of torch.load are the same: to the bit, and with the same storages shared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def assert_same_object(ours: Any, theirs: Any) -> None:
    """Raises AssertionError naming the first place that differs."""
    shared: dict[int, int] = {}
    _compare(ours, theirs, "", shared, [])
    assert len(set(shared.values())) == len(shared), "storages are shared that were not"


def _compare(ours: Any, theirs: Any, place: str, shared: dict[int, int], alive: list[Any]) -> None:
    assert type(ours) is type(theirs), f"{place}: {type(ours)} and {type(theirs)}"
    if isinstance(ours, Tensor):
        _compare_tensors(ours, theirs, place)
        if ours.layout == torch.strided:
            one, other = ours.untyped_storage(), theirs.untyped_storage()
            alive += [one, other]
            if one.nbytes():
                assert shared.setdefault(other._cdata, one._cdata) == one._cdata, f"{place}: shared otherwise"
    elif torch.is_storage(ours):
        assert bytes(ours) == bytes(theirs), place
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), place
        for key in ours:
            _compare(ours[key], theirs[key], f"{place}/{key}", shared, alive)
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), place
        for index, (one, other) in enumerate(zip(ours, theirs)):
            _compare(one, other, f"{place}/{index}", shared, alive)
    elif hasattr(ours, "__dict__") and type(ours).__eq__ is object.__eq__:
        _compare(vars(ours), vars(theirs), place, shared, alive)
    else:
        assert ours == theirs or ours != ours, f"{place}: {ours!r} and {theirs!r}"


def _compare_tensors(ours: Tensor, theirs: Tensor, place: str) -> None:
    for about in ("dtype", "shape", "layout", "requires_grad", "device", "is_quantized"):
        assert getattr(ours, about) == getattr(theirs, about), f"{place}: {about}"
    assert getattr(ours, "tag", None) == getattr(theirs, "tag", None), place
    if ours.layout != torch.strided:
        ours, theirs = ours.to_dense(), theirs.to_dense()
    elif ours.is_quantized:
        ours, theirs = ours.int_repr(), theirs.int_repr()
    else:
        assert (ours.stride(), ours.storage_offset()) == (theirs.stride(), theirs.storage_offset()), place
        assert (ours.is_conj(), ours.is_neg()) == (theirs.is_conj(), theirs.is_neg()), place
    assert bits(ours) == bits(theirs), f"{place}: values differ"


def bits(tensor: Tensor) -> bytes:
    """The raw bytes of its values."""
    values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return values.view(torch.uint8).numpy().tobytes() if values.numel() else b""
