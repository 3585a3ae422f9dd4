"""Snapshots by commcomp.checkpoint against what others make of the same states: bytes, seconds, bits a value.

    .venv/bin/python -m pip install -c launchers/constraints.txt -e '.[benchmarks]'
    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.checkpoint_snapshots --out runs/snapshots      # 10 minutes
    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.checkpoint --snapshots runs/snapshots          # 15 minutes

Of every pair of snapshots the second is coded against the first, by each mode of SnapshotStore from state dict to file
on disk and back, and by the coders of benchmarks.checkpoint_baselines from array to array. bf16 weights are coded
alone, without moments. Seconds are of processor time on one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.byte_coders import CODERS
from benchmarks.checkpoint_baselines import measure_pair, pair
from benchmarks.checkpoint_resume import MODES
from benchmarks.checkpoint_training import State, load_settings, load_snapshot, one_deterministic_thread
from benchmarks.record import RESULTS, provenance
from commcomp.checkpoint import SnapshotStore
from commcomp.checkpoint.decoder import decode, whole

PAIRS = ((199, 200), (200, 210), (200, 250), (500, 600), (400, 600))
_MOMENTS = {"exp_avg": "m", "exp_avg_sq": "v"}


def bf16_weights(state: State) -> dict[str, Any]:
    """The weights alone, rounded to bf16, as they are published or served."""
    return {"model": {name: value.bfloat16() for name, value in state["model"].items()}}


def measure_mode(states: list[State], mode: str) -> dict[str, Any]:
    """The last of `states`, coded against the one before it: bytes and bits by class, ratio, seconds of one core."""
    with tempfile.TemporaryDirectory() as folder:
        store = SnapshotStore(folder, mode=mode, threads=1)
        for step, state in enumerate(states):
            start = time.process_time()
            report = store.save(step, state)
            encoded = time.process_time() - start
        last = len(states) - 1
        start = time.process_time()
        with store._files.open(last) as chain:
            bytes_of = _by_class(chain[0])
        loaded, decoded = store.load(last), time.process_time() - start
        if mode == "lossless":
            _require_same(states[-1], loaded)
        alone = _decode_seconds(store, last)
    return {
        "raw_bytes": report.raw_bytes,
        "bytes": report.bytes,
        "ratio": report.ratio,
        "by_class": bytes_of,
        "encode_seconds": encoded,
        "decode_seconds": alone,
        "decode_seconds_with_parents": decoded,
    }


def _decode_seconds(store: SnapshotStore, step: int) -> float:
    """Of the last snapshot alone, its parent at hand."""
    with store._files.open(step) as chain:
        if len(chain.open_all()) == 1:
            parent = None
        else:
            parent = decode(_Parent(chain), whole(chain[1]))
        start = time.process_time()
        decode(chain, whole(chain[0]), parent=parent)
        return time.process_time() - start


class _Parent:
    """A chain from its second snapshot on."""

    def __init__(self, chain: Any) -> None:
        self._chain = chain

    def __getitem__(self, index: int) -> Any:
        return self._chain[index + 1]


def _by_class(reader: Any) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, tensor in reader.tensors.items():
        kind = "w" if name.startswith("model/") else _MOMENTS.get(name.rpartition("/")[2], "other")
        row = found.setdefault(kind, {"values": 0, "side_bytes": 0, "chunk_bytes": 0})
        row["values"] += tensor.header.num_values
        row["side_bytes"] += tensor.side.length
        row["chunk_bytes"] += sum(block.length for block in tensor.chunks)
    for row in found.values():
        row["bits_a_value"] = 8 * (row["side_bytes"] + row["chunk_bytes"]) / max(1, row["values"])
    return found


def _require_same(given: Any, loaded: Any) -> None:
    if isinstance(given, torch.Tensor):
        if not torch.equal(given.reshape(-1).view(torch.uint8), loaded.reshape(-1).view(torch.uint8)):
            raise ValueError("a tensor did not come back to the bit")
    elif isinstance(given, dict):
        for key, value in given.items():
            _require_same(value, loaded[key])


def measure(folder: Path, before: int, after: int, options: argparse.Namespace) -> dict[str, Any]:
    """One pair: our modes, bf16 weights, the others."""
    states = [load_snapshot(folder, step) for step in (before, after)]
    rows: dict[str, Any] = {}
    for mode in MODES:
        given = states
        if mode != "lossless" and options.chain:  # a lossy chain is coded against reconstructions
            given = [load_snapshot(folder, step) for step in options.chain if step < before] + states
        rows[mode] = measure_mode(given, mode)
        _say(f"{before}->{after} {mode}", rows[mode])
    rows["lossless, bf16 weights"] = measure_mode([bf16_weights(state) for state in states], "lossless")
    _say(f"{before}->{after} bf16 weights", rows["lossless, bf16 weights"])
    others = measure_pair(folder, before, after, options.coders, options.lzma_mib << 20)
    return {"ours": rows, "others": others, "targets": targets(rows, others)}


def targets(ours: dict[str, Any], others: dict[str, Any]) -> dict[str, float]:
    """The ratios that are asked for."""
    raw = ours["lossless"]["raw_bytes"]
    entry = {f"{mode}, raw / ours": row["ratio"] for mode, row in ours.items()}
    for mode in ("lossless", "standard"):
        entry[f"{mode}, MB/s encoding"] = raw / 1e6 / ours[mode]["encode_seconds"]
        entry[f"{mode}, MB/s decoding"] = raw / 1e6 / ours[mode]["decode_seconds"]
    if others:
        sizes = {name: sum(row[kind]["bytes"] for kind in ("w", "m", "v")) for name, row in others.items()}
        best = min(sizes, key=sizes.__getitem__)
        entry[f"best of the others ({best}) / lossless"] = sizes[best] / ours["lossless"]["bytes"]
        half = min(others, key=lambda name: others[name]["bf16 w"]["bytes"])
        ours_half = ours["lossless, bf16 weights"]["bytes"]
        entry[f"bf16 weights, best of the others ({half}) / lossless"] = others[half]["bf16 w"]["bytes"] / ours_half
    return entry


def _say(what: str, row: dict[str, Any]) -> None:
    bits = ", ".join(f"{kind} {part['bits_a_value']:.3f}" for kind, part in row["by_class"].items())
    speeds = [row["raw_bytes"] / 1e6 / row[f"{way}_seconds"] for way in ("encode", "decode")]
    print(f"{what}: {row['ratio']:.3f}x, {bits} bits; {speeds[0]:.0f} and {speeds[1]:.0f} MB/s", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshots", type=Path, required=True, help="what benchmarks.checkpoint_snapshots made")
    parser.add_argument("--pairs", type=pair, nargs="+", default=list(PAIRS), metavar="BEFORE:AFTER")
    parser.add_argument("--chain", type=int, nargs="*", default=[200, 300, 400, 500], help="saved before a lossy pair")
    parser.add_argument("--coders", nargs="*", choices=CODERS, default=["zstd-3", "zstd-19", "ZipNN", "BitX"])
    parser.add_argument("--lzma-mib", type=int, default=4, help="of a class that LZMA codes; 0: all of it")
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint.json")
    options = parser.parse_args()
    one_deterministic_thread()
    pairs: dict[str, Any] = {}
    result = {**provenance(options), "run": load_settings(options.snapshots), "pairs": pairs}
    for before, after in options.pairs:
        found = pairs[f"{before}->{after}"] = measure(options.snapshots, before, after, options)
        for name, value in found["targets"].items():
            print(f"  {name}: {value:.4g}")
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
