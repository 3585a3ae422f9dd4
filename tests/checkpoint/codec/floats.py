"""Floats of all kinds with what may be known of them, and bytes that are spoiled."""

from __future__ import annotations

import numpy as np

from commcomp.checkpoint.codec.native import Known

SPECIAL = np.array(
    [0, 1 << 31, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x7F800001],
    np.uint32,
)
"""Zeros, denormals, the largest, infinities, NaN with several payloads."""


def float_values(format: str, count: int, seed: int, kind: str) -> np.ndarray:
    """Raw bytes."""
    random = np.random.default_rng(seed)
    word = np.uint32 if format == "fp32" else np.uint16
    if kind == "any bits":
        bits = random.integers(0, 2**32, count, np.uint32)
    elif kind == "special":
        bits = random.choice(SPECIAL, count)
    else:
        scale = np.exp(random.normal(0, {"alike": 0.1, "wide": 20}[kind], count))
        bits = (scale * random.normal(0, 0.02, count)).astype(np.float32).view(np.uint32)
    return (bits if format == "fp32" else bits >> 16).astype(word).view(np.uint8)


def float_knowledge(cut: str, format: str, values: np.ndarray, seed: int, what: str) -> Known:
    """Of raw `values` of `format`, for a cut."""
    random = np.random.default_rng(seed + 1)
    count = len(values) // (4 if format == "fp32" else 2)
    wide = values.view(np.uint32) if format == "fp32" else values.view(np.uint16).astype(np.uint32) << 16
    with np.errstate(all="ignore"):
        near = (wide.view(np.float32) * (1 + random.normal(0, 1e-4, count))).astype(np.float32)
    anything = random.integers(0, 2**32, count, np.uint32).view(np.float32)
    predictions = {"near": near, "anything": anything, "nothing": None, "exact": wide.view(np.float32)}[what]
    scales = None if what in ("nothing", "exact") else np.abs(near) * np.float32(1e-3) if what == "near" else anything
    scale = float(random.choice([0.0, 1e-30, 1e-3, 1.0, np.inf, np.nan]))
    return Known(cut, predictions, scales, scale, int(random.integers(1, 6)))


def spoil(data: bytes, place: int, random: np.random.Generator) -> bytes:
    """`data` with a bit turned, cut off, with bytes put in, or with others in their place, at `place`."""
    spoiled = bytearray(data)
    match int(random.integers(4)):
        case 0:
            spoiled[place] ^= 1 << int(random.integers(8))
        case 1:
            del spoiled[place:]
        case 2:
            spoiled[place:place] = random.bytes(int(random.integers(1, 9)))
        case _:
            spoiled[place : place + 8] = random.bytes(8)
    return bytes(spoiled)
