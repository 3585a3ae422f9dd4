"""Step time, bytes, CPU time and loss of gradient synchronisation over really limited links.

    sudo .venv/bin/python -m benchmarks.gradient_sync steps   # 25 minutes: step times of all methods, two rates
    sudo .venv/bin/python -m benchmarks.gradient_sync loss    # 50 minutes: 420 steps at 100 Mbit/s, held-out loss
    .venv/bin/python -m benchmarks.gradient_sync seeds        # 40 minutes: that loss with several seeds, on loopback
    sudo .venv/bin/python -m benchmarks.gradient_sync steps --parallel fsdp2           # step times under fully_shard
    sudo .venv/bin/python -m benchmarks.gradient_sync steps --parallel hsdp --nproc 2  # shards inside the nodes
    .venv/bin/python -m benchmarks.gradient_sync methods      # 2 hours: loss by method and residual, fully_shard

Nodes are network namespaces whose links the kernel holds to the rate (launchers/shaped_cluster.py). Each part writes
JSON under benchmarks/results/ and prints a table with the targets it is held against. What `seeds` and `methods`
measure does not depend on the link.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.block_figures import print_rows, print_targets, summarise
from benchmarks.methods import METHODS, PLAIN, SHARDED, by_name, idle_of, plain_of, two_shot_of
from benchmarks.record import RESULTS, provenance, run_on_cluster
from benchmarks.training_runs import measure_loss, measure_methods, measure_seeds
from launchers.shaped_cluster import ShapedCluster, capabilities


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Step times of all methods at every rate, blocks of the methods alternating within one process."""
    table = METHODS if options.parallel == "ddp" else SHARDED[options.parallel]
    methods = [by_name(name) for name in options.methods] if options.methods else list(table)
    rates: dict[str, Any] = {}
    for rate in options.rates:
        cluster_of = partial(ShapedCluster, nodes=options.nodes, nproc=options.nproc)
        with tempfile.TemporaryDirectory() as folder, cluster_of(rate=rate) as cluster:
            out = Path(folder) / "blocks.json"
            arguments = ["--methods", *(method.name for method in methods), "--batch", str(options.batch)]
            arguments += ["--window", str(options.window)]
            arguments += ["--rounds", str(options.rounds), "--steps", str(options.steps), "--out", str(out)]
            run_on_cluster(cluster, ["benchmarks/gradient_sync_worker.py", *arguments], rate)
            raw = json.loads(out.read_text())
        idle = raw["blocks"].get(idle_of(options.parallel).name)
        rates[rate] = {name: summarise(blocks, idle) for name, blocks in raw["blocks"].items()}
    return {
        **provenance(options),
        "machine": raw["machine"],
        "steps_per_method": options.rounds * options.steps,
        "parameters": raw["parameters"],
        "rates": rates,
        "targets": {rate: _step_targets(rows, options) for rate, rows in rates.items()},
    }


def _step_targets(rows: dict[str, dict[str, float]], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """For each of our rows: step time against the limit, plain and torch's PowerSGD; CPU time added; byte counts."""
    parallel, sharded = options.parallel, options.parallel != PLAIN.parallel
    plain, idle = plain_of(parallel).name, idle_of(parallel).name
    ratios = {}
    for name, row in rows.items():
        baseline = by_name(name).equal_rank_baseline
        if not name.startswith("commcomp"):
            continue
        ours, entry = row["median_step_seconds"], {}
        if idle in rows:
            entry["ours / no communication"] = ours / rows[idle]["median_step_seconds"]
        if plain in rows:
            entry["plain / ours"] = rows[plain]["median_step_seconds"] / ours
        if baseline in rows:
            theirs = rows[baseline]
            entry["torch PowerSGD / ours"] = theirs["median_step_seconds"] / ours
            if added := theirs.get("median_cpu_seconds_added"):
                entry["CPU seconds added, ours / torch PowerSGD"] = row["median_cpu_seconds_added"] / added
        if sharded:
            entry |= _sharded_targets(row, rows, parallel, gathers_less=bool(by_name(name).gather_bits))
        counts_gathers = not sharded or by_name(name).gather_bits > 0
        if counts_gathers or idle in rows:
            gathers = 0.0 if counts_gathers else rows[idle]["interface_payload_bytes_per_step"]
            sent = row["interface_payload_bytes_per_step"] - gathers
            # Of the link's bytes each of a node's processes sends its part, and counts that.
            entry["interface bytes / counted bytes"] = sent / (options.nproc * row["counted_bytes_per_step"])
        ratios[name] = entry
    return ratios


def _sharded_targets(
    row: dict[str, float], rows: dict[str, dict[str, float]], parallel: str, *, gathers_less: bool
) -> dict[str, float]:
    """Against the same pattern with whole values: gloo's own reduce-scatter sends twice what it would have to."""
    entry = {}
    ours, idle = row["median_step_seconds"], rows.get(idle_of(parallel).name)
    for dtype in ("fp32", "bf16"):
        other = rows.get(two_shot_of(parallel, dtype).name)
        if other is None:
            continue
        entry[f"two-shot {dtype} / ours"] = other["median_step_seconds"] / ours
        if idle is not None and row is not other and not gathers_less:
            least = idle["median_step_seconds"]
            entry[f"reduction added, two-shot {dtype} / ours"] = (other["median_step_seconds"] - least) / (ours - least)
    return entry


_PARTS = {"steps": measure_steps, "loss": measure_loss, "seeds": measure_seeds, "methods": measure_methods}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(_PARTS))
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--nproc", type=int, default=1, help="steps: processes a node")
    parser.add_argument("--parallel", default="ddp", choices=("ddp", *SHARDED), help="steps: which table of rows")
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"])
    parser.add_argument("--methods", nargs="+", help="rows, by name or as in sparse-1-percent-hsdp, default all")
    parser.add_argument("--batch", type=int, default=2, help="windows of text a rank and step")
    parser.add_argument("--window", type=int, default=256, help="steps: bytes of text in a window, 256 at most")
    parser.add_argument("--rounds", type=int, default=5, help="steps: blocks a method")
    parser.add_argument("--steps", type=int, default=8, help="steps: steps a block")
    parser.add_argument("--loss-steps", type=int, default=420)
    parser.add_argument("--eval-every", type=int, default=20, help="all but steps: steps between held-out losses")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds, methods: the seeds")
    parser.add_argument("--runs", help="all but steps: folder of the runs' own files; what is there is not repeated")
    parser.add_argument("--keep", type=Path, help="methods: a results file whose other rows are kept")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.part in ("steps", "loss") and (reason := capabilities()):
        raise SystemExit(f"shaped links do not work here: {reason}")
    if options.part == "methods":
        options.parallel = "fsdp2"
    result = _PARTS[options.part](options)
    kind = "gradient_sync" if options.parallel == "ddp" else options.parallel
    out = options.out or RESULTS / f"{kind}_{options.part}_{options.nodes}_nodes.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    for rate, rows in result.get("rates", {}).items():
        print_rows(rate, rows)
        print_targets(result["targets"][rate], f"{rate}, ratios")
    if options.part != "steps":
        print_targets(result["targets"], "held-out loss")
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
