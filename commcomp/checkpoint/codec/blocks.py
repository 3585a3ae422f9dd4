"""Small arrays of integers and the blocks of bytes that make up a tensor's side data."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np

from commcomp.checkpoint.codec.native import Array, decode_symbols, encode_symbols


def join_blocks(blocks: Iterable[bytes]) -> bytes:
    """One after another, each behind its length in four bytes."""
    return b"".join(struct.pack("<I", len(block)) + block for block in blocks)


def split_blocks(data: bytes, count: int) -> list[bytes]:
    """Back: exactly `count` blocks. ValueError otherwise."""
    blocks, at = [], 0
    for _ in range(count):
        if at + 4 > len(data):
            raise ValueError("side data ends before all its blocks")
        (length,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + length > len(data):
            raise ValueError("a block of side data is longer than what is left")
        blocks.append(data[at : at + length])
        at += length
    if at != len(data):
        raise ValueError("side data goes on behind its blocks")
    return blocks


def pack_int16(values: Array) -> bytes:
    """Integers that fit into 16 bits, [n]: the differences from their median, zigzag, entropy coded byte by byte."""
    if values.size == 0:
        return b""
    middle = int(np.median(values))
    moved = values.astype(np.int32) - middle
    zigzag = ((moved << 1) ^ (moved >> 31)).astype(np.uint32)
    if int(zigzag.max()) > 0xFFFF:
        raise ValueError("integers lie further from their median than 15 bits reach")
    low, high = (zigzag & 0xFF).astype(np.uint8), (zigzag >> 8).astype(np.uint8)
    return struct.pack("<h", middle) + join_blocks([encode_symbols(low), encode_symbols(high)])


def unpack_int16(data: bytes, count: int) -> Array:
    """Back, int32 [count]."""
    if count == 0 and not data:
        return np.zeros(0, np.int32)
    if len(data) < 2:
        raise ValueError("a block of integers is shorter than its head")
    (middle,) = struct.unpack_from("<h", data)
    low, high = (decode_symbols(block, count) for block in split_blocks(data[2:], 2))
    if low.max() == low.min() and high.max() == high.min():  # of a vector all are alike: no memory for them
        return np.broadcast_to(_back(low[:1], high[:1]) + middle, (count,))
    return _back(low, high) + middle


def _back(low: Array, high: Array) -> Array:
    zigzag = low.astype(np.int32) | high.astype(np.int32) << 8
    undone: Array = zigzag >> 1 ^ -(zigzag & 1)
    return undone
