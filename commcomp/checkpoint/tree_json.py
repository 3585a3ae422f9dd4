"""The skeleton of a state dict as JSON, exact to the bit, and back. docs/format.md has the table of the forms."""

from __future__ import annotations

import base64
import binascii
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from commcomp.checkpoint.dtypes import NUMPY_DTYPES, TORCH_DTYPES, dtype_name
from commcomp.checkpoint.state_tree import MAX_DEPTH, TensorPlace, is_attribute

_SAFE_INT = 1 << 53  # beyond, readers of JSON in other languages round


def to_json(value: Any) -> Any:
    """A skeleton as what json.dumps takes: null, booleans, numbers, strings and arrays, and objects of one key."""
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if abs(value) < _SAFE_INT else {"int": hex(value)}
    if kind is float:
        return {"float": _float_hex(value)}
    if kind is list:
        return [to_json(item) for item in value]
    if kind is TensorPlace:
        return {"array" if value.is_array else "tensor": value.name}
    if kind in (dict, OrderedDict):
        return _mapping(value)
    return _rare(value)


def _mapping(value: dict[Any, Any]) -> Any:
    node: Any = {
        "ordered" if type(value) is OrderedDict else "dict": [[to_json(k), to_json(v)] for k, v in value.items()]
    }
    if attributes := getattr(value, "__dict__", None):
        node["attributes"] = [[name, to_json(item)] for name, item in attributes.items()]
    return node


def _rare(value: Any) -> Any:
    kind = type(value)
    if kind is torch.Size:
        return {"size": list(value)}
    if kind is tuple:
        return {"tuple": [to_json(item) for item in value]}
    if kind is complex:
        return {"complex": [_float_hex(value.real), _float_hex(value.imag)]}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if kind is torch.dtype:
        return {"dtype": dtype_name(value)}
    if isinstance(value, np.generic):
        return {"scalar": [value.dtype.name, value.tobytes().hex()]}
    raise TypeError(f"a skeleton holds no {kind.__qualname__}")


def _float_hex(value: float) -> str:
    return struct.pack(">d", value).hex()


def is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and dicts of JSON are nested deeper."""
    layer = [value]
    for _ in range(levels + 1):
        nested = [item for item in layer if type(item) in (dict, list)]
        layer = [item for outer in nested for item in (outer.values() if type(outer) is dict else outer)]
    return bool(layer)


def from_json(node: Any) -> Any:
    """The skeleton again. Raises ValueError naming the node that is none."""
    return _read(node, 0)


def _read(node: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"the tree is nested deeper than {MAX_DEPTH} levels")
    kind = type(node)
    if node is None or kind in (bool, str, int):
        return node
    if kind is list:
        return [_read(item, depth + 1) for item in node]
    if kind is dict and (len(node) == 1 or (len(node) == 2 and "ordered" in node and "attributes" in node)):
        form = next(iter(node))
        if form in ("dict", "ordered"):
            return _read_mapping(node, form, depth)
        if form == "tuple" and type(node[form]) is list:
            return tuple(_read(item, depth + 1) for item in node[form])
        if form in _RARE:
            try:
                return _RARE[form](node[form])
            except (ValueError, TypeError, KeyError, IndexError, OverflowError, struct.error, binascii.Error) as error:
                raise ValueError(f"the tree has no valid {form!r} in {str(node)[:80]}: {error}") from error
    raise ValueError(f"the tree has an unknown node {str(node)[:80]}")


def _read_mapping(node: dict[str, Any], form: str, depth: int) -> Any:
    result: Any = OrderedDict() if form == "ordered" else {}
    for key, item in _pairs(node[form]):
        key = _read(key, depth + 1)
        if isinstance(key, (list, dict, TensorPlace)):
            raise ValueError(f"the tree has a key that is a {type(key).__name__}")
        try:
            result[key] = _read(item, depth + 1)
        except TypeError as error:  # a tuple with a list in it
            raise ValueError(f"the tree has a key that cannot be one: {str(key)[:80]}") from error
    for name, item in _pairs(node.get("attributes", [])):
        if not is_attribute(name) or hasattr(result, name):
            raise ValueError(f"the tree has an attribute {str(name)[:80]!r}, which is no name for one")
        setattr(result, name, _read(item, depth + 1))
    return result


def _pairs(node: Any) -> list[Any]:
    if type(node) is not list or any(type(pair) is not list or len(pair) != 2 for pair in node):
        raise ValueError(f"the tree has no list of pairs where one is due: {str(node)[:80]}")
    return node


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"{str(value)[:40]!r} is no string")
    return value


def _float(text: Any) -> float:
    (value,) = struct.unpack(">d", bytes.fromhex(_text(text)))
    return value


def _complex(parts: Any) -> complex:
    real, imaginary = parts
    return complex(_float(real), _float(imaginary))


def _scalar(parts: Any) -> np.generic:
    name, digits = parts
    dtype, data = NUMPY_DTYPES[_text(name)], bytes.fromhex(_text(digits))
    if len(data) != dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for a {name}")
    return np.frombuffer(data, dtype)[0]


def _size(dims: Any) -> torch.Size:
    if type(dims) is not list or not all(type(dim) is int and abs(dim) < 1 << 63 for dim in dims):
        raise ValueError("not a list of 64-bit integers")
    return torch.Size(dims)


_RARE: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(_text(text), 16),
    "float": _float,
    "complex": _complex,
    "bytes": lambda text: base64.b64decode(_text(text), validate=True),
    "dtype": lambda name: TORCH_DTYPES[_text(name)],
    "scalar": _scalar,
    "size": _size,
    "tensor": lambda name: TensorPlace(_text(name)),
    "array": lambda name: TensorPlace(_text(name), is_array=True),
}
