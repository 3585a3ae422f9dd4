"""Files of safetensors, to the byte: 8 bytes length, that much JSON, the tensors' bytes one after another."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from commcomp.checkpoint.coded import HostTensor
from commcomp.checkpoint.container import is_count
from commcomp.checkpoint.dtypes import TORCH_DTYPES, item_bytes
from commcomp.checkpoint.state_tree import MAX_NAME_BYTES

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_METADATA = "__metadata__"
_DTYPES = {
    **{"BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64"},
    **{"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"},
    **{"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
}


def read(path: str) -> tuple[str, dict[str, HostTensor]]:
    """The header's text and the tensors, in the order of their bytes, which stay in the file until they are used.

    A tensor of a dtype that is not known here is given as its bytes. Raises ValueError naming what is not as the
    format has it.
    """
    num_bytes = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, num_bytes - 8):
            raise ValueError(f"{path}: {num_bytes} bytes with a header of {length}; no file of safetensors")
        raw = file.read(length)
    try:
        text = raw.decode("utf-8")
        header = json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is no JSON of safetensors: {error}") from error
    places = _places(path, header, num_bytes - 8 - length)
    data = np.memmap(path, np.uint8, "r") if num_bytes > 8 + length else np.empty(0, np.uint8)
    tensors = {}
    for name, dtype, shape, start, stop in places:
        values = np.asarray(data[8 + length + start : 8 + length + stop])
        tensors[name] = HostTensor(name, dtype, shape, values)
    return text, tensors


def _places(path: str, header: Any, num_bytes: int) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """Name, dtype, shape, first byte and end of every tensor; they fill the bytes without gap."""
    if type(header) is not dict:
        raise ValueError(f"{path}: the header is no JSON object")
    places, end = [], 0
    for name, item in header.items():
        if name == _METADATA:
            continue
        try:
            dtype, shape, (start, stop) = _DTYPES.get(item["dtype"], ""), tuple(item["shape"]), item["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: tensor {name[:200]!r} is described wrongly: {str(item)[:200]}") from error
        if not all(map(is_count, (*shape, start, stop))) or start > stop:
            raise ValueError(f"{path}: tensor {name[:200]!r} has shape {shape} and bytes {start} to {stop}")
        if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
            raise ValueError(f"{path}: the name {name[:200]!r}... is longer than {MAX_NAME_BYTES} bytes")
        if dtype not in TORCH_DTYPES:
            dtype, shape = "uint8", (stop - start,)
        if math.prod(shape) * item_bytes(dtype) != stop - start:
            raise ValueError(f"{path}: tensor {name[:200]!r}, {dtype} {shape}, has {stop - start} bytes")
        places.append((name, dtype, shape, start, stop))
    places.sort(key=lambda place: place[3:])
    for name, _, _, start, stop in places:
        if start != end:
            raise ValueError(f"{path}: tensor {name[:200]!r} starts at byte {start}; expected {end}, where one ended")
        end = stop
    if end != num_bytes:
        raise ValueError(f"{path}: the tensors end at byte {end} of {num_bytes}")
    return places


def _without_doubles(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key[:200]!r} is there twice")
        result[key] = value
    return result


def pieces(text: str, arrays: Mapping[str, np.ndarray]) -> Iterable[bytes | np.ndarray]:
    """The file again, in order. Raises ValueError where header and tensors do not fit."""
    raw = text.encode("utf-8")
    header = json.loads(text)
    yield struct.pack("<Q", len(raw)) + raw
    total = sum(len(array) for array in arrays.values())
    places = _places("the restored file", header, total)
    if {place[0] for place in places} != arrays.keys():
        raise ValueError("the header and the snapshot have different tensors")
    for name, _, _, start, stop in places:
        if len(arrays[name]) != stop - start:
            raise ValueError(f"tensor {name[:200]!r} has {len(arrays[name])} bytes; the header says {stop - start}")
        yield arrays[name]
