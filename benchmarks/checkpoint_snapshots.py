"""Train the GPT of 10.8 million parameters and keep its state at chosen steps, for the checkpoint benchmarks.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.checkpoint_snapshots --out runs/snapshots   # 10 minutes, one core

Leaves step_<step>.pt (model and AdamW state, fp32, 130 MB each), settings.json and losses.json in the folder. A second
call goes on where an interrupted one stopped. Steps are chosen so that there are pairs 1, 10, 50, 100 and 200 steps
apart, early and late, and a chain of one snapshot every 50 steps. Weights in bf16 are derived from these files, not
trained: mixed-precision training saves the rounded fp32 masters.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.checkpoint_training import (
    SETTINGS,
    TrainingRun,
    load_settings,
    load_snapshot,
    one_deterministic_thread,
    save_snapshot,
    settings,
    snapshot_steps,
)

STEPS = (199, 200, 201, 210, *range(250, 651, 50), 590, 599)


def make_snapshots(folder: Path, steps: list[int], chosen: dict[str, Any]) -> None:
    """Train to the last of `steps`, saving the state after each of them."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / SETTINGS).exists() and load_settings(folder) != chosen:
        raise SystemExit(f"{folder / SETTINGS} is of another run: {load_settings(folder)}; expected {chosen}")
    (folder / SETTINGS).write_text(json.dumps(chosen, indent=1) + "\n")
    run, losses = TrainingRun(chosen), []
    if there := snapshot_steps(folder):
        run.restore(load_snapshot(folder, there[-1]))
        losses = json.loads((folder / "losses.json").read_text())[: run.step]
    for step in sorted(step for step in steps if step > run.step):
        start, first = time.perf_counter(), run.step
        while run.step < step:
            losses += run.advance(1)
            if run.step % 10 == 0:
                seconds = (time.perf_counter() - start) / (run.step - first)
                print(f"step {run.step}: training loss {losses[-1]:.4f}, {seconds:.2f} s a step", flush=True)
        (folder / "losses.json").write_text(json.dumps(losses))
        save_snapshot(folder, run.state())
        print(f"step {run.step}: saved", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the snapshots, 2 GB")
    parser.add_argument("--model", default="gpt_10m", help="a file in configs/model")
    parser.add_argument("--at", type=int, nargs="+", default=sorted(STEPS), help="steps after which to keep the state")
    parser.add_argument("--schedule", type=int, default=1200, help="steps of the whole cosine; the run may stop before")
    parser.add_argument("--batch", type=int, default=4, help="windows of 256 bytes in a step")
    parser.add_argument("--betas", type=float, nargs=2, default=[0.9, 0.999])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    one_deterministic_thread()
    chosen = settings(
        options.model, steps=options.schedule, batch=options.batch, betas=list(options.betas), seed=options.seed
    )
    make_snapshots(options.out, options.at, chosen)


if __name__ == "__main__":
    main()
