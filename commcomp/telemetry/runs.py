"""Finished runs as `result.json` files describe them."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a report needs of one run. Bytes are those that one rank sends for gradients."""

    name: str
    world_size: int
    parameters: int
    machine: Mapping[str, Any]
    link_rate: str | None
    versions: Mapping[str, str]
    git_revision: str | None
    steps: int
    train_loss: Sequence[float]
    step_seconds: Sequence[float]
    held_out: Sequence[Sequence[float]]
    """(step, seconds of training, loss) for each held-out evaluation."""
    median_step_seconds: float
    tokens_per_second: float
    cpu_seconds_per_step: Mapping[str, float]
    wire_bytes_per_step: float
    ratio: float | None
    """Bytes of a plain fp32 all-reduce / bytes sent; None if nothing was sent."""
    is_plain: bool = False
    """Whether this is the run without any compression that others are compared to."""

    @property
    def elapsed_seconds(self) -> list[float]:
        """Seconds of training after each step."""
        return list(itertools.accumulate(self.step_seconds))

    @property
    def final_held_out(self) -> float | None:
        """The last held-out loss."""
        return self.held_out[-1][2] if self.held_out else None

    @property
    def recent_train_loss(self) -> float:
        """Mean training loss over the last tenth of the run."""
        tail = self.train_loss[-max(1, len(self.train_loss) // 10) :]
        return sum(tail) / len(tail)


def load_run(path: str | os.PathLike[str]) -> Run:
    """Read a run from its folder or result.json. Raises FileNotFoundError or ValueError, naming the file."""
    file = Path(path)
    if file.is_dir():
        file = file / "result.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; expected the folder of a finished run")
    try:
        data = json.loads(file.read_text())
        names = set(Run.__dataclass_fields__) - {"is_plain"}
        gradient = data["config"]["gradient"]
        is_plain = gradient.get("method") == "none" and not data["config"].get("gather_bits")
        run = Run(**{name: data[name] for name in names}, is_plain=is_plain)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}; expected a result.json of examples/train_gpt.py") from error
    if not run.train_loss:
        raise ValueError(f"{file} describes a run of no steps")
    return run


def load_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Read runs in the given order; runs of equal names get their path added."""
    runs = [load_run(path) for path in paths]
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({path})") if names.count(run.name) > 1 else run
        for run, path in zip(runs, paths)
    ]


def format_bytes(size: float) -> str:
    """Return a size in bytes, kB, MB or GB (powers of 1000)."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
