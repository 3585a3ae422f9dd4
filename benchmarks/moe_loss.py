"""Whole training runs of the Mixture-of-Experts GPT: what a way of sending tokens does to the loss."""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.methods import slug
from benchmarks.record import ROOT, provenance, run_on_cluster
from benchmarks.training_runs import run_unless_there, seconds_to_loss
from launchers.shaped_cluster import ShapedCluster

PLAIN, PLAIN_BF16 = "plain", "plain bf16"
RACE = (PLAIN_BF16, "int8", "clusters 0.5 int8", "clusters 0.75 int4")
METHODS: dict[str, list[str]] = {
    PLAIN: ["moe=plain"],
    PLAIN_BF16: ["moe=bf16"],
    "int8": ["moe=int8"],
    "int4": ["moe=int4"],
    "clusters 0.5 int8": ["moe=lsh_int8"],
    "clusters 0.75 int4": ["moe=lsh_int4"],
    "clusters 0.35 int8": ["moe=lsh_int8", "moe.lsh.rate=0.35"],
    "clusters 0.35, without compensation": ["moe=lsh", "moe.lsh.rate=0.35", "moe.lsh.compensate=none"],
    "published 0.35": ["moe=published"],
}


def measure_loss(options: argparse.Namespace) -> dict[str, Any]:
    """Held-out loss of every method with every seed, two processes on this machine."""
    folder = Path(options.runs or tempfile.mkdtemp(prefix="commcomp-moe-"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.nodes)]
    runs: dict[str, Any] = {}
    for seed, name in itertools.product(options.seeds, options.methods or METHODS):
        output = folder / f"{slug(name)}_seed{seed}"
        command = [*torchrun, "examples/train_moe.py", *METHODS[name], *_settings(options), f"seed={seed}"]
        command.append(f"output_dir={output}")
        start = partial(subprocess.run, command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        run = run_unless_there(output, {"seed": seed, "steps": options.loss_steps}, start)
        runs.setdefault(name, {})[seed] = {
            "git_revision": run["git_revision"],
            "held_out": run["held_out"],
            "final_held_out": run["held_out"][-1][2],
            "layers": run["layers"],
        }
    return {**provenance(options), "runs": runs, "targets": _targets(runs)}


def measure_race(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to a loss, of whole runs over a link of `options.rate`."""
    folder = Path(options.runs or tempfile.mkdtemp(prefix="commcomp-race-"))
    runs: dict[str, Any] = {}
    with ShapedCluster(nodes=options.nodes, rate=options.rate) as cluster:
        for name in options.methods or RACE:
            output = folder / slug(name)
            script = ["examples/train_moe.py", *METHODS[name], *_settings(options), f"output_dir={output}"]
            wanted = {"link_rate": options.rate, "steps": options.loss_steps}
            run = run_unless_there(output, wanted, partial(run_on_cluster, cluster, script, options.rate))
            runs[name] = {key: run[key] for key in ("git_revision", "held_out", "median_step_seconds", "layers")}
    targets = {}
    for name, run in runs.items():
        entry = {"final held-out loss": run["held_out"][-1][2], "median step seconds": run["median_step_seconds"]}
        if PLAIN_BF16 in runs:
            entry |= seconds_to_loss(run, runs[PLAIN_BF16])
        targets[name] = entry
    return {**provenance(options), "rate": options.rate, "runs": runs, "targets": targets}


def _settings(options: argparse.Namespace) -> list[str]:
    shape = [f"model.{name}={getattr(options, name)}" for name in ("context", "width", "layers", "experts")]
    return [
        *shape,
        f"batch={options.batch}",
        f"steps={options.loss_steps}",
        f"eval_every={options.eval_every}",
        "resume=none",
        "tensorboard=false",
    ]


def _targets(runs: dict[str, Any]) -> dict[str, dict[str, float]]:
    targets = {}
    for name, by_seed in runs.items():
        losses = [run["final_held_out"] for run in by_seed.values()]
        entry = {"final held-out loss": statistics.fmean(losses)}
        if PLAIN in runs:
            plain = [runs[PLAIN][seed]["final_held_out"] for seed in by_seed]
            entry["against plain"] = statistics.fmean(losses) / statistics.fmean(plain) - 1
        first = next(iter(by_seed.values()))
        sent = [sum(layer[key] for layer in first["layers"].values()) for key in ("dense_bytes", "wire_bytes")]
        entry["bytes, fp32 / this"] = sent[0] / sent[1]
        targets[name] = entry
    return targets
