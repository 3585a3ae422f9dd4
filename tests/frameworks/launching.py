"""Frameworks on the processes of run_ranks, and examples as the documentation tells to run them."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"


def as_launched(rank: int, num_ranks: int = 2) -> None:
    """The environment that torchrun would give; the process group is there already."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", TORCHELASTIC_RUN_ID="tests", OMP_NUM_THREADS="1")


def run_example(name: str, folder: Path, *arguments: str) -> list[str]:
    """Lines that an example prints under torchrun on two processes, started in `folder`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert len((EXAMPLES / name).read_text().splitlines()) < 40
    return run.stdout.splitlines()


def snippet(number: int) -> Any:
    """One of the pieces of Python in docs/frameworks.md, to be executed."""
    page = (EXAMPLES.parent / "docs/frameworks.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    return compile(blocks[number], f"snippet {number}", "exec")


def ratio_of(line: str) -> float:
    """From "..., 5.6 times fewer bytes"."""
    return float(line.rsplit(",", 1)[1].split()[0])


def digest(model: nn.Module) -> str:
    """Equal for equal weights, to the bit."""
    data = b"".join(value.detach().cpu().numpy().tobytes() for value in model.parameters())
    return hashlib.sha256(data).hexdigest()
