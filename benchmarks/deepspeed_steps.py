"""Step time of DeepSpeed engines of every ZeRO stage over a really limited link, their gradients plain and compressed.

    sudo .venv/bin/python -m benchmarks.deepspeed_steps    # 25 minutes

Nodes are network namespaces (launchers/shaped_cluster.py). A row without any reduction of gradients shows what else a
stage sends: parameters, after the step under ZeRO 1 and 2, before every use under ZeRO 3. Writes JSON under
benchmarks/results/ and prints a table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.block_figures import print_rows, print_targets, summarise
from benchmarks.record import RESULTS, provenance, run_on_cluster
from launchers.shaped_cluster import ShapedCluster, capabilities

_NOTHING, _PLAIN = "no reduction", "plain fp32"
_METHODS = (
    _NOTHING, _PLAIN, "communication_data_type fp16", "commcomp rank 4 int8", "commcomp rank 16 int8",
    "commcomp 4 bits",
)  # fmt: skip


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Step times of all methods under every stage, blocks of the methods alternating within one process."""
    stages: dict[str, Any] = {}
    for stage in options.stages:
        with tempfile.TemporaryDirectory() as folder, ShapedCluster(nodes=options.nodes, rate=options.rate) as cluster:
            out = Path(folder) / "blocks.json"
            arguments = ["--methods", *options.methods, "--stage", str(stage), "--out", str(out)]
            for name in ("batch", "window", "rounds", "steps"):
                arguments += [f"--{name}", str(getattr(options, name))]
            run_on_cluster(cluster, ["benchmarks/deepspeed_worker.py", *arguments], options.rate)
            raw = json.loads(out.read_text())
        idle = raw["blocks"].get(_NOTHING)
        stages[f"ZeRO {stage}"] = {name: summarise(blocks, idle) for name, blocks in raw["blocks"].items()}
    return {
        **provenance(options),
        "machine": raw["machine"],
        "parameters": raw["parameters"],
        "rate": options.rate,
        "stages": stages,
        "targets": {stage: _targets(rows) for stage, rows in stages.items()},
    }


def _targets(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of each of our rows: against plain DeepSpeed, its 16-bit reduction, and what the stage takes without any."""
    targets = {}
    for name, row in rows.items():
        seconds, entry = row["median_step_seconds"], {}
        for other in rows:
            if name.startswith("commcomp") and not other.startswith("commcomp"):
                entry[f"{other} / this"] = rows[other]["median_step_seconds"] / seconds
        if _NOTHING in rows:
            without = rows[_NOTHING]["interface_payload_bytes_per_step"]
            entry["share of bytes that parameters take"] = without / row["interface_payload_bytes_per_step"]
            if row["counted_bytes_per_step"]:
                sent = row["interface_payload_bytes_per_step"] - without
                entry["interface bytes / counted bytes"] = sent / row["counted_bytes_per_step"]
        targets[name] = entry
    return targets


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rate", default="100mbit")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=list(_METHODS))
    parser.add_argument("--batch", type=int, default=2, help="windows of text a rank and step")
    parser.add_argument("--window", type=int, default=256, help="bytes of text in a window, 256 at most")
    parser.add_argument("--rounds", type=int, default=4, help="blocks a method")
    parser.add_argument("--steps", type=int, default=4, help="steps a block")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if reason := capabilities():
        raise SystemExit(f"shaped links do not work here: {reason}")
    result = measure(options)
    out = options.out or RESULTS / f"deepspeed_steps_{options.nodes}_nodes.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    for stage, rows in result["stages"].items():
        print_rows(f"{stage}, {options.rate}", rows)
        print_targets(result["targets"][stage], f"{stage}, ratios")
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
