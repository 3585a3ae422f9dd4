"""Logarithms that every machine computes alike: the bit pattern of a positive fp32 number is nearly one.

2^23 steps are an octave; between powers of two the pattern is linear in the number, not in its logarithm. All that is
needed is that patterns and numbers follow from one another exactly, by integer arithmetic.
"""

from __future__ import annotations

import numpy as np

from commcomp.checkpoint.codec.native import Array

OCTAVE = 1 << 23
_LEAST, _MOST = 1 << 23, (0xFE << 23) - 1
"""Patterns of the least and the largest power of two with a normal pattern."""


def key_of(values: Array) -> Array:
    """int32 patterns of fp32 numbers of at least 0."""
    return np.ascontiguousarray(values, np.float32).view(np.int32)


def value_of(keys: Array) -> Array:
    """fp32 numbers of int32 or int64 patterns, which are cut to the normal numbers'."""
    return np.clip(keys, _LEAST, _MOST).astype(np.int32, copy=False).view(np.float32)
