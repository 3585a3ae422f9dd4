"""What a fuzzer's input gives through the Python binding; floats.cpp, symbols.cpp and lattices.cpp read inputs alike.

`python -m tests.checkpoint.fuzz.replay` records the outcomes of the whole corpus in outcomes.json.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from commcomp.checkpoint.codec.native import (
    Known,
    coders,
    decode_floats,
    decode_symbols,
    encode_floats,
    encode_symbols,
)
from tests.checkpoint.fuzz import files
from tests.checkpoint.fuzz.files import REFUSED

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
OUTCOMES = HERE / "outcomes.json"

_MOST_VALUES = 4400
_CUTS = ("linear", "logarithmic", "relative", "linear")


class _Input:
    def __init__(self, data: bytes) -> None:
        self.rest = data

    def words(self, count: int, dtype: str = "u1") -> np.ndarray:
        """Zeros where the input has ended."""
        size = count * np.dtype(dtype).itemsize
        taken, self.rest = self.rest[:size].ljust(size, b"\0"), self.rest[size:]
        return np.frombuffer(taken, dtype)

    def byte(self) -> int:
        return int(self.words(1)[0])

    def count(self) -> int:
        return int(self.words(1, "<u2")[0]) % _MOST_VALUES

    def repeated(self, period: int, count: int, dtype: str = "u1") -> np.ndarray:
        return np.resize(self.words(period, dtype), count)


def _floats(data: bytes) -> str:
    given = _Input(data)
    flags, wish = given.byte(), given.byte()
    format, mantissa = ("bf16", 7) if flags & 1 else ("fp32", 23)
    cut = _CUTS[flags >> 1 & 3]
    resolution = wish % 5 + 1 if cut == "linear" else wish % mantissa
    count, scale = given.count(), given.words(1, "<f4")[0]
    columns = wish % count + 1 if flags & 64 and count else 0
    predictions, scales = (
        given.repeated(given.byte() % 8 + 1, count, "<u4").view(np.float32) if flags & bit else None for bit in (8, 16)
    )
    if flags & 32:
        symbols = given.repeated(given.byte() + 1, count)
        chunk = struct.pack("<I", len(given.rest)) + given.rest + encode_symbols(symbols)
    else:
        chunk = given.rest
    known = Known(cut, predictions, scales, float(scale), resolution)
    try:
        values = decode_floats(format, chunk, count, known)
    except ValueError:
        return REFUSED
    assert (decode_floats(format, encode_floats(format, values, known, columns), count, known) == values).all()
    return xxhash.xxh3_128(values.tobytes()).hexdigest()


def _symbols(data: bytes) -> str:
    given = _Input(data)
    num_contexts, flags, count = given.byte() % 255 + 1, given.byte(), given.count()
    contexts = given.repeated(given.byte() % 16 + 1, count) % np.uint8(num_contexts) if flags & 1 else None
    try:
        symbols = decode_symbols(given.rest, count, contexts, num_contexts)
    except ValueError:
        return REFUSED
    for columns in (0, flags % count + 1 if count else 0):
        again = encode_symbols(symbols, contexts, num_contexts, columns)
        assert (decode_symbols(again, count, contexts, num_contexts) == symbols).all()
    return xxhash.xxh3_128(symbols.tobytes()).hexdigest()


def _lattices(data: bytes) -> str:
    given = _Input(data)
    flags, rows, columns, step = given.byte(), given.byte() % 4 + 1, given.byte() + 1, given.words(1, "<f4")[0]
    step = abs(float(step)) if 0 < abs(step) < np.inf else 1.0

    def matrix() -> np.ndarray:
        few = given.repeated(given.byte() % 16 + 1, rows * columns, "<u4")
        return few.view(np.float32).reshape(rows, columns)

    values = matrix()
    predictions = matrix() if flags & 2 else None
    references = matrix() if flags & 4 else None
    known = (bool(flags & 1), predictions, references, step)
    symbols, reconstruction = np.empty((rows, columns), np.uint8), np.empty((rows, columns), np.float32)
    coders().cut_on_lattice(values, *known, symbols, reconstruction)
    joined = np.empty_like(reconstruction)
    coders().join_on_lattice(symbols, *known, joined)
    coded = symbols != 255
    assert joined[coded].tobytes() == reconstruction[coded].tobytes()
    return xxhash.xxh3_128(symbols.tobytes() + reconstruction.tobytes()).hexdigest()


TARGETS: dict[str, Callable[[bytes], str]] = {
    "floats": _floats,
    "symbols": _symbols,
    "lattices": _lattices,
    "files": files.outcome,
}


def outcomes(target: str) -> dict[str, str]:
    """By the name of each input of the corpus: a hash of what it decodes to, or REFUSED."""
    return {path.name: TARGETS[target](path.read_bytes()) for path in sorted((CORPUS / target).iterdir())}


if __name__ == "__main__":
    OUTCOMES.write_text(json.dumps({target: outcomes(target) for target in TARGETS}, indent=1) + "\n")
