"""Whole training runs: what a method does to the loss, and how long it takes to get there."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.methods import LOSSES, PLAIN, BenchmarkMethod, by_name, slug
from benchmarks.record import ROOT, provenance, run_on_cluster
from launchers.shaped_cluster import ShapedCluster

LOSS_METHODS = (
    "plain DDP",
    "torch PowerSGD rank 16",
    "commcomp rank 16 int8",
    "torch PowerSGD rank 4",
    "commcomp rank 4 int8",
)
SEED_METHODS = LOSS_METHODS[:3]


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
            output = folder / slug(name)
            script = ["examples/train_gpt.py", *_overrides(method, output, options)]
            wanted = {"link_rate": rate, "steps": options.loss_steps}
            runs[name] = run_unless_there(output, wanted, partial(run_on_cluster, cluster, script, rate, tries=3))
    kept = ("git_revision", "machine", "held_out", "median_step_seconds", "wire_bytes_per_step", "train_loss")
    rows = {name: {key: run[key] for key in kept} for name, run in runs.items()}
    return {**provenance(options), "rate": rate, "runs": rows, "targets": _loss_targets(rows)}


def measure_seeds(options: argparse.Namespace) -> dict[str, Any]:
    """Final held-out loss of every method with every seed, two processes on this machine."""
    runs = _runs_on_loopback(options.methods or SEED_METHODS, options.seeds, options)
    targets = {}
    for name, by_seed in runs.items():
        losses = [run["held_out"] for run in by_seed.values()]
        targets[name] = {"mean": statistics.fmean(losses), "least": min(losses), "most": max(losses)}
    return {**provenance(options), "runs": runs, "targets": targets}


def measure_methods(options: argparse.Namespace) -> dict[str, Any]:
    """Final held-out loss of every sharded method with every kind of residual, one seed, against plain FSDP2."""
    seed = options.seeds[0]
    runs = _runs_on_loopback(options.methods or [method.name for method in LOSSES], [seed], options)
    if options.keep:  # rows of earlier calls, each with its own revision
        earlier = json.loads(options.keep.read_text())["runs"]
        runs = {name: {int(key): run for key, run in by_seed.items()} for name, by_seed in earlier.items()} | runs
    plain = runs[LOSSES[0].name][seed]["held_out"]
    targets = {}
    for name, by_seed in runs.items():
        run = by_seed[seed]
        targets[name] = {"final held-out loss": run["held_out"], "against plain": run["held_out"] / plain - 1}
        targets[name]["MB sent a step"] = run["wire_bytes_per_step"] / 1e6
        targets[name]["MB kept"] = run["residual_bytes"] / 1e6
    return {**provenance(options), "runs": runs, "targets": targets}


def _runs_on_loopback(names: Sequence[str], seeds: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    """Of every method with every seed: revision, final held-out loss, bytes."""
    runs: dict[str, Any] = {}
    folder = Path(options.runs or tempfile.mkdtemp(prefix="commcomp-runs-"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for seed, name in itertools.product(seeds, (by_name(name).name for name in names)):
        output = folder / f"{slug(name)}_seed{seed}"
        command = [*torchrun, "examples/train_gpt.py", *_overrides(by_name(name), output, options), f"seed={seed}"]
        start = partial(subprocess.run, command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        run = run_unless_there(output, {"seed": seed, "steps": options.loss_steps}, start)
        kept = {key: run[key] for key in ("git_revision", "wire_bytes_per_step")}
        residual = run["stats"]["memory_bytes"]["residual"] if run["stats"] else 0
        runs.setdefault(name, {})[seed] = {"held_out": run["held_out"][-1][2], **kept, "residual_bytes": residual}
    return runs


def run_unless_there(output: Path, wanted: dict[str, Any], start: Callable[[], object]) -> dict[str, Any]:
    """The result.json under `output`: of an earlier, interrupted call if it is there, else `start` is to write it."""
    result = output / "result.json"
    if not result.exists():
        start()
    run = json.loads(result.read_text())
    found = {key: run.get(key, run["config"].get(key)) for key in wanted}
    if found != wanted:
        raise SystemExit(f"{result} is of {found}; expected {wanted}; give another --runs folder")
    return run


def _overrides(method: BenchmarkMethod, output: Path, options: argparse.Namespace) -> list[str]:
    gradient = dict(method.gradient)
    group = gradient.pop("method")
    if group == "dense":
        group = f"dense_{gradient.pop('dtype')}"
    return [
        f"gradient={group}",
        *(f"gradient.{key}={value}" for key, value in gradient.items()),
        f"parallel={method.parallel}",
        f"gather_bits={method.gather_bits}",
        f"gather_difference={method.gather_difference}",
        f"bucket_cap_mb={method.bucket_cap_mb}",
        f"batch={options.batch}",
        f"steps={options.loss_steps}",
        f"learning_rate={options.learning_rate}",
        f"eval_every={options.eval_every}",
        "eval_batches=16",
        "resume=none",
        f"output_dir={output}",
    ]


def _loss_targets(rows: dict[str, Any]) -> dict[str, dict[str, float]]:
    plain = rows[PLAIN.name]
    targets = {}
    for name, run in rows.items():
        entry = {"final held-out loss": run["held_out"][-1][2]}
        entry["loss against plain"] = run["held_out"][-1][2] / plain["held_out"][-1][2] - 1
        baseline = rows.get(by_name(name).equal_rank_baseline or "")
        if baseline:
            entry["loss against torch PowerSGD"] = run["held_out"][-1][2] / baseline["held_out"][-1][2] - 1
        targets[name] = entry | seconds_to_loss(run, plain)
    return targets


def seconds_to_loss(run: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """Seconds of training after which a run's held-out loss is what plain's is at 2/3 of its own; {} if it never is."""
    last_step = plain["held_out"][-1][0]
    step, plain_seconds, wanted = next(point for point in plain["held_out"] if point[0] >= 2 * last_step / 3)
    reached = next((point for point in run["held_out"] if point[2] <= wanted), None)
    if reached is None:
        return {}
    return {
        f"seconds to plain's loss at step {step}": reached[1],
        "plain seconds / these seconds": plain_seconds / reached[1],
    }
