"""Step time, bytes, CPU time and loss of gradient synchronisation over really limited links.

    sudo .venv/bin/python -m benchmarks.gradient_sync steps   # 25 minutes: step times of all methods, two rates
    sudo .venv/bin/python -m benchmarks.gradient_sync loss    # 50 minutes: 420 steps at 100 Mbit/s, held-out loss
    .venv/bin/python -m benchmarks.gradient_sync seeds        # 40 minutes: that loss with several seeds, on loopback
    sudo .venv/bin/python -m benchmarks.gradient_sync steps --parallel fsdp2           # step times under fully_shard
    sudo .venv/bin/python -m benchmarks.gradient_sync steps --parallel hsdp --nproc 2  # shards inside the nodes

Nodes are network namespaces whose links the kernel holds to the rate (launchers/shaped_cluster.py). Each part writes
JSON under benchmarks/results/ and prints a table with the targets it is held against. What `seeds` measures does not
depend on the link.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.methods import METHODS, NO_COMMUNICATION, PLAIN, SHARDED, BenchmarkMethod, by_name, plain_of
from commcomp.telemetry.environment import git_revision, machine, versions
from launchers.shaped_cluster import ShapedCluster, capabilities

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LOSS_METHODS = (
    "plain DDP",
    "torch PowerSGD rank 16",
    "commcomp rank 16 int8",
    "torch PowerSGD rank 4",
    "commcomp rank 4 int8",
)
SEED_METHODS = LOSS_METHODS[:3]


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
            arguments += ["--rounds", str(options.rounds), "--steps", str(options.steps), "--out", str(out)]
            _run(cluster, ["benchmarks/gradient_sync_worker.py", *arguments], rate)
            raw = json.loads(out.read_text())
        idle = raw["blocks"].get(NO_COMMUNICATION.name)
        rates[rate] = {name: _summarise(blocks, idle) for name, blocks in raw["blocks"].items()}
    return {
        **_provenance(options),
        "machine": raw["machine"],
        "steps_per_method": options.rounds * options.steps,
        "parameters": raw["parameters"],
        "rates": rates,
        "targets": {rate: _step_targets(rows, plain_of(options.parallel).name) for rate, rows in rates.items()},
    }


_STOLEN_ALLOWED = 0.01
"""Share of a block's CPU time that other guests of the host may take; blocks with more are left out."""


def _summarise(blocks: list[dict[str, Any]], idle: list[dict[str, Any]] | None) -> dict[str, float]:
    """Figures of one method; CPU time added is taken within each round, since the machine's speed drifts over them."""
    kept = _quiet_of([(block,) for block in blocks])
    seconds = sorted(value for (block,) in kept for value in block["seconds"])
    cpu = [value for (block,) in kept for value in block["cpu_seconds"]]
    added = [
        statistics.median(block["cpu_seconds"]) - statistics.median(base["cpu_seconds"])
        for block, base in _quiet_of(list(zip(blocks, idle or [], strict=False)))
    ]
    return {
        "median_step_seconds": statistics.median(seconds),
        "p10_step_seconds": seconds[len(seconds) // 10],
        "p90_step_seconds": seconds[len(seconds) * 9 // 10],
        "median_cpu_seconds": statistics.median(cpu),
        **({"median_cpu_seconds_added": statistics.median(added)} if added else {}),
        "blocks": len(blocks),
        "blocks_left_out": len(blocks) - len(kept),
        "stolen_share": statistics.fmean(block["stolen_share"] for (block,) in kept),
        "interface_payload_bytes_per_step": statistics.fmean(block["interface_bytes"] for block in blocks),
        "counted_bytes_per_step": statistics.fmean(block["counted_bytes"] for block in blocks),
    }


def _quiet_of(groups: list[tuple[dict[str, Any], ...]]) -> list[tuple[dict[str, Any], ...]]:
    """Groups of blocks of which none was disturbed; all groups if fewer than three are left."""
    quiet = [group for group in groups if all(block["stolen_share"] <= _STOLEN_ALLOWED for block in group)]
    return quiet if len(quiet) >= 3 else groups


def _step_targets(rows: dict[str, dict[str, float]], plain: str) -> dict[str, dict[str, float]]:
    """For each of our rows: step time against the limit, plain and torch's PowerSGD; CPU time added; byte counts."""
    ratios = {}
    for name, row in rows.items():
        baseline = by_name(name).equal_rank_baseline
        if not name.startswith("commcomp"):
            continue
        ours, entry = row["median_step_seconds"], {}
        if NO_COMMUNICATION.name in rows:
            entry["ours / no communication"] = ours / rows[NO_COMMUNICATION.name]["median_step_seconds"]
        if plain in rows:
            entry["plain / ours"] = rows[plain]["median_step_seconds"] / ours
        if baseline in rows:
            theirs = rows[baseline]
            entry["torch PowerSGD / ours"] = theirs["median_step_seconds"] / ours
            if added := theirs.get("median_cpu_seconds_added"):
                entry["CPU seconds added, ours / torch PowerSGD"] = row["median_cpu_seconds_added"] / added
        if plain == PLAIN.name:  # sharded models gather parameters too, which nobody counts
            entry["interface bytes / counted bytes"] = (
                row["interface_payload_bytes_per_step"] / row["counted_bytes_per_step"]
            )
        ratios[name] = entry
    return ratios


def measure_loss(options: argparse.Namespace) -> dict[str, Any]:
    """Whole training runs: held-out loss at equal steps, and seconds to plain's loss at 2/3 of its run."""
    names = options.methods or LOSS_METHODS
    if PLAIN.name not in names:
        raise SystemExit(f"--methods must include {PLAIN.name!r}: the others are compared with it")
    runs: dict[str, Any] = {}
    rate = options.rates[0]
    folder = Path(options.runs or tempfile.mkdtemp(prefix="commcomp-loss-"))
    with ShapedCluster(nodes=options.nodes, rate=rate) as cluster:
        for name in names:
            method = by_name(name)
            output = folder / _folder_name(name)
            script = ["examples/train_gpt.py", *_overrides(method, output, options)]
            wanted = {"link_rate": rate, "steps": options.loss_steps}
            runs[name] = _run_unless_there(output, wanted, partial(_run, cluster, script, rate, tries=3))
    kept = ("git_revision", "machine", "held_out", "median_step_seconds", "wire_bytes_per_step", "train_loss")
    rows = {name: {key: run[key] for key in kept} for name, run in runs.items()}
    return {**_provenance(options), "rate": rate, "runs": rows, "targets": _loss_targets(rows)}


def measure_seeds(options: argparse.Namespace) -> dict[str, Any]:
    """Final held-out loss of every method with every seed, two processes on this machine."""
    runs: dict[str, Any] = {}
    folder = Path(options.runs or tempfile.mkdtemp(prefix="commcomp-seeds-"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for seed, name in itertools.product(options.seeds, options.methods or SEED_METHODS):
        output = folder / f"{_folder_name(name)}_seed{seed}"
        command = [*torchrun, "examples/train_gpt.py", *_overrides(by_name(name), output, options), f"seed={seed}"]
        start = partial(subprocess.run, command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        run = _run_unless_there(output, {"seed": seed, "steps": options.loss_steps}, start)
        runs.setdefault(name, {})[seed] = {"git_revision": run["git_revision"], "held_out": run["held_out"][-1][2]}
    targets = {}
    for name, by_seed in runs.items():
        losses = [run["held_out"] for run in by_seed.values()]
        targets[name] = {"mean": statistics.fmean(losses), "least": min(losses), "most": max(losses)}
    return {**_provenance(options), "runs": runs, "targets": targets}


def _run_unless_there(output: Path, wanted: dict[str, Any], start: Callable[[], object]) -> dict[str, Any]:
    """The result.json under `output`: of an earlier, interrupted call if it is there, else `start` is to write it."""
    result = output / "result.json"
    if not result.exists():
        start()
    run = json.loads(result.read_text())
    found = {key: run.get(key, run["config"].get(key)) for key in wanted}
    if found != wanted:
        raise SystemExit(f"{result} is of {found}; expected {wanted}; give another --runs folder")
    return run


def _folder_name(method: str) -> str:
    return method.replace(" ", "_").replace(",", "")


def _overrides(method: BenchmarkMethod, output: Path, options: argparse.Namespace) -> list[str]:
    gradient = dict(method.gradient)
    group = gradient.pop("method")
    if group == "dense":
        group = f"dense_{gradient.pop('dtype')}"
    return [
        f"gradient={group}",
        *(f"gradient.{key}={value}" for key, value in gradient.items()),
        f"bucket_cap_mb={method.bucket_cap_mb}",
        f"batch={options.batch}",
        f"steps={options.loss_steps}",
        f"learning_rate={options.learning_rate}",
        "eval_every=20",
        "eval_batches=16",
        "resume=none",
        f"output_dir={output}",
    ]


def _loss_targets(rows: dict[str, Any]) -> dict[str, dict[str, float]]:
    plain = rows[PLAIN.name]
    last_step = plain["held_out"][-1][0]
    step, plain_seconds, wanted = next(point for point in plain["held_out"] if point[0] >= 2 * last_step / 3)
    targets = {}
    for name, run in rows.items():
        entry = {"final held-out loss": run["held_out"][-1][2]}
        entry["loss against plain"] = run["held_out"][-1][2] / plain["held_out"][-1][2] - 1
        baseline = rows.get(by_name(name).equal_rank_baseline or "")
        if baseline:
            entry["loss against torch PowerSGD"] = run["held_out"][-1][2] / baseline["held_out"][-1][2] - 1
        reached = next((point for point in run["held_out"] if point[2] <= wanted), None)
        if reached:
            entry[f"seconds to plain's loss at step {step}"] = reached[1]
            entry["plain seconds / these seconds"] = plain_seconds / reached[1]
        targets[name] = entry
    return targets


def _run(cluster: ShapedCluster, script: list[str], rate: str, *, tries: int = 1) -> None:
    """Run a script on the cluster; several tries where torch's PowerSGD is in it, which may abort on gloo."""
    for _ in range(tries):
        print(f"# {rate}: {' '.join(script)}", flush=True)
        status = cluster.run([str(ROOT / script[0]), *script[1:]])
        if status == 0:
            return
    raise SystemExit(f"{script[0]} at {rate} ended with status {status}; its logs are in {cluster.logs}")


def _provenance(options: argparse.Namespace) -> dict[str, Any]:
    settings = {key: value for key, value in vars(options).items() if key not in ("runs", "out") and value is not None}
    return {
        "command": "python -m benchmarks.gradient_sync " + shlex.join(_without_folders(sys.argv[1:])),
        "date": time.strftime("%Y-%m-%d"),
        "git_revision": git_revision(ROOT),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
    }


def _without_folders(arguments: list[str]) -> list[str]:
    """The command line less the folders of this machine, which change no figure."""
    kept = iter(arguments)
    return [argument for argument in kept if argument not in ("--runs", "--out") or not next(kept, None)]


def _print_targets(targets: dict[str, dict[str, float]], title: str) -> None:
    print(f"\n{title}")
    for name, entry in targets.items():
        print(f"  {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in entry.items()))


def _print_rows(rate: str, rows: dict[str, dict[str, float]]) -> None:
    columns = ("step ms", "p10", "p90", "CPU ms", "added", "MB sent", "counted", "left out")
    print(f"\n{rate:40s} " + " ".join(f"{column:>9s}" for column in columns))
    for name, row in rows.items():
        times = [1e3 * row[key] for key in ("median_step_seconds", "p10_step_seconds", "p90_step_seconds")]
        cpu = [1e3 * row.get(key, math.nan) for key in ("median_cpu_seconds", "median_cpu_seconds_added")]
        sent = [row[key] / 1e6 for key in ("interface_payload_bytes_per_step", "counted_bytes_per_step")]
        cells = [f"{value:9.1f}" for value in times + cpu] + [f"{value:9.4f}" for value in sent]
        cells.append(f"{row['blocks_left_out']:6d}/{row['blocks']:d}")
        print(f"{name:40s} " + " ".join(cells))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("steps", "loss", "seeds"))
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--nproc", type=int, default=1, help="steps: processes a node")
    parser.add_argument("--parallel", default="ddp", choices=("ddp", *SHARDED), help="steps: which table of rows")
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"])
    parser.add_argument("--methods", nargs="+", help="names of rows, default all")
    parser.add_argument("--batch", type=int, default=2, help="windows of 256 bytes a rank and step")
    parser.add_argument("--rounds", type=int, default=5, help="steps: blocks a method")
    parser.add_argument("--steps", type=int, default=8, help="steps: steps a block")
    parser.add_argument("--loss-steps", type=int, default=420)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds: the seeds")
    parser.add_argument("--runs", help="loss, seeds: folder of the runs' own files; what is there is not repeated")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.part != "seeds" and (reason := capabilities()):
        raise SystemExit(f"shaped links do not work here: {reason}")
    result = {"steps": measure_steps, "loss": measure_loss, "seeds": measure_seeds}[options.part](options)
    kind = "gradient_sync" if options.parallel == "ddp" else options.parallel
    out = options.out or RESULTS / f"{kind}_{options.part}_{options.nodes}_nodes.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    for rate, rows in result.get("rates", {}).items():
        _print_rows(rate, rows)
        _print_targets(result["targets"][rate], f"{rate}, ratios")
    if options.part != "steps":
        _print_targets(result["targets"], "held-out loss")
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
