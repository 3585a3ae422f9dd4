"""Runs of examples/train_gpt.py on a tiny model, for the tests of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "train_gpt.py"
TINY = [
    "model=gpt_1m", "model.layers=1", "model.width=32", "model.heads=2", "model.context=32",
    "steps=8", "warmup_steps=0", "learning_rate=1e-2", "log_every=3", "eval_every=4", "eval_batches=3",
    "eval_batch=2", "device=cpu",
]  # fmt: skip
MOE_SCRIPT = SCRIPT.with_name("train_moe.py")
TINY_MOE = ["model=moe_gpt_6m", "model.layers=2", "model.experts=4", "batch=4", *(one for one in TINY[2:])]
COMPRESSED = ["gradient=low_rank", "gradient.rank=2", "gradient.measure_every=1"]

DRIVER = f"""
import os, signal, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import hydra, stdlib_text, train_gpt, train_setup

def run(*overrides):
    with hydra.initialize_config_dir({str(REPOSITORY / "configs")!r}, version_base=None):
        config = hydra.compose("train_gpt", list(overrides))
    train_gpt.train(config, place)

with train_setup.distributed("cpu", timeout_seconds=30) as place:
"""

KILLED_ONCE = DRIVER + """
    normal = stdlib_text.Batches.at

    def at(batches, step):
        if step == 5 and batches.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return normal(batches, step)

    stdlib_text.Batches.at = at
    run(*sys.argv[1:])
"""
"""A script: rank 1 is killed before its sixth step, unless torchrun has started it anew."""


def train(*settings: str, processes: int, output_dir: Path, script: Path = SCRIPT, restarts: int = 0) -> dict[str, Any]:
    """Run the example and return its result.json; `processes` of 0 means plain python."""
    run = start(*settings, processes=processes, output_dir=output_dir, script=script, restarts=restarts)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads((output_dir / "result.json").read_text())


def start(
    *settings: str, processes: int, output_dir: Path, script: Path = SCRIPT, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launcher += ["--max-restarts", str(restarts)]
    tiny = TINY_MOE if "moe" in script.stem else TINY
    command = [sys.executable, *(launcher if processes else []), str(script), *tiny, *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*command, f"output_dir={output_dir}"], stdout=pipe, stderr=pipe, text=True, env=environment
    ) as process:
        try:
            output = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its workers, which a kill would leave behind
            output = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, *output)


def composed(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(REPOSITORY / "configs"), version_base=None):
        return hydra.compose("train_gpt", list(overrides))
