"""A run that is forgotten and goes on from a compressed snapshot, beside the same run without interruption.

    python examples/checkpoint_demo.py                             # a minute or two on one core
    python examples/checkpoint_demo.py --modes standard --model gpt_10m --train 200 --every 50 --further 100

One process trains a small GPT on the sources of Python's standard library and saves its state on the way: by
torch.save, and by commcomp.checkpoint in each of the modes. New runs then go on from the newest of these files. It
prints what the files take and how the losses compare, and draws them; all is in the folder `--out`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from commcomp.checkpoint import SnapshotStore
from commcomp.checkpoint.command_line.tables import text_table
from commcomp.telemetry.figures import COLORS, smoothed
from train_storage import MODES
from training_run import State, TrainingRun, one_deterministic_thread, settings

UNINTERRUPTED, EXACT, OTHER_BATCHES = "uninterrupted", "torch.save", "torch.save, other batches"


@dataclass
class Course:
    """How a run went from the last snapshot on: `held_out` by the steps since, `training` of each step; in nats."""

    held_out: dict[int, float] = field(default_factory=dict)
    training: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Files:
    """What snapshots take on the disk, in bytes."""

    newest: int
    all: int


def main() -> None:
    options = _options()
    one_deterministic_thread()
    # The learning rate falls over twice as many steps, so that it is still high where runs go on.
    schedule = 2 * (options.train + options.further)
    chosen = settings(options.model, steps=schedule, batch=options.batch, eval_batches=options.eval_batches)
    run = TrainingRun(chosen)
    print(f"{sum(p.numel() for p in run.model.parameters()):,} parameters; {options.train} steps", flush=True)
    before, files = train_and_save(run, options)
    courses = {UNINTERRUPTED: follow(run, options)}
    del run  # from here on there are only the files
    for name in (EXACT, OTHER_BATCHES, *options.modes):
        batches = chosen["seed"] + (name == OTHER_BATCHES)
        # Of another seed, so with other weights: whatever this run knows comes from the file.
        resumed = TrainingRun({**chosen, "seed": chosen["seed"] + 1}, data_seed=batches)
        resumed.restore(newest_state(name, options.out))
        courses[name] = follow(resumed, options)
        print(f"went on from {name}: held-out loss {courses[name].held_out[options.further]:.4f}", flush=True)
    print()
    print(table(files, courses, options))
    draw(before, courses, options, options.out / "loss.png")
    print(f"wrote {options.out / 'loss.png'}; {options.out} has the snapshots", flush=True)


def train_and_save(run: TrainingRun, options: argparse.Namespace) -> tuple[list[float], dict[str, Files]]:
    """The training losses up to the interruption, and what every way of saving took."""
    stores = {mode: SnapshotStore(options.out / mode, mode) for mode in options.modes}
    exact = options.out / EXACT
    exact.mkdir(parents=True)
    losses: list[float] = []
    while run.step < options.train:
        losses += run.advance(options.every)
        torch.save(run.state(), exact / f"{run.step:06d}.pt")
        ratios = [f"{mode} {store.save(run.step, run.state()).ratio:.1f}" for mode, store in stores.items()]
        print(f"step {run.step}: loss {losses[-1]:.3f}; times smaller: {', '.join(ratios)}", flush=True)
    return losses, {name: _files(options.out / name) for name in (EXACT, *stores)}


def newest_state(name: str, folder: Path) -> State:
    """From the files of a way of saving."""
    if name in MODES:
        return SnapshotStore(folder / name).load()
    return torch.load(max((folder / EXACT).iterdir()), weights_only=True)


def follow(run: TrainingRun, options: argparse.Namespace) -> Course:
    """Train `--further` steps more, with a look at the held-out loss before, every `--check` steps and at the end."""
    course = Course({0: run.held_out_loss()})
    while len(course.training) < options.further:
        course.training += run.advance(options.check)
        course.held_out[len(course.training)] = run.held_out_loss()
    return course


def table(files: dict[str, Files], courses: dict[str, Course], options: argparse.Namespace) -> str:
    """A row for every run, the uninterrupted one first."""
    exact, last = files[EXACT], options.further
    count = options.train // options.every
    sizes_of = ["bytes", "times smaller", f"all {count} files"]
    head = ["gone on from", *sizes_of, "held-out loss", f"{last} steps later", "against uninterrupted"]
    rows = []
    for name, course in courses.items():
        taken = files.get(name)
        sizes = ["", "", ""]
        if taken is not None:
            sizes = [f"{taken.newest:,}", f"{exact.newest / taken.newest:.2f}", f"{exact.all / taken.all:.2f}"]
        held_out = course.held_out
        above = held_out[last] - courses[UNINTERRUPTED].held_out[last]
        rows.append([name, *sizes, f"{held_out[0]:.4f}", f"{held_out[last]:.4f}", f"{above:+.4f}"])
    return text_table(head, rows)


def draw(before: list[float], courses: dict[str, Course], options: argparse.Namespace, path: Path) -> None:
    """Left losses before and after the interruption, right how far the held-out ones are from the uninterrupted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    first, plain = len(before), courses[UNINTERRUPTED]
    shown = range(max(0, first - options.further), first)
    left.plot([step + 1 for step in shown], smoothed(before)[shown.start :], color="black", linewidth=0.8)
    left.axvline(first, color="black", linewidth=0.8, linestyle=":")
    for color, (name, course) in zip(("black", *COLORS), courses.items()):
        style: dict[str, Any] = {"color": color, "linestyle": "--" if name == OTHER_BATCHES else "-", "label": name}
        style |= {"linewidth": 5, "alpha": 0.25} if name == UNINTERRUPTED else {"marker": "o", "markersize": 3.5}
        steps = [first + step for step in course.held_out]
        left.plot(steps, list(course.held_out.values()), **style)
        training = smoothed(before + course.training)[first - 1 :]
        left.plot(range(first, first + len(training)), training, color=color, linewidth=0.8, alpha=0.6)
        right.plot(steps, [loss - plain.held_out[step] for step, loss in course.held_out.items()], **style)
    left.set_title("Loss (dots: held-out, thin: training, smoothed); interrupted at the dotted line", fontsize=11)
    left.set_ylabel("loss (nats a byte)")
    right.set_title("Held-out loss above that of the uninterrupted run", fontsize=11)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(courses), frameon=False)
    figure.savefig(path, dpi=110)


def _files(folder: Path) -> Files:
    sizes = [path.stat().st_size for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    return Files(newest=sizes[-1], all=sum(sizes))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["lossless", "standard", "compact"])
    parser.add_argument("--model", default="gpt_1m", help="a file in configs/model")
    parser.add_argument("--train", type=int, default=120, help="steps before the interruption")
    parser.add_argument("--every", type=int, default=20, help="steps between two snapshots")
    parser.add_argument("--further", type=int, default=60, help="steps after it")
    parser.add_argument("--check", type=int, default=10, help="steps between two looks at the held-out loss")
    parser.add_argument("--batch", type=int, default=4, help="windows of 256 bytes in a step")
    parser.add_argument("--eval-batches", type=int, default=8, help="held-out batches of 4 windows")
    parser.add_argument("--out", type=Path, default=Path(f"runs/checkpoint_demo-{time.strftime('%Y%m%d-%H%M%S')}"))
    options = parser.parse_args()
    for whole, part in (("train", "every"), ("further", "check")):
        one, other = getattr(options, whole), getattr(options, part)
        if one < 1 or other < 1 or one % other:
            parser.error(f"--{whole} {one} --{part} {other}: expected the first to be a multiple of the second, from 1")
    if options.out.exists():
        parser.error(f"--out {options.out}: it is there already; remove it, or name another folder")
    return options


if __name__ == "__main__":
    main()
