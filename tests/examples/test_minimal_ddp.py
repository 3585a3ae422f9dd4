"""examples/minimal_ddp.py as the documentation tells to run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "minimal_ddp.py"


@pytest.mark.parametrize("launcher", ["torchrun", "python"])
def test_it_learns_and_reports(launcher: str) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *(torchrun if launcher == "torchrun" else []), str(SCRIPT)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 4  # from rank 0 alone
    first, last = (float(line.split()[3].rstrip(",")) for line in (lines[0], lines[-1]))
    assert last < first
    ratio = float(lines[-1].split()[4])
    assert ratio > 5 if launcher == "torchrun" else ratio == 1  # one process sends nothing


def test_it_is_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 40
