"""What others code a tensor with, without loss: general compressors, ZipNN, and differences from the tensor before.

Values are flat arrays of uint32 or uint16, the bits of fp32 or bf16 values.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

Bits = NDArray[np.unsignedinteger]
_FLOAT_NAMES = {4: "float32", 2: "bfloat16"}


@dataclass(frozen=True)
class ByteCoder:
    """Codes an array into byte streams; `previous`, equally long and of the same dtype, is known on both sides."""

    name: str
    encode: Callable[[Bits, Bits], list[bytes]]
    decode: Callable[[list[bytes], Bits], Bits]


def size_of(streams: list[bytes]) -> int:
    """Bytes of the streams with a length of 8 bytes before each."""
    return sum(map(len, streams)) + 8 * len(streams)


def split_planes(values: Bits) -> list[bytes]:
    """One stream for every byte of a value, that with the highest bits first."""
    columns = values.view(np.uint8).reshape(-1, values.itemsize)
    return [columns[:, place].tobytes() for place in reversed(range(values.itemsize))]


def join_planes(planes: list[bytes], dtype: np.dtype) -> Bits:
    """Undo split_planes."""
    columns = np.empty((len(planes[0]), len(planes)), np.uint8)
    for place, plane in zip(reversed(range(len(planes))), planes):
        columns[:, place] = np.frombuffer(plane, np.uint8)
    return columns.reshape(-1).view(dtype)


def exponent_first(values: Bits) -> Bits:
    """Move the sign bit to the end, so that the highest byte is the exponent, for fp32 as for bf16."""
    return (values << 1) | (values >> _last_bit(values))


def exponent_back(values: Bits) -> Bits:
    """Undo exponent_first."""
    return (values >> 1) | (values << _last_bit(values))


def ordered(values: Bits) -> Bits:
    """Unsigned integers in the order of the floats that the bits are: neighbours in value are neighbours here."""
    negative = (values >> _last_bit(values)).astype(bool)
    return np.where(negative, ~values, values | _top(values))


def unordered(values: Bits) -> Bits:
    """Undo ordered."""
    positive = (values >> _last_bit(values)).astype(bool)
    return np.where(positive, values ^ _top(values), ~values)


def zigzag(differences: Bits) -> Bits:
    """Differences modulo 2^bits, small ones of either sign to small numbers: 0, -1, 1, -2 to 0, 1, 2, 3."""
    return (differences << 1) ^ (_zero(differences) - (differences >> _last_bit(differences)))


def unzigzag(codes: Bits) -> Bits:
    """Undo zigzag."""
    return (codes >> 1) ^ (_zero(codes) - (codes & 1))


def _last_bit(values: Bits) -> int:
    return 8 * values.itemsize - 1


def _zero(values: Bits) -> Bits:
    return np.zeros(1, values.dtype)


def _top(values: Bits) -> Bits:
    return np.ones(1, values.dtype) << _last_bit(values)


def zstd(level: int) -> ByteCoder:
    """zstd on the values as they lie in memory."""
    return ByteCoder(
        f"zstd-{level}",
        lambda values, previous: [_zstd_bytes(values.tobytes(), level)],
        lambda streams, previous: np.frombuffer(_unzstd(streams[0], previous.nbytes), previous.dtype),
    )


def lzma_9() -> ByteCoder:
    """LZMA at its highest preset, which is what 7-Zip runs."""
    return ByteCoder(
        "lzma-9",
        lambda values, previous: [lzma.compress(values.tobytes(), preset=9)],
        lambda streams, previous: np.frombuffer(lzma.decompress(streams[0]), previous.dtype),
    )


def zipnn_coder() -> ByteCoder:
    """ZipNN: byte groups, Huffman coding of those that pay."""

    def coder(previous: Bits) -> Any:
        import zipnn  # compiled where it is installed: what needs no ZipNN runs without it

        dtype = _FLOAT_NAMES[previous.itemsize]
        return zipnn.ZipNN(input_format="byte", bytearray_dtype=dtype, threads=1)

    def encode(values: Bits, previous: Bits) -> list[bytes]:
        return [coder(previous).compress(bytearray(values))]  # a copy, since it reorders bits in what it is given

    def decode(streams: list[bytes], previous: Bits) -> Bits:
        return np.frombuffer(coder(previous).decompress(streams[0]), previous.dtype)

    return ByteCoder("ZipNN", encode, decode)


def xor_planes(level: int) -> ByteCoder:
    """BitX: XOR with the values before, exponents apart from signs and mantissas, zstd on each byte plane."""

    def encode(values: Bits, previous: Bits) -> list[bytes]:
        return [_zstd_bytes(plane, level) for plane in split_planes(exponent_first(values ^ previous))]

    def decode(streams: list[bytes], previous: Bits) -> Bits:
        return exponent_back(_joined(streams, previous)) ^ previous

    return ByteCoder("BitX" if level == 3 else f"BitX, zstd-{level}", encode, decode)


def difference_planes(level: int) -> ByteCoder:
    """Difference from the values before, as ordered integers, zstd on each byte plane."""

    def encode(values: Bits, previous: Bits) -> list[bytes]:
        return [_zstd_bytes(plane, level) for plane in split_planes(zigzag(ordered(values) - ordered(previous)))]

    def decode(streams: list[bytes], previous: Bits) -> Bits:
        return unordered(unzigzag(_joined(streams, previous)) + ordered(previous))

    return ByteCoder("integer delta" if level == 3 else f"integer delta, zstd-{level}", encode, decode)


def _zstd_bytes(data: bytes, level: int) -> bytes:
    return zstandard.ZstdCompressor(level=level).compress(data)


def _unzstd(data: bytes, most: int) -> bytes:
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=most)


def _joined(streams: list[bytes], previous: Bits) -> Bits:
    return join_planes([_unzstd(stream, previous.size) for stream in streams], previous.dtype)


CODERS: dict[str, ByteCoder] = {
    coder.name: coder
    for coder in (zstd(3), zstd(19), lzma_9(), zipnn_coder(), xor_planes(3), xor_planes(19), difference_planes(3))
}
