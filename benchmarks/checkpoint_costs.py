"""What commcomp.checkpoint costs besides bytes: memory at the peak, the trainer's stall, what a second thread brings.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.checkpoint_snapshots --out runs/snapshots    # 10 minutes
    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.checkpoint_costs --snapshots runs/snapshots  # 8 minutes, quiet

Every measurement runs in a process of its own (benchmarks.checkpoint_costs_worker). States are real: one snapshot of a
GPT of 10.8 million parameters, and several side by side. Memory is in units of the state's bytes and beyond the state
itself. The stall is what a call of save_async takes, over what torch.save of the same state to the same disk does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.checkpoint_training import load_settings
from benchmarks.record import RESULTS, ROOT, provenance
from commcomp.checkpoint.parallel import default_threads

STATES = {"1 model": ((200,), (250,)), "4 models": ((200, 300, 400, 500), (250, 350, 450, 550))}
MODES = ("lossless", "cautious", "standard", "compact")
SPEED_MODES = ("lossless", "standard")
WAYS: dict[str, list[str]] = {
    "save": [],
    "save, no reference kept": ["--forget-reference"],
    "save_async": ["--save-async"],
}
THREADS = (1, 2)
_ALLOWED = {"save": 1.1, "save, no reference kept": 0.1, "save_async": 2.1, "load": 1.1}
"""Copies of the state at the peak, beyond the state itself, that are aimed at."""


class Workers:
    """Runs single measurements."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options

    def measure(self, what: str, state: str, mode: str, *extra: str) -> dict[str, Any]:
        """What benchmarks.checkpoint_costs_worker prints. Raises SystemExit with its log where it fails."""
        at, then = ([str(step) for step in steps] for steps in STATES[state])
        scratch = [] if self._options.scratch is None else ["--scratch", str(self._options.scratch)]
        command = [
            *(sys.executable, "-m", "benchmarks.checkpoint_costs_worker", what, "--mode", mode),
            *("--snapshots", str(self._options.snapshots), "--at", *at, "--then", *then, *scratch, *extra),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr}")
        return json.loads(done.stdout)


def measure_memory(workers: Workers, state: str, mode: str, scratch: Path | None) -> dict[str, Any]:
    """By way of saving: copies of the state beyond it, at the peak and kept; of loading too."""
    rows: dict[str, Any] = {}
    for way, arguments in WAYS.items():
        with tempfile.TemporaryDirectory(dir=scratch) as store:
            given = [*arguments, "--store", store]
            found = workers.measure("saving", state, mode, *given)
            whole = found.pop("raw_bytes")
            if way == "save":
                rows["load"] = {"peak": workers.measure("loading", state, mode, *given)["beyond"] / whole}
            found["after reopening"] = workers.measure("reopening", state, mode, *given)
        rows[way] = {save: _in_copies(row, whole) for save, row in found.items()}
    for way, allowed in _ALLOWED.items():
        peak = rows[way]["peak"] if way == "load" else max(row["peak"] for row in rows[way].values())
        print(f"{state}, {mode}, {way}: {peak:.3f} copies beyond the state, aimed at {allowed}", flush=True)
    return {"raw_bytes": whole, **rows}


def _in_copies(row: dict[str, Any], whole: int) -> dict[str, Any]:
    kept = row["kept"] / whole
    return {
        "peak": row["beyond"] / whole,
        "kept": kept,
        "above kept": row["beyond"] / whole - kept,
        "delta": row["is_delta"],
    }


def measure_stall(workers: Workers, repeats: int) -> dict[str, Any]:
    """Medians, in seconds, and ratios to torch.save. First calls are of processes that saved nothing large before."""
    given = ("stall", "1 model", "lossless", "--repeats", str(repeats))
    runs = [workers.measure(*given) for _ in range(repeats)]
    reserved = [workers.measure(*given, "--reserve") for _ in range(repeats)]
    calls = ("first call", "first call after reserve", "later calls")
    seconds = {
        "first call": [run["first call"] for run in runs],
        "first call after reserve": [run["first call"] for run in reserved],
        **{name: [value for run in runs + reserved for value in run[name]] for name in runs[0] if name != "first call"},
    }
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: medians[name] / medians["torch.save"] for name in calls}
    for name, ratio in ratios.items():
        print(f"save_async, {name}: {medians[name]:.3f} s, {ratio:.2f} of torch.save, aimed at 0.25", flush=True)
    return {"median_seconds": medians, "of_torch_save": ratios, "seconds": seconds}


def measure_speed(workers: Workers, mode: str, repeats: int) -> dict[str, Any]:
    """MB/s of raw state, the median of `repeats`, by threads; and what two are over one."""
    rows: dict[str, Any] = {}
    for threads in THREADS:
        arguments = ["--threads", str(threads), "--repeats", str(repeats)]
        found = workers.measure("speed", "4 models", mode, *arguments)
        rows[f"{threads} threads"] = {
            f"{way}, MB/s": found["raw_bytes"] / 1e6 / statistics.median(found[way]) for way in ("encode", "decode")
        }
    one, two = rows.values()
    rows["ratio"] = {way: two[f"{way}, MB/s"] / one[f"{way}, MB/s"] for way in ("encode", "decode")}
    print(f"{mode}: {rows}", flush=True)
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshots", type=Path, required=True, help="what benchmarks.checkpoint_snapshots made")
    parser.add_argument("--scratch", type=Path, help="where stores are written; default the temporary folder")
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES), help="whose memory is measured")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES), help="whose memory is measured")
    parser.add_argument("--speed-modes", nargs="*", choices=MODES, default=list(SPEED_MODES))
    parser.add_argument("--repeats", type=int, default=5, help="of times; 0: none is measured")
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint_costs.json")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    workers = Workers(options)
    result: dict[str, Any] = {**provenance(options), "run": load_settings(options.snapshots)}
    result["threads"] = {"memory and stall": default_threads(), "speed": list(THREADS)}
    if options.repeats:
        result["stall"] = measure_stall(workers, options.repeats)
        result["speed"] = {mode: measure_speed(workers, mode, options.repeats) for mode in options.speed_modes}
    result["memory"] = {
        state: {mode: measure_memory(workers, state, mode, options.scratch) for mode in options.modes}
        for state in options.states
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
