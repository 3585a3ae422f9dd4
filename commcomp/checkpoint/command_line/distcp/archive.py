"""One item of a `.distcp` file: the archive that torch.save wrote of a tensor, and where its values lie in it."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from commcomp.checkpoint.command_line.distcp import pickled
from commcomp.checkpoint.command_line.distcp.metadata import DTYPES
from commcomp.checkpoint.command_line.distcp.pickled import Named, Record, Stored
from commcomp.checkpoint.container import MAX_DIMS, is_count
from commcomp.checkpoint.dtypes import TORCH_DTYPES, item_bytes

_END, _END64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q")
_LOCATOR, _ENTRY, _LOCAL = struct.Struct("<4sIQI"), struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s5H3I2H")
_CRC_IN_ENTRY, _CRC_IN_LOCAL = 16, 14
_ENCRYPTED, _CRC_BEHIND = 1, 8  # flags
_IS_LARGE = 0xFFFFFFFF
_MOST_PICKLED = 64 << 10
"""Of a tensor or a number torch pickles some hundred bytes."""

_UNTYPED = Named("torch.storage", "UntypedStorage")
_TYPED = {
    **{"Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool"},
    **{"Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64"},
    **{"ComplexFloat": "complex64", "ComplexDouble": "complex128"},
}
_STORAGES = {Named("torch", f"{name}Storage"): dtype for name, dtype in _TYPED.items()}
_REBUILD, _REBUILD_ANY = (Named("torch._utils", f"_rebuild_tensor_v{version}") for version in (2, 3))
_NAMES = {*DTYPES, *_STORAGES, _UNTYPED, _REBUILD, _REBUILD_ANY, pickled.ORDERED_DICT}
_PLAIN = (type(None), bool, int, float, str)


class _Entry(NamedTuple):
    flags: int
    start: int
    stop: int
    crc_places: tuple[int, ...]


@dataclass(frozen=True)
class SavedTensor:
    """The values of a tensor are the bytes from `start` to `stop` of its item, in row-major order of `shape`.

    `sizes`: its own, `shape` with the dims in another order where it is not contiguous. `crc_places`: where 4 bytes
    are the crc32 of the values.
    """

    dtype: str
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    stop: int
    crc_places: tuple[int, ...]


def tensor_in(item: np.ndarray) -> SavedTensor | None:
    """The tensor in an item (uint8); None where its values cannot be told apart from what else the item holds.

    Raises ValueError where it is no archive of torch.save.
    """
    entries = _entries(item)
    root, value = _pickled(item, entries)
    if type(value) is not Record or value.kind not in (_REBUILD, _REBUILD_ANY):
        return None
    count = 6 if value.kind == _REBUILD else 7
    if len(value.arguments) != count or type(value.arguments[0]) is not Stored or value.arguments[5] != []:
        return None  # with the mark of a conjugate or a negative, or hooks
    stored, offset, sizes, strides = value.arguments[:4]
    key, dtype = _storage(stored.key)
    if value.kind == _REBUILD_ANY:
        dtype = DTYPES.get(value.arguments[6], "") if type(value.arguments[6]) is Named else ""
    order = _order(sizes, strides)
    entry = entries.get(f"{root}data/{key}")
    order_byte = entries.get(f"{root}byteorder")
    is_little = order_byte is None or bytes(item[order_byte.start : order_byte.stop][:8]) == b"little"
    if dtype not in TORCH_DTYPES or order is None or offset != 0 or entry is None or not is_little:
        return None
    if math.prod(sizes) * item_bytes(dtype) != entry.stop - entry.start:
        return None
    shape = tuple(sizes[dim] for dim in order)
    return SavedTensor(dtype, sizes, shape, entry.start, entry.stop, entry.crc_places)


def plain_value_in(item: np.ndarray) -> Any:
    """None, a bool, number or string, or a list or tuple of such, that torch.save wrote; ValueError for all else."""
    value = _pickled(item, _entries(item), strict=True)[1]
    if not all(type(part) in _PLAIN for part in (value if type(value) in (list, tuple) else [value])):
        raise ValueError("no plain value")
    return value


def _pickled(item: np.ndarray, entries: dict[str, _Entry], strict: bool = False) -> tuple[str, Any]:
    """The folder in the archive, and what its pickle holds; None instead where that is not as expected here."""
    name = next((name for name in entries if name.rpartition("/")[2] == "data.pkl"), None)
    if name is None:
        raise ValueError("it is no archive of torch.save: it has no data.pkl")
    entry = entries[name]
    try:
        if entry.stop - entry.start > _MOST_PICKLED:
            raise ValueError(f"a pickle of {entry.stop - entry.start} bytes; expected {_MOST_PICKLED} at most")
        return name.removesuffix("data.pkl"), pickled.read(item[entry.start : entry.stop].tobytes(), _NAMES)
    except ValueError:
        if strict:
            raise
        return "", None


def _storage(description: Any) -> tuple[str, str]:
    """Its key, and its dtype: "" where it does not say."""
    if type(description) is tuple and len(description) == 5 and description[0] == "storage":
        _, kind, key, _, _ = description
        if type(key) is str and type(kind) is Named and (kind == _UNTYPED or kind in _STORAGES):
            return key, _STORAGES.get(kind, "")
    return "", ""


def _order(sizes: Any, strides: Any) -> list[int] | None:
    """The dims as they lie in memory, the slowest first; None where they do not fill it."""
    if not all(type(dims) is tuple and len(dims) <= MAX_DIMS and all(map(is_count, dims)) for dims in (sizes, strides)):
        return None
    if len(sizes) != len(strides):
        return None
    dims = [dim for dim, size in enumerate(sizes) if size != 1]
    lying = sorted(dims, key=lambda dim: -strides[dim])
    if math.prod(sizes) == 0 or lying == dims:
        lying = list(range(len(sizes)))
    expected = 1
    for dim in reversed(lying):
        if math.prod(sizes) and sizes[dim] != 1 and strides[dim] != expected:
            return None
        expected *= sizes[dim]
    return lying


def _entries(item: np.ndarray) -> dict[str, _Entry]:
    """What an archive holds, stored as it is; entries that are packed or encrypted are left out."""
    try:
        return dict(_read_entries(item, *_directory(item)))
    except (struct.error, ValueError) as error:
        raise ValueError(f"it is no archive of torch.save: {error}") from error


def _directory(item: np.ndarray) -> tuple[int, int]:
    """First byte of the archive's directory and its end."""
    end = len(item) - _END.size
    if end < 0:
        raise ValueError(f"{len(item)} bytes")
    magic, _, _, _, _, length, start, _ = _END.unpack_from(item, end)
    if magic != b"PK\5\6":
        raise ValueError("it does not end like one")
    if _IS_LARGE in (length, start):
        magic, _, place, _ = _LOCATOR.unpack_from(item, _place(item, end - _LOCATOR.size, end))
        end64 = _END64.unpack_from(item, _place(item, place, end))
        if (magic, end64[0]) != (b"PK\6\7", b"PK\6\6"):
            raise ValueError("it does not end like a large one")
        length, start = end64[-2:]
    return _place(item, start, end), _place(item, start + length, end)


def _read_entries(item: np.ndarray, at: int, end: int) -> Iterator[tuple[str, _Entry]]:
    while at < end:
        fields = _ENTRY.unpack_from(item, at)
        magic, _, _, flags, method, _, _, crc, packed, size = fields[:10]
        name_length, extra_length, comment_length, place = *fields[10:13], fields[16]
        if magic != b"PK\1\2":
            raise ValueError(f"byte {at} starts no entry")
        name_at = at + _ENTRY.size
        name = bytes(item[name_at : name_at + name_length]).decode("utf-8", "replace")
        extra = bytes(item[name_at + name_length : name_at + name_length + extra_length])
        size, packed, place = _large(extra, size, packed, place)
        start = _start_of_data(item, place)
        stop = _place(item, start + size, len(item))
        if not method and not flags & _ENCRYPTED and size == packed:
            behind = stop + (4 if bytes(item[stop : stop + 4]) == b"PK\7\10" else 0)
            crcs = (at + _CRC_IN_ENTRY, behind if flags & _CRC_BEHIND else place + _CRC_IN_LOCAL)
            wanted = struct.pack("<I", crc)
            yield name, _Entry(flags, start, stop, tuple(at for at in crcs if bytes(item[at : at + 4]) == wanted))
        at = name_at + name_length + extra_length + comment_length


def _large(extra: bytes, *fields: int) -> list[int]:
    """Sizes and places, those that have no room in an entry from its extra field."""
    found, at = list(fields), 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            missing = [number for number, value in enumerate(fields) if value == _IS_LARGE]
            for number, value in zip(missing, struct.unpack_from(f"<{len(missing)}Q", extra, at + 4), strict=True):
                found[number] = value
        at += 4 + length
    return found


def _start_of_data(item: np.ndarray, place: int) -> int:
    fields = _LOCAL.unpack_from(item, _place(item, place, len(item)))
    if fields[0] != b"PK\3\4":
        raise ValueError(f"byte {place} starts no entry")
    return _place(item, place + _LOCAL.size + fields[-2] + fields[-1], len(item))


def _place(item: np.ndarray, at: int, end: int) -> int:
    if not 0 <= at <= end:
        raise ValueError(f"it names byte {at} of {len(item)}")
    return at
