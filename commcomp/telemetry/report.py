"""Compare finished runs: a table for the terminal, Markdown, a PNG and one self-contained HTML page.

    python -m commcomp.telemetry.report RUN_DIR [RUN_DIR...] --out DIR

Each RUN_DIR holds the result.json that examples/train_gpt.py writes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from commcomp.telemetry import figures
from commcomp.telemetry.page import html_page
from commcomp.telemetry.runs import Run, format_bytes, load_runs

SHORT_RUN_STEPS = 400
"""Runs of fewer steps say how fast a method is, not how well it trains in the end."""

Table = list[list[str]]


def table_of(runs: Sequence[Run]) -> Table:
    """Return the rows of the comparison, the headings first."""
    plain = next((run for run in runs if run.is_plain), None)
    columns: dict[str, Callable[[Run], str]] = {
        "run": lambda run: run.name,
        "steps": lambda run: str(run.steps),
        "training loss": lambda run: f"{run.recent_train_loss:.3f}",
        "held-out loss": lambda run: _or_dash(run.final_held_out, "{:.3f}"),
        "step time": lambda run: f"{run.median_step_seconds:.3f} s",
        "speed-up": lambda run: _or_dash(_speed_up(plain, run), "{:.2f}x"),
        "bytes a step": lambda run: format_bytes(run.wire_bytes_per_step),
        "ratio": lambda run: _or_dash(run.ratio, "{:.1f}x"),
        "CPU a step": lambda run: f"{run.cpu_seconds_per_step['mean']:.3f} s",
        "tokens/s": lambda run: f"{run.tokens_per_second:.0f}",
    }
    return [list(columns), *([cell(run) for cell in columns.values()] for run in runs)]


COLUMN_MEANINGS = (
    "Training loss is the mean over the last tenth of the steps, held-out loss that of the last evaluation, both "
    "in nats a byte. Step time is the median, without evaluation and checkpoints; speed-up is against plain "
    "DDP. Bytes a step are what one rank sends for gradients, the mean over all steps; ratio is what a plain "
    "fp32 all-reduce sends against that. CPU a step is processor time, the mean over ranks."
)


def facts_of(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return what the numbers depend on, as (what, value); all values where runs differ."""

    def together(describe: Callable[[Run], str]) -> str:
        return " / ".join(dict.fromkeys(map(describe, runs)))

    return [
        ("Processes", together(lambda run: str(run.world_size))),
        ("Link between them", together(_link_line)),
        ("Model", together(lambda run: f"{run.parameters / 1e6:.1f} million parameters")),
        ("Machine", together(_machine_line)),
        ("Versions", together(lambda run: ", ".join(map(" ".join, run.versions.items())))),
        ("Revision", together(lambda run: run.git_revision or "unknown")),
    ]


def cautions_of(runs: Sequence[Run]) -> list[str]:
    """Return what a reader must know before comparing the numbers."""
    cautions = []
    if min(run.steps for run in runs) < SHORT_RUN_STEPS:
        cautions.append(
            f"Runs of fewer than {SHORT_RUN_STEPS} steps show speed and bytes, and little of final quality."
        )
    observed: dict[str, set[Any]] = {
        "step counts": {run.steps for run in runs},
        "process counts": {run.world_size for run in runs},
        "link rates": {run.link_rate for run in runs},
        "machines": {_machine_line(run) for run in runs},
        "model sizes": {run.parameters for run in runs},
    }
    for what, values in observed.items():
        if len(values) > 1:
            cautions.append(f"The runs differ in their {what}: compare them with care.")
    return cautions


def terminal_text(runs: Sequence[Run]) -> str:
    """Return the comparison as aligned plain text."""
    table = table_of(runs)
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    facts = [f"{what}: {value}" for what, value in facts_of(runs)]
    return "\n".join([*lines, "", *facts, *cautions_of(runs)])


def markdown_text(runs: Sequence[Run]) -> str:
    """Return the comparison as Markdown."""
    headings, *rows = table_of(runs)
    lines = [_markdown_row(headings), _markdown_row(["---", *["---:"] * (len(headings) - 1)])]
    lines += [_markdown_row(row) for row in rows]
    facts = [f"- {what}: {value}" for what, value in facts_of(runs)]
    notes = [f"- {caution}" for caution in cautions_of(runs)]
    return "\n".join([*lines, "", COLUMN_MEANINGS, "", *facts, *notes, ""])


def write_report(runs: Sequence[Run], folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Write report.md, report.png and report.html to `folder`; returns their paths by kind."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page = html_page(
        runs, table=table_of(runs), meanings=COLUMN_MEANINGS, facts=facts_of(runs), cautions=cautions_of(runs)
    )
    contents = {"md": markdown_text(runs).encode(), "png": figures.png_of_all(runs), "html": page.encode()}
    paths = {kind: folder / f"report.{kind}" for kind in contents}
    for kind, content in contents.items():
        paths[kind].write_bytes(content)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser("python -m commcomp.telemetry.report", description="Compare finished runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folder of a run, or its result.json")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for report.md, .png and .html")
    options = parser.parse_args(arguments)
    try:
        runs = load_runs(options.runs)
        paths = write_report(runs, options.out)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(terminal_text(runs), end="\n\n")
    for kind, path in paths.items():
        print(f"{kind:5}{path}")
    return 0


def _or_dash(value: float | None, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)


def _speed_up(plain: Run | None, run: Run) -> float | None:
    return plain.median_step_seconds / run.median_step_seconds if plain else None


def _link_line(run: Run) -> str:
    return "not limited" if run.link_rate in (None, "none") else f"{run.link_rate} each way"


def _machine_line(run: Run) -> str:
    machine = run.machine
    device = "" if machine["device"] == "cpu" else f", {machine['device']}"
    return f"{machine['processor']}, {machine['cores']} cores, {machine['system']}{device}"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *others = (cell.rjust(width) for cell, width in zip(row, widths))
    return [first.strip().ljust(widths[0]), *others]


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


if __name__ == "__main__":
    sys.exit(main())
