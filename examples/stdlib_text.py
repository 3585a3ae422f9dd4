"""Real text that is on every machine: the sources of the running Python's standard library, as bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
_HELD_OUT_EVERY = 20


def load_split(root: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return (training, held-out) text as uint8 arrays; every 20th file is held out whole."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path for path in root.rglob("*.py") if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    )
    if len(files) < _HELD_OUT_EVERY:
        raise FileNotFoundError(f"only {len(files)} Python files under {root}; expected the standard library's sources")
    held_out = files[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
    training = [path for index, path in enumerate(files) if index % _HELD_OUT_EVERY != _HELD_OUT_EVERY - 1]
    return _join(training), _join(held_out)


def _join(files: list[Path]) -> np.ndarray:
    return np.frombuffer(b"\n".join(path.read_bytes() for path in files), dtype=np.uint8)


class Batches:
    """Random windows of the text; batch `step` of `rank` is a pure function of (seed, step, rank).

    That makes a resumed run see exactly the batches the uninterrupted one would have seen.
    """

    def __init__(self, text: np.ndarray, *, batch: int, context: int, rank: int, seed: int) -> None:
        self.text, self.batch, self.context, self.rank, self.seed = text, batch, context, rank, seed

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Return (tokens, targets), int64 [batch, context], targets shifted by one byte."""
        rng = np.random.default_rng([self.seed, step, self.rank])
        starts = rng.integers(0, len(self.text) - self.context - 1, size=self.batch)
        windows = self.text[starts[:, None] + np.arange(self.context + 1)].astype(np.int64)
        both = torch.from_numpy(windows)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def held_out_batches(text: np.ndarray, *, batch: int, context: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return `count` fixed batches spread evenly over the held-out text, the same on every rank."""
    starts = np.linspace(0, len(text) - context - 2, batch * count).astype(np.int64)
    windows = torch.from_numpy(text[starts[:, None] + np.arange(context + 1)].astype(np.int64))
    return [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in windows.split(batch)]
