"""One tensor of any dtype, exactly: words relative to the parent's or to the one before, cut into planes of bytes.

Each plane is entropy coded under what is known of a word by then: how large the parent's is, since the smaller floats
are the more units in the last place they move, and whether the planes above are 0. docs/codecs.md has the bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from commcomp.checkpoint.codec.blocks import join_blocks, split_blocks
from commcomp.checkpoint.codec.native import Array, decode_symbols, encode_symbols
from commcomp.checkpoint.codec.words import BASES, FLOAT, Words, words_of
from commcomp.checkpoint.coded import CodedTensor, HostTensor, Input, TensorHeader
from commcomp.checkpoint.inflate import inflate
from commcomp.checkpoint.parallel import ordered_map

METHOD = "planes"
CHUNK_VALUES = 1 << 18
MOST_CHUNK_VALUES = 1 << 20
"""Beyond that a decoder refuses: what it needs besides the values is bounded so."""
_STORED, _CONSTANT, _SYMBOLS, _ZLIB = range(4)
_CLASSES, _CLASSES_OF_BYTES = 63, 255
"""Of the parent's words; four contexts each are to fit into a byte."""
LEAST_BYTES = 64
"""Smaller tensors are stored as they are."""
_SAMPLE_PARTS, _SAMPLE_WORDS = 8, 1 << 11
_NOISE_SAMPLE, _LEAST_NOISE, _NOISE_BITS = 1 << 15, 1 << 12, 0.015
_ZLIB_SAMPLE = 1 << 13
_ZLIB_LEVEL = 6
_HEADER_BYTES = 24
"""What a tensor's entry in the directory takes over one of method "raw", without inputs."""


def encode_planes(tensor: HostTensor, previous: tuple[Input, Array] | None, threads: int) -> CodedTensor | None:
    """The tensor in planes; None if it is no smaller than its bytes. `previous`: its place and raw bytes (uint8) in
    the parent, of the same dtype and shape."""
    if len(tensor.data) < LEAST_BYTES:
        return None
    kind = words_of(tensor.dtype)
    words = kind.of(tensor.data)
    before = None if previous is None else kind.of(previous[1])
    base = _best_base(kind, words, before)
    if base is None:
        return None
    needs_parent = BASES[base].needs_parent
    size = CHUNK_VALUES * kind.per_value
    starts = range(0, len(words), size)

    def chunk(start: int) -> bytes:
        part = slice(start, start + size)
        return encode_words(kind, base, words[part], before[part] if before is not None and needs_parent else None)

    chunks = list(ordered_map(chunk, starts, threads if len(starts) > 1 else 1))
    inputs = (previous[0],) if previous is not None and needs_parent else ()
    extra = _HEADER_BYTES + sum(16 + len(source.tensor) for source in inputs)
    if sum(map(len, chunks)) + extra >= len(tensor.data):
        return None
    return CodedTensor(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        method=METHOD,
        settings={"base": base},
        inputs=inputs,
        chunk_values=min(CHUNK_VALUES, len(words) // kind.per_value),
        side=b"",
        chunks=chunks,
    )


def decode_chunk(
    header: TensorHeader, side: bytes, payload: bytes, start: int, count: int, inputs: Sequence[Array]
) -> Array:
    """The codec registry's decoder of `METHOD`."""
    kind, base = words_of("int32" if "step" in header.settings else header.dtype), header.settings.get("base")
    if type(base) is not str or base not in BASES:
        raise ValueError(f"base {str(base)[:40]!r}; expected one of {', '.join(BASES)}")
    if side or count > MOST_CHUNK_VALUES:
        raise ValueError(f"{len(side)} bytes of side data, {count} values a chunk; expected 0 and {MOST_CHUNK_VALUES}")
    if [len(given) for given in inputs] != [count * header.item_bytes] * BASES[base].needs_parent:
        raise ValueError(f"inputs of {[len(given) for given in inputs]} bytes do not go with base {base!r}")
    previous = kind.of(inputs[0]) if inputs else None
    codes = np.empty((count * kind.per_value, kind.width), np.uint8)
    _unpack(payload, kind, previous, codes)
    words = BASES[base].decode(kind, codes.reshape(-1).view(f"<u{kind.width}"), previous)
    if "step" in header.settings:
        words = _times_step(header, words)
    return words.view(np.uint8)


def _times_step(header: TensorHeader, words: Array) -> Array:
    """fp32 values that are so many steps (steps.py)."""
    step = header.settings["step"]
    if header.dtype != "float32" or not isinstance(step, (int, float)) or not 0 < step < np.inf:
        raise ValueError(f"steps of {str(step)[:40]} for {header.dtype}; expected a number above 0, and float32")
    with np.errstate(over="ignore"):
        values: Array = words.view(np.int32).astype(np.float32) * np.float32(step)
    return values


class _Contexts:
    """Of each word the context of its next byte, from the parent's words and the bytes above."""

    def __init__(self, kind: Words, previous: Array | None) -> None:
        self._most = _CLASSES_OF_BYTES if kind.width == 1 else _CLASSES
        self._classes = None if previous is None else _classes(kind, previous, self._most)
        self._above: Array | None = None  # the byte above, or with classes the bytes above cut to 3

    def next(self) -> tuple[Array | None, int]:
        """Contexts (uint8), None where there is one only, and a number that they are below."""
        if self._classes is None:
            return (None, 1) if self._above is None else (np.minimum(self._above, 254), 255)
        if self._above is None:
            return self._classes, self._most
        return self._classes * np.uint8(4) + self._above, 4 * _CLASSES

    def add(self, plane: Array) -> None:
        """The next lower byte of every word is known."""
        if self._classes is None:
            self._above = plane
        else:
            above = 0 if self._above is None else self._above
            self._above = np.where(above, np.uint8(3), np.minimum(plane, np.uint8(3)))


def _classes(kind: Words, previous: Array, number: int) -> Array | None:
    """How large the parent's words are: bytes as they are, wider floats by quarters of an octave below the largest."""
    if kind.kind == FLOAT:
        size = previous & previous.dtype.type((1 << (kind.bits - 1)) - 1)
        if kind.width > 1:
            size >>= previous.dtype.type(kind.mantissa_bits - 2)
    elif kind.width == 1:
        size = previous
    else:
        return None
    least = max(0, int(size.max()) + 1 - number)
    return (np.maximum(size, size.dtype.type(least)) - size.dtype.type(least)).astype(np.uint8)


def _best_base(kind: Words, words: Array, previous: Array | None) -> str | None:
    """By the bytes of a sample; None where these are no fewer than it has."""
    names = [
        name
        for name, base in BASES.items()
        if (previous is not None or not base.needs_parent) and (name != "before" or kind.kind != FLOAT)
    ]
    sample = _sample(words)
    before = None if previous is None else _sample(previous)

    def size(name: str) -> int:
        return len(encode_words(kind, name, sample, before if BASES[name].needs_parent else None))

    sizes = {name: size(name) for name in names}
    best = min(names, key=sizes.__getitem__)
    return best if sizes[best] < sample.nbytes else None


def _sample(words: Array) -> Array:
    """A few runs from all over."""
    if len(words) <= _SAMPLE_PARTS * _SAMPLE_WORDS:
        return words
    starts = np.linspace(0, len(words) - _SAMPLE_WORDS, _SAMPLE_PARTS).astype(np.int64)
    return np.concatenate([words[start : start + _SAMPLE_WORDS] for start in starts])


def encode_words(kind: Words, base: str, words: Array, previous: Array | None) -> bytes:
    """A chunk."""
    codes = np.ascontiguousarray(BASES[base].code(kind, words, previous))
    columns = codes.view(np.uint8).reshape(-1, kind.width)
    contexts = _Contexts(kind, previous)
    packed = []
    for place in reversed(range(kind.width)):
        plane = np.ascontiguousarray(columns[:, place])
        packed.append(_pack_plane(plane, contexts))
        contexts.add(plane)
    _zip_repetitions(columns, packed)
    return bytes(how for how, _ in packed) + join_blocks(block for _, block in packed)


def _pack_plane(plane: Array, contexts: _Contexts) -> tuple[int, bytes]:
    if (plane == plane[0]).all():
        return _CONSTANT, plane[:1].tobytes()
    if not _is_noise(plane[:_NOISE_SAMPLE]):
        symbols = encode_symbols(plane, *contexts.next())
        if len(symbols) < len(plane):
            return _SYMBOLS, symbols
    return _STORED, plane.tobytes()


def _is_noise(plane: Array) -> bool:
    """Whether its entropy is that of coins: it need not be coded to see that it takes its own length."""
    if len(plane) < _LEAST_NOISE:
        return False
    counts = np.bincount(plane, minlength=256)
    shares = counts[counts > 0] / len(plane)
    of_coins = 8 - 255 / (2 * np.log(2) * len(plane))
    return float(-(shares * np.log2(shares)).sum()) > of_coins - _NOISE_BITS


def _zip_repetitions(columns: Array, packed: list[tuple[int, bytes]]) -> None:
    """From the first plane that is not constant on, one zlib stream where that is smaller: text repeats itself."""
    first = next((number for number, (how, _) in enumerate(packed) if how != _CONSTANT), len(packed))
    size = sum(len(block) for _, block in packed[first:])
    rest = columns[:, : len(packed) - first]
    middle = max(0, (len(rest) - _ZLIB_SAMPLE) // 2)
    sample = rest[middle : middle + _ZLIB_SAMPLE]
    if size == 0 or len(zlib.compress(sample.tobytes(), _ZLIB_LEVEL)) * len(rest) >= size * len(sample):
        return
    stream = zlib.compress(rest.tobytes(), _ZLIB_LEVEL)
    if len(stream) < size:
        packed[first:] = [(_ZLIB, stream)] + [(_ZLIB, b"")] * (len(packed) - first - 1)


def _unpack(payload: bytes, kind: Words, previous: Array | None, codes: Array) -> None:
    """Into `codes`: bytes [words, width], the lowest first."""
    if len(payload) < kind.width:
        raise ValueError("a chunk of planes is shorter than its head")
    blocks = split_blocks(payload[kind.width :], kind.width)
    contexts = _Contexts(kind, previous)
    for place, how, block in zip(reversed(range(kind.width)), payload, blocks):
        if how == _ZLIB:
            if any(payload[number] != _ZLIB or blocks[number] for number in range(kind.width - place, kind.width)):
                raise ValueError("there are planes below a zlib stream, which has them in it")
            rest = np.frombuffer(inflate(block, len(codes) * (place + 1)), np.uint8)
            codes[:, : place + 1] = rest.reshape(-1, place + 1)
            return
        plane = _unpack_plane(how, block, len(codes), contexts)
        contexts.add(plane)
        codes[:, place] = plane


def _unpack_plane(how: int, block: bytes, count: int, contexts: _Contexts) -> Array:
    if how == _SYMBOLS:
        return decode_symbols(block, count, *contexts.next())
    if how not in (_STORED, _CONSTANT):
        raise ValueError(f"a plane of kind {how}; expected 0 to 3")
    expected = count if how == _STORED else 1
    if len(block) != expected:
        raise ValueError(f"a plane of {len(block)} bytes; expected {expected}")
    plane: Array = np.frombuffer(block, np.uint8)
    return plane if how == _STORED else np.broadcast_to(plane, (count,))
