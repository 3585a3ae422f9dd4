"""The entropy coders alone: the same lattice symbols by zstd, LZMA, and both coders of commcomp.checkpoint.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.checkpoint_symbols --snapshots runs/snapshots

The symbols are those of the last snapshot of a chain in a lossy mode, one byte a symbol, all of a class (weights, first
moments, second moments) in a row for zstd and LZMA; ours are cut into the chunks of the file, tables included.
"""

from __future__ import annotations

import argparse
import json
import lzma
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import zstandard

from benchmarks.checkpoint_training import load_settings, load_snapshot, one_deterministic_thread
from benchmarks.record import RESULTS, provenance
from commcomp.checkpoint import SnapshotStore
from commcomp.checkpoint.codec import lattice
from commcomp.checkpoint.codec.native import Array, decode_symbols, encode_symbols

MODES = ("cautious", "standard", "compact")
CODERS = ("zstd-19", "lzma-9", "fast", "max")
_CLASSES = {"exp_avg": "m", "exp_avg_sq": "v"}


class Chunk:
    """The symbols of one chunk, their contexts, and in how many columns they lie."""

    def __init__(self, symbols: Array, contexts: Array, num_contexts: int, columns: int) -> None:
        self.symbols, self.contexts, self.num_contexts, self.columns = symbols, contexts, num_contexts, columns


def chunks_of(folder: Path, chain: list[int], mode: str) -> dict[str, list[Chunk]]:
    """By class, what the lattice coder was given for the last snapshot of the chain."""
    found: dict[str, list[Chunk]] = {}
    recording = False
    names: list[str] = []

    def recorded(symbols: Array, contexts: Array, num_contexts: int, columns: int) -> bytes:
        if recording:  # "max" is asked for below so that the columns are told
            kind = _CLASSES.get(names[-1].rpartition("/")[2], "w")
            found.setdefault(kind, []).append(Chunk(symbols.copy(), contexts.copy(), num_contexts, columns))
        return encode_symbols(symbols, contexts, num_contexts)

    original = lattice.encode_on_lattice

    def named(tensor: Any, *arguments: Any) -> Any:
        names.append(tensor.name)
        return original(tensor, *arguments)

    with (
        tempfile.TemporaryDirectory() as place,
        patch.object(lattice, "encode_symbols", recorded),
        patch("commcomp.checkpoint.codec.lossy.encode_on_lattice", named),
    ):
        store = SnapshotStore(place, mode=mode, threads=1, keyframe_every=len(chain), coder="max")
        for step in chain:
            recording = step == chain[-1]
            store.save(step, load_snapshot(folder, step))
    return found


def timed(encode: Callable[[bytes], bytes], data: bytes) -> dict[str, float]:
    """Bytes and seconds."""
    start = time.process_time()
    size = len(encode(data))
    return {"bytes": size, "encode_seconds": time.process_time() - start}


def ours(chunks: list[Chunk], most: bool) -> dict[str, float]:
    """Bytes and seconds of one of our coders; what it decodes is compared."""
    size, encoding, decoding = 0, 0.0, 0.0
    for chunk in chunks:
        start = time.process_time()
        data = encode_symbols(chunk.symbols, chunk.contexts, chunk.num_contexts, chunk.columns if most else 0)
        middle = time.process_time()
        decoded = decode_symbols(data, chunk.symbols.size, chunk.contexts, chunk.num_contexts)
        decoding += time.process_time() - middle
        encoding += middle - start
        size += len(data)
        if not (decoded == chunk.symbols).all():
            raise ValueError("symbols did not come back")
    return {"bytes": size, "encode_seconds": encoding, "decode_seconds": decoding}


def measure(chunks: list[Chunk]) -> dict[str, Any]:
    """All coders on one class."""
    data = b"".join(chunk.symbols.tobytes() for chunk in chunks)
    return {
        "symbols": len(data),
        "zstd-19": timed(zstandard.ZstdCompressor(level=19).compress, data),
        "lzma-9": timed(lambda raw: lzma.compress(raw, preset=9), data),
        "fast": ours(chunks, False),
        "max": ours(chunks, True),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshots", type=Path, required=True, help="what benchmarks.checkpoint_snapshots made")
    parser.add_argument("--chain", type=int, nargs="+", default=[200, 400, 600], help="steps; the last is measured")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["cautious", "standard"])
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint_symbols.json")
    options = parser.parse_args()
    one_deterministic_thread()
    found: dict[str, Any] = {}
    for mode in options.modes:
        chunks = chunks_of(options.snapshots, options.chain, mode)
        classes = {kind: measure(of_kind) for kind, of_kind in sorted(chunks.items())}
        total = {coder: sum(row[coder]["bytes"] for row in classes.values()) for coder in CODERS}
        over = {coder: size / total["fast"] for coder, size in total.items()}
        found[mode] = {"classes": classes, "bytes": total, "bytes / fast": over}
        print(mode, ", ".join(f"{coder} / fast {share:.3f}" for coder, share in over.items()), flush=True)
    result = {**provenance(options), "run": load_settings(options.snapshots), "modes": found}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
