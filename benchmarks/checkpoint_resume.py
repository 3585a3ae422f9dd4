"""Does a run that goes on from a compressed snapshot lose anything? Held-out loss against the uninterrupted run.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.checkpoint_resume --snapshots runs/snapshots --codecs excp standard
    ... --codecs mine=package.module:Factory        # Factory() gives a function from states to reconstructed states

A codec gets the states of `--chain` in order and may code each against its reconstruction of the one before. The run
goes on from the last reconstruction for 50 steps with each of five orders of the data, of which the first is that of
the uninterrupted run; so does the uncompressed state, whose losses are the band that a codec is held against. A last
run saves and restores five times on the way. The uncompressed runs are made once and kept beside the snapshots. A run
of 50 steps takes a minute on one core.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.checkpoint_excp import RECIPES, ExcpChain
from benchmarks.checkpoint_training import (
    State,
    TrainingRun,
    load_settings,
    load_snapshot,
    one_deterministic_thread,
)
from benchmarks.record import RESULTS, provenance
from commcomp.checkpoint import SnapshotStore
from commcomp.checkpoint.store import MAX_CHAIN

MODES = ("lossless", "cautious", "standard", "compact")
"""Of SnapshotStore."""

Codec = Callable[[State], State]
"""Called with one state after another of a run; returns what would be read back, and leaves its argument alone."""


def identity(state: State) -> State:
    """The codec that changes nothing: what it is measured as should be what the uncompressed runs are."""
    return state


class StoredChain:
    """States through a SnapshotStore of its own, saved and loaded again."""

    def __init__(self, mode: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="commcomp-resume-")
        self._store = SnapshotStore(self._folder.name, mode=mode, keyframe_every=MAX_CHAIN, threads=1)
        self._saved = 0

    def __call__(self, state: State) -> State:
        self._saved += 1
        self._store.save(self._saved, state)
        return self._store.load(self._saved)


def codec_factory(text: str) -> tuple[str, Callable[[], Codec]]:
    """Name and maker of a codec: a mode of SnapshotStore, a recipe of ExCP, or NAME=MODULE:CALLABLE."""
    if text in MODES:
        return text, partial(StoredChain, text)
    if text in RECIPES:
        return text, partial(ExcpChain, RECIPES[text])
    name, equals, place = text.partition("=")
    module, colon, attribute = place.partition(":")
    if not (name and equals and module and colon and attribute):
        raise ValueError(f"codec {text!r}; expected one of {', '.join((*MODES, *RECIPES))}, or NAME=MODULE:CALLABLE")
    return name, getattr(importlib.import_module(module), attribute)


def resume(run: TrainingRun, state: State, checks: list[int]) -> dict[str, Any]:
    """Held-out loss at the given numbers of steps after `state`, 0 first, and mean training loss between."""
    run.restore(state)
    start, train, held_out = run.step, [], {}
    for check in checks:
        train += run.advance(start + check - run.step)
        held_out[str(check)] = run.held_out_loss()
    return {"held_out": held_out, "train": sum(train) / max(1, len(train))}


def resume_with_orders(chosen: dict[str, Any], state: State, seeds: list[int], checks: list[int]) -> dict[str, Any]:
    """`resume` for every data seed."""
    results = {}
    for seed in seeds:
        results[str(seed)] = resume(TrainingRun(chosen, data_seed=seed), state, checks)
        print(f"  data seed {seed}: {_losses(results[str(seed)])}", flush=True)
    return results


def resume_repeatedly(
    chosen: dict[str, Any], codec: Codec, state: State, seed: int, restores: int, every: int
) -> dict[str, Any]:
    """One run that is saved and restored `restores` times, `every` steps apart; `codec` has coded `state` already.

    It starts from `state`, the first restore, and ends `every` steps after the last.
    """
    run = TrainingRun(chosen, data_seed=seed)
    train: list[float] = []
    for index in range(restores):
        run.restore(codec(run.state()) if index else state)
        train += run.advance(every)
    return {"held_out": {str(restores * every): run.held_out_loss()}, "train": sum(train) / len(train)}


def reconstructed(folder: Path, chain: list[int], codec: Codec) -> State:
    """The last state of the chain as the codec gives it back, all before it coded first."""
    for step in chain:
        state = codec(load_snapshot(folder, step))
    return state


def uncompressed(
    folder: Path, chosen: dict[str, Any], step: int, seeds: list[int], checks: list[int]
) -> dict[str, Any]:
    """`resume_with_orders` of the snapshot itself; what an earlier call found is kept in the folder."""
    kept = folder / "uncompressed.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    results = {}
    for seed in seeds:
        key = f"from {step}, data seed {seed}, checks {checks}, {chosen['eval_batches']} held-out batches"
        if key not in known:
            known |= {key: resume_with_orders(chosen, load_snapshot(folder, step), [seed], checks)[str(seed)]}
            kept.write_text(json.dumps(known, indent=1) + "\n")
        results[str(seed)] = known[key]
    return results


def measure(
    folder: Path, chosen: dict[str, Any], make: Callable[[], Codec], options: argparse.Namespace
) -> dict[str, Any]:
    """All runs of one codec."""
    codec = make()
    state = reconstructed(folder, options.chain, codec)
    found = {"orders": resume_with_orders(chosen, state, options.data_seeds, options.checks)}
    if options.restores:
        every = options.checks[-1] // options.restores
        repeated = resume_repeatedly(chosen, codec, state, options.data_seeds[0], options.restores, every)
        print(f"  restored {options.restores} times: {_losses(repeated)}", flush=True)
        found["restored_repeatedly"] = repeated
    return found


def summarise(found: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """By check: the codec's mean loss, how far above the uncompressed runs it is, and whether it is in their band.

    `inside` says that the mean is not above the highest uncompressed run. At the restore these are all one number:
    there the distance from their mean to the highest is taken from the next check. Less loss is never outside.
    """
    checks = list(next(iter(plain.values()))["held_out"])
    summary = {}
    for check, of_band in zip(checks, [*checks[1:2], *checks[1:]]):
        losses = {seed: run["held_out"][check] for seed, run in found["orders"].items()}
        true = {seed: run["held_out"][check] for seed, run in plain.items()}
        band = [run["held_out"][of_band] for run in plain.values()]
        above = fmean(losses[seed] - true[seed] for seed in losses)
        margin = max(band) - fmean(band)
        summary[f"+{check}"] = {
            "mean": fmean(losses.values()),
            "uncompressed": [min(true.values()), fmean(true.values()), max(true.values())],
            "above": above,
            "most_above": max(losses[seed] - true[seed] for seed in losses),
            "margin": margin,
            "inside": above <= margin,
        }
    summary["training"] = {"above": fmean(run["train"] - plain[seed]["train"] for seed, run in found["orders"].items())}
    if repeated := found.get("restored_repeatedly"):
        loss, seed = repeated["held_out"][checks[-1]], next(iter(plain))
        above = loss - plain[seed]["held_out"][checks[-1]]
        highest = max(run["held_out"][checks[-1]] for run in plain.values())
        summary["restored repeatedly"] = {"mean": loss, "above": above, "inside": loss <= highest}
    return summary


def print_table(summaries: dict[str, Any]) -> None:
    for name, summary in summaries.items():
        print(f"\n{name}")
        for check, row in summary.items():
            inside = {True: "inside", False: "OUTSIDE", None: ""}[row.get("inside")]
            loss = f"{row['mean']:.4f}, " if "mean" in row else ""
            margin = f" of {row['margin']:.4f} allowed" if "margin" in row else ""
            print(f"  {check:20} {loss}{row['above']:+.4f}{margin} {inside}")


def _losses(result: dict[str, Any]) -> str:
    held_out = ", ".join(f"+{step} {loss:.4f}" for step, loss in result["held_out"].items())
    return f"held out {held_out}, training {result['train']:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshots", type=Path, required=True, help="what benchmarks.checkpoint_snapshots made")
    known = ", ".join((*MODES, *RECIPES))
    parser.add_argument("--codecs", nargs="*", default=["excp"], help=f"{known}, NAME=MODULE:CALLABLE")
    parser.add_argument("--chain", type=int, nargs="+", default=[200, 400, 600], help="steps; the last is resumed from")
    parser.add_argument("--checks", type=int, nargs="+", default=[0, 10, 50], help="steps after it, from 0, ascending")
    parser.add_argument("--data-seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--eval-batches", type=int, default=8, help="held-out batches of 4 windows")
    parser.add_argument("--restores", type=int, default=5, help="in one run up to the last check; 0: leave it out")
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint_resume.json")
    options = parser.parse_args()
    if options.checks[0] != 0 or len(options.checks) < 2 or options.checks != sorted(set(options.checks)):
        parser.error(f"--checks {options.checks}: expected ascending numbers of steps, 0 first")
    if options.restores and options.checks[-1] % options.restores:
        parser.error(f"--restores {options.restores}: expected a divisor of the last check, {options.checks[-1]}")
    codecs = dict(map(codec_factory, options.codecs))
    one_deterministic_thread()
    chosen = {**load_settings(options.snapshots), "eval_batches": options.eval_batches}
    plain = uncompressed(options.snapshots, chosen, options.chain[-1], options.data_seeds, options.checks)
    found = {}
    for name, make in codecs.items():
        print(f"{name}, from step {options.chain[-1]}", flush=True)
        found[name] = measure(options.snapshots, chosen, make, options)
    summaries = {name: summarise(result, plain) for name, result in found.items()}
    result = {"run": chosen, "uncompressed": plain, "codecs": found, "summary": summaries}
    options.out.write_text(json.dumps({**provenance(options), **result}, indent=1) + "\n")
    print_table(summaries)


if __name__ == "__main__":
    main()
