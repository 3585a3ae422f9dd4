"""What all benchmarks record about a run, and how they run scripts on the shaped cluster."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from commcomp.telemetry.environment import git_revision, machine, versions
from launchers.shaped_cluster import ShapedCluster

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_FOLDERS = ("--runs", "--snapshots", "--keep", "--out")


def run_on_cluster(cluster: ShapedCluster, script: list[str], rate: str, *, tries: int = 1) -> None:
    """Run a script on the cluster; several tries where torch's PowerSGD is in it, which may abort on gloo."""
    for _ in range(tries):
        print(f"# {rate}: {' '.join(script)}", flush=True)
        status = cluster.run([str(ROOT / script[0]), *script[1:]])
        if status == 0:
            return
    raise SystemExit(f"{script[0]} at {rate} ended with status {status}; its logs are in {cluster.logs}")


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    """Command, date, revision, machine and settings."""
    chosen = {key: value for key, value in vars(options).items() if value is not None}
    settings = {key: value for key, value in chosen.items() if f"--{key}" not in _FOLDERS}
    return {
        "command": f"python -m {_module()} " + shlex.join(_without_folders(sys.argv[1:])),
        "date": time.strftime("%Y-%m-%d"),
        "git_revision": git_revision(ROOT),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
    }


def _without_folders(arguments: list[str]) -> list[str]:
    """The command line less the folders of this machine, which change no figure."""
    kept = iter(arguments)
    return [argument for argument in kept if argument not in _FOLDERS or not next(kept, None)]


def _module() -> str:
    return f"benchmarks.{Path(sys.argv[0]).stem}"
