"""examples/deepspeed_gpt.py: one command on two processes, and nothing compiled for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
def test_it_trains_compresses_and_saves(tmp_path: Path) -> None:
    extensions = tmp_path / "extensions"
    quiet = {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(extensions), "CUDA_VISIBLE_DEVICES": ""}
    variables = {**os.environ, **quiet}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "examples" / "deepspeed_gpt.py")]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = re.findall(r"step (\d+): loss ([\d.]+), ([\d.]+) times fewer", done.stdout)
    assert [int(step) for step, *_ in lines] == [20, 40, 60, 80, 100]
    assert float(lines[-1][1]) < 3.0  # 5.5 before the first step
    assert min(float(ratio) for *_, ratio in lines) > 10
    saved = {path.name for path in (tmp_path / "outputs" / "deepspeed_gpt" / "global_step100").iterdir()}
    assert {"commcomp_rank_0.ccsnap", "commcomp_rank_1.ccsnap", "mp_rank_00_model_states.pt"} <= saved
    assert not list(extensions.rglob("*.so")) and not list(extensions.rglob("*.o"))
