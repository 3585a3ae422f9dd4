"""What other lossless coders make of a snapshot, with the one before it at hand: bytes and seconds, by tensor class.

    .venv/bin/python -m pip install -c launchers/constraints.txt -e '.[benchmarks]'       # zstandard, ZipNN
    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.checkpoint_baselines --snapshots runs/snapshots   # 20 minutes

The classes are w (weights), m (exp_avg) and v (exp_avg_sq), each coded as one array; `bf16 w` are the weights rounded
to bf16. Every result is decoded and compared bit by bit. Seconds are of processor time, one thread. LZMA is too slow
for all of it and codes equally spaced parts (`--lzma-mib`); its bytes and seconds are then scaled to the whole. Checked
on one pair, 199->200, that makes LZMA look larger than it is: v by 0.9 %, w and m by 0.2 to 0.5 %.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.byte_coders import CODERS, Bits, ByteCoder, size_of
from benchmarks.checkpoint_training import State, adam_tensors, load_settings, load_snapshot, one_deterministic_thread
from benchmarks.record import RESULTS, provenance

PAIRS = ((199, 200), (200, 210), (200, 250), (200, 300), (200, 400), (500, 600), (400, 600))
FP32 = ("w", "m", "v")
_PART_BYTES = 2**20


def classes_of(state: State) -> dict[str, Bits]:
    """The bits of all weights, first and second moments, and of the weights in bf16, each as one flat array."""
    kinds = zip(FP32, zip(*adam_tensors(state).values()))
    whole = {kind: torch.cat([tensor.flatten() for tensor in tensors]) for kind, tensors in kinds}
    bits = {kind: values.view(torch.int32).numpy().view(np.uint32) for kind, values in whole.items()}
    return {**bits, "bf16 w": whole["w"].bfloat16().view(torch.int16).numpy().view(np.uint16)}


def measure(coder: ByteCoder, values: Bits, previous: Bits) -> dict[str, float]:
    """Bytes and seconds of coding `values`; ValueError if they do not come back to the bit."""
    start = time.process_time()
    streams = coder.encode(values, previous)
    encoded = time.process_time()
    back = coder.decode(streams, previous)
    decoded = time.process_time()
    if back.dtype != values.dtype or not np.array_equal(back, values):
        raise ValueError(f"{coder.name} did not give back the {values.size} values that it was given")
    return {
        "raw_bytes": values.nbytes,
        "bytes": size_of(streams),
        "encode_seconds": encoded - start,
        "decode_seconds": decoded - encoded,
    }


def measure_parts(coder: ByteCoder, values: Bits, previous: Bits, most_bytes: int) -> dict[str, float]:
    """`measure` of equally spaced parts of a MiB, `most_bytes` in all, scaled to the whole."""
    part = _PART_BYTES // values.itemsize
    parts = max(1, most_bytes // _PART_BYTES)
    if parts * part >= values.size:
        return measure(coder, values, previous)
    starts = np.linspace(0, values.size - part, parts).astype(np.int64)
    chosen = (starts[:, None] + np.arange(part)).ravel()
    result = measure(coder, values[chosen], previous[chosen])
    scale = values.nbytes / result["raw_bytes"]
    return {key: value * scale for key, value in result.items()} | {"sampled_share": 1 / scale}


def measure_pair(folder: Path, before: int, after: int, names: list[str], lzma_bytes: int) -> dict[str, Any]:
    """Every coder on every class of the snapshot `after`, given that of step `before`."""
    previous, current = (classes_of(load_snapshot(folder, step)) for step in (before, after))
    rows: dict[str, Any] = {}
    for name in names:
        sampled = CODERS[name].name.startswith("lzma") and lzma_bytes
        row = rows[name] = {}
        for kind in current:
            arguments = (CODERS[name], current[kind], previous[kind])
            row[kind] = measure_parts(*arguments, lzma_bytes) if sampled else measure(*arguments)
        print(f"{before}->{after} {name}: " + _cells(row), flush=True)
    return rows


def _cells(row: dict[str, Any]) -> str:
    """Bits a value of every class, the ratio of the whole fp32 state, that of bf16 weights, and MB/s."""
    width = {kind: 16 if kind.startswith("bf16") else 32 for kind in row}
    bits = {kind: width[kind] * part["bytes"] / part["raw_bytes"] for kind, part in row.items()}
    state = [row[kind] for kind in FP32]
    raw = sum(part["raw_bytes"] for part in state)
    speeds = [raw / 1e6 / max(1e-9, sum(part[f"{way}_seconds"] for part in state)) for way in ("encode", "decode")]
    return (
        ", ".join(f"{kind} {value:.2f}" for kind, value in bits.items())
        + f" bits; {raw / sum(part['bytes'] for part in state):.3f}x fp32, {16 / bits['bf16 w']:.3f}x bf16"
        + f"; {speeds[0]:.0f} and {speeds[1]:.0f} MB/s"
    )


def print_table(pairs: dict[str, Any]) -> None:
    for pair, rows in pairs.items():
        print(f"\n{pair}")
        for name, row in rows.items():
            sampled = ", sampled" if "sampled_share" in row["w"] else ""
            print(f"  {name:20} {_cells(row)}{sampled}")


def pair(text: str) -> tuple[int, int]:
    """BEFORE:AFTER, two steps."""
    before, after = map(int, text.split(":"))
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshots", type=Path, required=True, help="what benchmarks.checkpoint_snapshots made")
    parser.add_argument("--pairs", type=pair, nargs="+", default=list(PAIRS), metavar="BEFORE:AFTER")
    parser.add_argument("--coders", nargs="+", choices=CODERS, default=list(CODERS))
    parser.add_argument("--lzma-mib", type=int, default=4, help="of a class that LZMA codes; 0: all of it")
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint_baselines.json")
    options = parser.parse_args()
    one_deterministic_thread()
    pairs: dict[str, Any] = {}
    result = {**provenance(options), "run": load_settings(options.snapshots), "pairs": pairs}
    for before, after in options.pairs:
        lzma_bytes = options.lzma_mib << 20
        pairs[f"{before}->{after}"] = measure_pair(options.snapshots, before, after, options.coders, lzma_bytes)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print_table(pairs)


if __name__ == "__main__":
    main()
