"""The entropy coders of commcomp._checkpoint, and what to do where they were not built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

try:
    from commcomp import _checkpoint
except ImportError as error:
    _checkpoint = None  # type: ignore[assignment]
    _why = str(error)

Array = np.ndarray[Any, np.dtype[Any]]

FAST, MAX = "fast", "max"
CODERS = (FAST, MAX)
"""Of symbols: static tables and rANS, or mixed contexts and binary arithmetic coding, a few percent of them smaller and
many times slower."""


def is_built() -> bool:
    """Whether the C++ module is there."""
    return _checkpoint is not None


def columns_for(coder: str, columns: int) -> int:
    """What `encode_symbols` and `encode_floats` take, for one of CODERS."""
    return columns if coder == MAX else 0


def coders() -> Any:
    """The C++ module. RuntimeError where it is missing."""
    if _checkpoint is None:
        raise RuntimeError(
            f"commcomp's checkpoint codec is not there ({_why}); it is built when commcomp is installed: get a C++17 "
            "compiler and Python's headers (Debian and Ubuntu: apt-get install g++ python3-dev) and install it again"
        )
    return _checkpoint


@dataclass(frozen=True)
class Known:
    """What is known of each value before it is read (commcomp/native/checkpoint/float_codec.hpp); fp32, flat."""

    cut: str
    """linear, logarithmic or relative."""
    predictions: Array | None
    scales: Array | None
    scale: float
    resolution: int


def encode_floats(format: str, values: Array, known: Known, columns: int = 0) -> bytes:
    """`values`: raw bytes (uint8) of `format` (fp32 or bf16). `columns`: as of `encode_symbols`."""
    data: bytes = coders().encode_floats(
        format, known.cut, values, known.predictions, known.scales, known.scale, known.resolution, columns
    )
    return data


def decode_floats(format: str, data: bytes, count: int, known: Known) -> Array:
    """Back, as raw bytes. ValueError where `data` cannot be what `encode_floats` made."""
    out = np.empty(count * (4 if format == "fp32" else 2), np.uint8)
    coders().decode_floats(
        format,
        known.cut,
        np.frombuffer(data, np.uint8),
        known.predictions,
        known.scales,
        known.scale,
        known.resolution,
        out,
    )
    return out


def encode_symbols(
    symbols: Array, contexts: Array | None = None, num_contexts: int = 1, columns: int = 0
) -> bytes:
    """Byte symbols, each under one of up to 255 contexts.

    `columns`: 0 for the coder "fast"; else "max" codes them, as a matrix of that many columns.
    """
    data: bytes = coders().encode_symbols(symbols, contexts, num_contexts, columns)
    return data


def decode_symbols(data: bytes | memoryview, count: int, contexts: Array | None = None, num_contexts: int = 1) -> Array:
    """Back. ValueError where `data` cannot be what `encode_symbols` made."""
    out = np.empty(count, np.uint8)
    coders().decode_symbols(np.frombuffer(data, np.uint8), contexts, num_contexts, out)
    return out
