"""Tensors of any dtype as unsigned integers, and what an integer is less the same one of the parent, both ways.

All arithmetic is on unsigned integers modulo 2^bits, so every machine gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from commcomp.checkpoint.codec.native import Array
from commcomp.checkpoint.dtypes import item_bytes

UNSIGNED, SIGNED, FLOAT = "unsigned", "signed", "float"
_MANTISSA_BITS = {
    **{"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52},
    **{"float8_e4m3fn": 3, "float8_e4m3fnuz": 3, "float8_e5m2": 2, "float8_e5m2fnuz": 2},
}
_PARTS = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}
_SIGNED = ("int8", "int16", "int32", "int64")


@dataclass(frozen=True)
class Words:
    """How the values of a dtype are seen: words of `width` bytes, `per_value` of them a value."""

    width: int
    per_value: int
    kind: str
    mantissa_bits: int = 0

    @property
    def bits(self) -> int:
        return 8 * self.width

    def of(self, data: Array) -> Array:
        """Raw bytes (uint8) as unsigned integers; a view where they are aligned."""
        kind = np.dtype(f"<u{self.width}")
        return data.view(kind) if data.ctypes.data % self.width == 0 else data.copy().view(kind)

    def sign_of(self, words: Array) -> Array:
        """The highest bit, as 0 or 1."""
        sign: Array = words >> words.dtype.type(self.bits - 1)
        return sign


def words_of(dtype: str) -> Words:
    """ValueError naming a dtype that is not known."""
    part = _PARTS.get(dtype, dtype)
    width = item_bytes(part)
    kind = FLOAT if part in _MANTISSA_BITS else SIGNED if part in _SIGNED else UNSIGNED
    return Words(width, 1 + (dtype in _PARTS), kind, _MANTISSA_BITS.get(part, 0))


def _zigzag(words: Array) -> Array:
    """0, -1, 1, -2 to 0, 1, 2, 3."""
    one, top = words.dtype.type(1), words.dtype.type(8 * words.itemsize - 1)
    return (words << one) ^ (0 - (words >> top))


def _unzigzag(codes: Array) -> Array:
    one = codes.dtype.type(1)
    return (codes >> one) ^ (0 - (codes & one))


def _ordered(kind: Words, words: Array) -> Array:
    """Floats' patterns as integers in the order of the values: neighbours in value are neighbours here."""
    if kind.kind != FLOAT:
        return words
    sign = kind.sign_of(words)
    return words ^ ((0 - sign) | words.dtype.type(1 << kind.bits - 1))


def _unordered(kind: Words, keys: Array) -> Array:
    if kind.kind != FLOAT:
        return keys
    return keys ^ ((kind.sign_of(keys) - keys.dtype.type(1)) | keys.dtype.type(1 << kind.bits - 1))


def _outward(kind: Words, differences: Array, previous: Array) -> Array:
    """Differences from negative floats with the sign turned around, so that growing is above 0; its own inverse."""
    if kind.kind != FLOAT:
        return differences
    turn = 0 - kind.sign_of(previous)
    return (differences ^ turn) - turn


@dataclass(frozen=True)
class Base:
    """What words are coded relative to; both ways take a Words, the words or codes, and the parent's words."""

    needs_parent: bool
    code: Callable[[Words, Array, Array | None], Array]
    decode: Callable[[Words, Array, Array | None], Array]


def _code_none(kind: Words, words: Array, previous: Array | None) -> Array:
    return _zigzag(words) if kind.kind == SIGNED else words


def _decode_none(kind: Words, codes: Array, previous: Array | None) -> Array:
    return _unzigzag(codes) if kind.kind == SIGNED else codes


def _code_before(kind: Words, words: Array, previous: Array | None) -> Array:
    return _zigzag(np.diff(words, prepend=words.dtype.type(0)))


def _decode_before(kind: Words, codes: Array, previous: Array | None) -> Array:
    sums: Array = np.cumsum(_unzigzag(codes), dtype=codes.dtype)
    return sums


def _xor(kind: Words, words: Array, previous: Array | None) -> Array:
    assert previous is not None
    return words ^ previous


def _code_difference(kind: Words, words: Array, previous: Array | None) -> Array:
    assert previous is not None
    return _zigzag(_outward(kind, _ordered(kind, words) - _ordered(kind, previous), previous))


def _decode_difference(kind: Words, codes: Array, previous: Array | None) -> Array:
    assert previous is not None
    return _unordered(kind, _outward(kind, _unzigzag(codes), previous) + _ordered(kind, previous))


BASES: dict[str, Base] = {
    "none": Base(False, _code_none, _decode_none),
    "before": Base(False, _code_before, _decode_before),
    "xor": Base(True, _xor, _xor),
    "difference": Base(True, _code_difference, _decode_difference),
}
