"""What clusters of tokens do over the training of a model that is trained with them: by step and layer.

    .venv/bin/python -m benchmarks.moe_over_training    # 40 minutes, two processes

Runs of examples/train_moe.py, one a method. At every evaluation: the rate, how far tokens are from what stands for
them, how far answers are from the experts' own with and without what a token differs by added, bytes so far, and
held-out loss, as it is and with compression left on. Writes JSON and a plot under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.methods import slug
from benchmarks.record import RESULTS, ROOT, provenance
from benchmarks.training_runs import run_unless_there

PLAIN = "plain"
METHODS: dict[str, list[str]] = {
    PLAIN: ["moe=plain"],
    "0.5 int8, gradient": ["moe=lsh_int8"],
    "0.5 int8, none": ["moe=lsh_int8", "moe.lsh.compensate=none"],
    "0.5 int8, both": ["moe=lsh_int8", "moe.lsh.compensate=both"],
    "0.75 int4, gradient": ["moe=lsh_int4"],
    "0.75 int4, none": ["moe=lsh_int4", "moe.lsh.compensate=none"],
    "published 0.35, both": ["moe=published"],
    "published 0.35, none": ["moe=published", "moe.lsh.compensate=none"],
}
"""By rate, number format and what becomes of what a token differs from its centroid by (`LSH.compensate`)."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default all")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--every", type=int, default=25, help="steps between two looks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", help="JSON of `benchmarks.moe loss` to take the plain run from")
    parser.add_argument("--runs", help="folder of the runs' own files; what is there is not repeated")
    parser.add_argument("--out", type=Path, default=RESULTS / "moe_over_training.json")
    options = parser.parse_args()
    runs = measure(options)
    options.out.write_text(json.dumps({**provenance(options), "runs": runs}, indent=1) + "\n")
    plot(runs, options.out.with_suffix(".png"))
    print_table(runs)
    print(f"wrote {options.out}")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Of every method: held-out loss by step, and what the worker saw."""
    folder = Path(options.runs or tempfile.mkdtemp(prefix="commcomp-moe-"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = [f"steps={options.steps}", f"eval_every={options.every}", f"seed={options.seed}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs: dict[str, Any] = {PLAIN: _recorded_plain(options)} if options.plain else {}
    for name in options.methods or METHODS:
        if name in runs:
            continue
        output = folder / f"{slug(name)}_seed{options.seed}"
        command = [*torchrun, "benchmarks/moe_over_training_worker.py", *METHODS[name], *settings]
        command += ["resume=none", "tensorboard=false", f"output_dir={output}"]
        start = partial(subprocess.run, command, check=True, cwd=ROOT, env=environment)
        run = run_unless_there(output, {"seed": options.seed, "steps": options.steps}, start)
        runs[name] = {
            "git_revision": run["git_revision"],
            "parameters": run["parameters"],
            "held_out": [[step, loss] for step, _, loss in run["held_out"]],
            "looks": json.loads((output / "looks.json").read_text()),
        }
    return runs


def _recorded_plain(options: argparse.Namespace) -> dict[str, Any]:
    """The plain run of another benchmark with the same settings: a seed gives the same losses to the bit."""
    path = Path(options.plain)
    recorded = json.loads(path.read_text())
    if recorded["settings"]["loss_steps"] != options.steps:
        raise SystemExit(f"{path} is of {recorded['settings']['loss_steps']} steps; expected {options.steps}")
    run = recorded["runs"][PLAIN][str(options.seed)]
    held_out = [[step, loss] for step, _, loss in run["held_out"]]
    return {"git_revision": run["git_revision"], "from": path.name, "held_out": held_out, "looks": []}


def print_table(runs: dict[str, Any]) -> None:
    """The last step, and by layer the figures after about a seventh, a half and all of the steps."""
    for name, run in runs.items():
        step, loss = run["held_out"][-1]
        if not run["looks"]:
            print(f"\n{name}: held-out loss {loss:.4f} after {step} steps")
            continue
        plain = f" ({100 * (loss / runs[PLAIN]['held_out'][-1][1] - 1):+.1f} % of plain)" if PLAIN in runs else ""
        print(
            f"\n{name}: held-out loss {loss:.4f}{plain} after {step} steps, with compression left on "
            f"{run['looks'][-1]['held_out_compressed']:.4f}"
        )
        for place in sorted({len(run["looks"]) // 7, len(run["looks"]) // 2, len(run["looks"]) - 1}):
            look = run["looks"][place]
            for number, figures in enumerate(look["layers"]):
                shown = ", ".join(f"{key} {value:.2f}" for key, value in figures.items() if value is not None)
                print(f"  step {look['step']:4d} layer {number}: {shown}")


def plot(runs: dict[str, Any], path: Path) -> None:
    """Over steps, a column a layer: rate, residual, error of answers (dashed: with the residual); below, losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = len(next(run for run in runs.values() if run["looks"])["looks"][0]["layers"])
    figure, panels = pyplot.subplots(4, layers, figsize=(5.5 * layers, 12), sharex=True, squeeze=False)
    for color, (name, run) in enumerate(runs.items()):
        looks = run["looks"]
        if not looks:
            continue
        steps = [look["step"] for look in looks]
        for layer in range(layers):
            figures = [look["layers"][layer] for look in looks]
            if not all("rate" in one for one in figures):
                continue  # no clusters
            for row, key in enumerate(("rate", "residual", "off")):
                panels[row][layer].plot(steps, [one[key] for one in figures], color=f"C{color}", label=name)
            values = [one["off_with_residual"] for one in figures]
            panels[2][layer].plot(steps, values, "--", color=f"C{color}", linewidth=0.9)
        if PLAIN in runs:
            plain = dict(map(tuple, runs[PLAIN]["held_out"]))
            against = [(step, 100 * (loss / plain[step] - 1)) for step, loss in run["held_out"] if step in plain]
            panels[3][0].plot(*zip(*against, strict=True), color=f"C{color}", label=name)
        own = dict(map(tuple, run["held_out"]))
        gap = [100 * (look["held_out_compressed"] / own[look["step"]] - 1) for look in looks]
        panels[3][-1].plot(steps, gap, color=f"C{color}", label=name)
    _label(panels, layers)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def _label(panels: Any, layers: int) -> None:
    names = ("rows sent / tokens", "residual", "answers off by (dashed: residual added)")
    for layer in range(layers):
        panels[0][layer].set_title(f"MoE layer {layer}", fontsize=10)
        panels[-1][layer].set_xlabel("steps")
        for row, name in enumerate(names):
            panels[row][layer].set_ylabel(name)
            panels[row][layer].set_ylim(bottom=0)
    panels[3][0].set_ylabel("held-out loss against plain, %")
    panels[3][-1].set_ylabel("loss with compression left on against without, %")
    for row in panels:
        for panel in row:
            panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=7)
    panels[3][0].legend(fontsize=7)


if __name__ == "__main__":
    main()
