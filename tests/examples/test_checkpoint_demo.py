"""examples/checkpoint_demo.py with a small setting: its table says what is in the files, its picture is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commcomp.checkpoint import SnapshotStore

SCRIPT = Path(__file__).parents[2] / "examples" / "checkpoint_demo.py"
SMALL = ["--train", "6", "--every", "3", "--further", "2", "--check", "1", "--batch", "1", "--eval-batches", "1"]
ROWS = ("uninterrupted", "torch.save", "torch.save, other batches", "lossless", "compact")


def _start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """The folder that it left, and the cells of each row of its table."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    run = _start(*SMALL, "--modes", "lossless", "compact", "--out", str(folder))
    assert run.returncode == 0, run.stderr
    table = run.stdout.split("\n\n")[1].splitlines()
    head = "gone on from|bytes|times smaller|all 2 files|held-out loss|2 steps later|against uninterrupted"
    assert re.split(r"  +", table[0]) == head.split("|")
    rows = {cells[0]: cells[1:] for cells in (re.split(r"  +", line) for line in table[1:]) if cells[0] in ROWS}
    return folder, rows


def test_the_sizes_are_those_of_the_files(demo: tuple[Path, dict[str, list[str]]]) -> None:
    folder, rows = demo
    exact = sorted(path.stat().st_size for path in (folder / "torch.save").iterdir())
    assert len(exact) == 2
    for mode in ("lossless", "compact"):
        store = SnapshotStore(folder / mode)
        assert store.steps() == [3, 6]
        sizes = [(folder / mode / f"step-{step:012d}.ccsnap").stat().st_size for step in store.steps()]
        assert rows[mode][:3] == [f"{sizes[1]:,}", f"{exact[1] / sizes[1]:.2f}", f"{sum(exact) / sum(sizes):.2f}"]
    assert float(rows["compact"][1]) > float(rows["lossless"][1]) > 1


def test_the_losses_are_those_of_runs_from_the_files(demo: tuple[Path, dict[str, list[str]]]) -> None:
    folder, rows = demo
    assert set(rows) == set(ROWS)
    losses = {name: cells[-3:] for name, cells in rows.items()}
    assert losses["uninterrupted"] == losses["torch.save"] == losses["lossless"]
    assert losses["uninterrupted"][2] == "+0.0000"
    for name in ("compact", "torch.save, other batches"):
        assert losses[name] != losses["uninterrupted"]
        above = float(losses[name][1]) - float(losses["uninterrupted"][1])
        assert float(losses[name][2]) == pytest.approx(above, abs=1.01e-4)  # rounded after the difference
    exact = torch.load(folder / "torch.save" / "000006.pt", weights_only=True)["model"]
    for mode, same in (("lossless", True), ("compact", False)):
        state = SnapshotStore(folder / mode).load()["model"]
        assert all(torch.equal(exact[name], state[name]) for name in exact) is same


def test_it_draws(demo: tuple[Path, dict[str, list[str]]]) -> None:
    data = (demo[0] / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "10", "--every", "3"], "--train 10 --every 3: expected the first to be a multiple of the second"),
        (["--modes", "best"], "invalid choice: 'best'"),
        (["--out", str(SCRIPT.parent)], "it is there already; remove it, or name another folder"),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import checkpoint_demo

    monkeypatch.setattr(sys, "argv", ["checkpoint_demo.py", *arguments])
    with pytest.raises(SystemExit):
        checkpoint_demo.main()
    assert message in capsys.readouterr().err
