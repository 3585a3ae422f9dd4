"""A state dict taken apart into a skeleton and its tensors, each once, and put together again."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commcomp.checkpoint.dtypes import NUMPY_DTYPES, TORCH_DTYPES, dtype_name
from commcomp.checkpoint.hashing import text_hash

Path = tuple[Any, ...]

MAX_DEPTH = 100
MAX_NAME_BYTES = 4096
_ATTRIBUTE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.Size)


@dataclass(frozen=True)
class TensorPlace:
    """Stands in a skeleton where the state dict has a tensor, or a numpy array."""

    name: str
    is_array: bool = False


@dataclass(frozen=True)
class SplitState:
    """`skeleton`: new containers with a `TensorPlace` for each tensor; `tensors`: each once, by name."""

    skeleton: Any
    tensors: dict[str, Tensor | np.ndarray]
    paths: dict[str, tuple[Path, ...]]


def path_text(path: Path) -> str:
    """How a place in a state dict is written, and the name of the tensor there: model/layer.weight."""
    return "/".join(str(key) for key in path)


def split(state: Any) -> SplitState:
    """Take a state dict apart; no tensor is copied.

    Tensors that share storage, offset, shape, strides and dtype are one. Raises TypeError naming the place of what a
    snapshot cannot hold, ValueError where it is nested deeper than `MAX_DEPTH` or holds itself.
    """
    splitter = _Splitter()
    skeleton = splitter.visit(state, ())
    return SplitState(skeleton, splitter.tensors, {name: tuple(paths) for name, paths in splitter.paths.items()})


class _Splitter:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor | np.ndarray] = {}
        self.paths: dict[str, list[Path]] = {}
        self._names: dict[Any, str] = {}  # by what makes two tensors the same one

    def visit(self, value: Any, path: Path) -> Any:
        if len(path) > MAX_DEPTH:
            raise ValueError(
                f"{path_text(path[:6])}/...: the state dict is nested deeper than {MAX_DEPTH} levels, or holds itself"
            )
        kind = type(value)
        if kind in (dict, OrderedDict):
            return self._mapping(value, path)
        if kind in (list, tuple):
            return kind(self.visit(item, (*path, index)) for index, item in enumerate(value))
        if isinstance(value, Tensor):
            _require_supported(value, path)
            return TensorPlace(self._named(_tensor_identity(value), value, path))
        if kind is np.ndarray:
            _require_numpy_dtype(value.dtype, path)
            return TensorPlace(self._named(_array_identity(value), value, path), is_array=True)
        if isinstance(value, np.generic):
            _require_numpy_dtype(value.dtype, path)
            return value
        if kind in _PLAIN:
            _require_plain(value, path)
            return value
        raise TypeError(
            f"{_place(path)} is a {kind.__module__}.{kind.__qualname__}, which a snapshot cannot hold; expected "
            "tensors, numpy arrays, dict, OrderedDict, list, tuple, None, bool, int, float, complex, str, bytes: "
            "convert it (a namedtuple to a tuple, an object to its state_dict()) or leave it out"
        )

    def _mapping(self, value: dict[Any, Any], path: Path) -> Any:
        result: dict[Any, Any] = type(value)()
        for key, item in type(value).items(value):  # an attribute may have taken the method's name
            _require_key(key, path, len(path) + 1)
            result[key] = self.visit(item, (*path, key))
        for attribute, item in getattr(value, "__dict__", {}).items():  # Module.state_dict() hangs _metadata on it
            if not is_attribute(attribute):
                raise TypeError(
                    f"{_place(path)} is an OrderedDict with an attribute {str(attribute)[:80]!r}; a snapshot holds "
                    "those with a name of ASCII letters, digits and _ that OrderedDict itself does not have: make it "
                    "an item"
                )
            setattr(result, attribute, self.visit(item, (*path, f"<attribute {attribute}>")))
        return result

    def _named(self, identity: Any, value: Tensor | np.ndarray, path: Path) -> str:
        name = self._names.get(identity)
        if name is None:
            name = self._names[identity] = self._new_name(path_text(path))
            self.tensors[name] = value
            self.paths[name] = []
        self.paths[name].append(path)
        return name

    def _new_name(self, wanted: str) -> str:
        """`wanted`, shortened if it is huge and numbered if another tensor has it (keys "0" and 0, "a/b" and a, b)."""
        if len(wanted.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES - 16:
            wanted = f"{wanted[:500]}...{text_hash(wanted)}"
        name, number = wanted, 1
        while name in self.tensors:
            number += 1
            name = f"{wanted}#{number}"
        return name


def _place(path: Path) -> str:
    text = path_text(path)
    return f"{text[:300]!r} in the state dict" if path else "the state dict"


def is_attribute(name: Any) -> bool:
    """Whether a snapshot may hang something under this name on an OrderedDict: nothing of Python's own has it."""
    is_name = type(name) is str and _ATTRIBUTE.fullmatch(name) and not name.startswith("__")
    return bool(is_name) and not hasattr(OrderedDict, name)


def _require_key(key: Any, path: Path, depth: int) -> None:
    if isinstance(key, np.generic):
        _require_numpy_dtype(key.dtype, path)
    elif type(key) is tuple:
        if depth >= MAX_DEPTH:
            raise ValueError(f"{_place(path)} has a key, a tuple, that is nested deeper than {MAX_DEPTH} levels in all")
        for item in key:
            _require_key(item, path, depth + 1)
    elif type(key) not in _PLAIN:
        raise TypeError(
            f"{_place(path)} has a key of type {type(key).__module__}.{type(key).__qualname__}: {str(key)[:80]!r}; "
            "expected str, int, float, bool, bytes, None or a tuple of these"
        )
    else:
        _require_plain(key, path)


def _require_plain(value: Any, path: Path) -> None:
    """Raise TypeError for those of the plain types that a snapshot cannot hold."""
    if type(value) is torch.dtype and dtype_name(value) not in TORCH_DTYPES:
        raise TypeError(f"{_place(path)} has the dtype {value}; a snapshot holds {', '.join(TORCH_DTYPES)}")
    if type(value) is torch.Size and not all(type(dim) is int for dim in value):
        raise TypeError(f"{_place(path)} has a torch.Size with other dims than int: {str(value)[:80]}")


def _require_supported(tensor: Tensor, path: Path) -> None:
    """Raise TypeError, with the way out, for tensors whose values are not a plain strided array in memory."""
    kind, problem = type(tensor), ""
    if kind.__name__ == "DTensor":
        problem = (
            "a DTensor, of which this process holds a part; take the whole one with torch.distributed.checkpoint."
            "state_dict.get_state_dict(..., options=StateDictOptions(full_state_dict=True)), or .full_tensor()"
        )
    elif tensor.is_quantized:
        problem = f"quantised ({tensor.dtype}); keep .int_repr() with its scale and zero point, or .dequantize() it"
    elif tensor.layout != torch.strided:
        problem = f"not strided ({tensor.layout}); convert it with .to_dense(), or keep its indices and values"
    elif tensor.device.type == "meta":
        problem = "on the meta device, without values; give it values first (Module.to_empty and a load)"
    elif kind not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        problem = (
            f"a {kind.__module__}.{kind.__qualname__}, a subclass whose values a snapshot cannot know; convert it to a "
            "plain torch.Tensor (.as_subclass(torch.Tensor), .dequantize(), .full_tensor())"
        )
    elif dtype_name(tensor.dtype) not in TORCH_DTYPES:
        problem = f"of dtype {tensor.dtype}, which a snapshot cannot hold; expected one of {', '.join(TORCH_DTYPES)}"
    if problem:
        raise TypeError(f"{_place(path)} is a tensor that is {problem}")


def _require_numpy_dtype(dtype: np.dtype, path: Path) -> None:
    if NUMPY_DTYPES.get(dtype.name) != dtype:  # unequal too for the other byte order
        raise TypeError(
            f"{_place(path)} is of numpy dtype {dtype!s}, which a snapshot cannot hold; convert it to one of "
            f"{', '.join(NUMPY_DTYPES)} in native byte order"
        )


def _tensor_identity(tensor: Tensor) -> Any:
    storage = tensor.untyped_storage()
    memory = storage.data_ptr() or storage._cdata  # without bytes there is no address: then the storage itself
    view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return "tensor", tensor.device, memory, tensor.dtype, view


def _array_identity(array: np.ndarray) -> Any:
    memory = array.__array_interface__["data"][0] if array.size else id(array)
    return "array", memory, array.dtype.name, array.shape, array.strides


def join(skeleton: Any, make: Callable[[TensorPlace], Any]) -> Any:
    """The state dict of a skeleton: `make` gives what stands at a place, `LEFT_OUT` for nothing.

    What is left out is missing from a dict, and None in a list or tuple, whose other indices stay.
    """
    kind = type(skeleton)
    if kind is TensorPlace:
        return make(skeleton)
    if kind in (dict, OrderedDict):
        result = kind()
        for key, item in skeleton.items():
            value = join(item, make)
            if value is not LEFT_OUT:
                result[key] = value
        for attribute, item in getattr(skeleton, "__dict__", {}).items():
            setattr(result, attribute, join(item, make))
        return result
    if kind in (list, tuple):
        values = (join(item, make) for item in skeleton)
        return kind(None if value is LEFT_OUT else value for value in values)
    return skeleton


LEFT_OUT = object()


def places(skeleton: Any) -> list[TensorPlace]:
    """All places of tensors in a skeleton, in order, shared ones as often as they stand."""
    found: list[TensorPlace] = []

    def note(place: TensorPlace) -> None:
        found.append(place)

    join(skeleton, note)
    return found


def paths_of(skeleton: Any) -> dict[str, tuple[Path, ...]]:
    """Of each tensor's name the places where it stands."""
    found: dict[str, list[Path]] = {}

    def visit(value: Any, path: Path) -> None:
        if type(value) is TensorPlace:
            found.setdefault(value.name, []).append(path)
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(item, (*path, key))
            for attribute, item in getattr(value, "__dict__", {}).items():
                visit(item, (*path, f"<attribute {attribute}>"))
        elif type(value) in (list, tuple):
            for index, item in enumerate(value):
                visit(item, (*path, index))

    visit(skeleton, ())
    return {name: tuple(paths) for name, paths in found.items()}
