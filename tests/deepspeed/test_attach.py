"""The "commcomp" block: what is wrong in it, what cannot go together, and scripts that know nothing of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

# Not imported here: that takes seconds, and only the ranks need it.
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

LOW_RANK = {"method": "low_rank", "rank": 2}
ROOT = Path(__file__).resolve().parents[2]
WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no block": ({"commcomp": None}, ("commcomp",)),
    "misspelt block": ({"comcomp": {"gradient": LOW_RANK}, "commcomp": None}, ("comcomp", "did you mean")),
    "misspelt part": ({"commcomp": {"gradients": LOW_RANK}}, ("gradients", "did you mean 'gradient'")),
    "misspelt key": ({"commcomp": {"gradient": {"method": "low_rank", "rnak": 2}}}, ("rnak", "did you mean 'rank'")),
    "misspelt method": ({"commcomp": {"gradient": {"method": "lowrank"}}}, ("lowrank", "low_rank")),
    "empty block": ({"commcomp": {}}, ("asks for nothing",)),
    "no flag": ({"commcomp": {"enabled": "yes", "gradient": LOW_RANK}}, ("enabled", "true or false")),
    "misspelt MoE key": ({"commcomp": {"moe": {"quantised": {}}}}, ("quantised", "quantized")),
    "misspelt checkpoint key": ({"commcomp": {"checkpoint": {"modus": "lossless"}}}, ("modus", "mode")),
    "quantised twice": ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, ("zero_quantized",)),
    "not contiguous": ({"zero_optimization": {"stage": 2, "contiguous_gradients": False}}, ("contiguous_gradients",)),
}


def _wrong(rank: int) -> dict[str, str]:
    from commcomp.deepspeed.settings import read_block
    from tests.deepspeed import engines

    found: dict[str, str] = {}
    for name, (more, _) in WRONG.items():
        config = {**engines.ds_config(1, LOW_RANK), **more}
        if config["commcomp"] is None:
            del config["commcomp"]
        try:
            engines.make_engine(config, always_ours=True)
            found[name] = ""
        except ValueError as error:
            found[name] = str(error)
    found["disabled"] = str(hasattr(engines.make_engine({**engines.ds_config(1, None), "commcomp": {
        "enabled": False, "gradient": LOW_RANK}}), "commcomp"))
    try:
        engines.make_engine(engines.ds_config(1, {"method": "low_rank", "rank": 1 + rank}))
    except ValueError as error:
        found["ranks disagree"] = str(error)
    for name, other in (("missing", None), ("unreadable", {"method": "lowrank"})):
        config = engines.ds_config(1, LOW_RANK)
        config["commcomp"] = {"gradient": LOW_RANK if rank == 0 else other}
        if other is None and rank:
            del config["commcomp"]
        try:
            engines.make_engine(config, always_ours=True)
        except ValueError as error:
            found[name] = str(error)
    for page in ("docs/deepspeed.md", "docs/deepspeed_moe.md"):
        for source in re.findall(r"^```json\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S):
            found[page] = str(read_block(json.loads(source)))
    found["example"] = str(read_block(json.loads((ROOT / "examples" / "deepspeed_gpt.json").read_text())))
    return found


@cache
def wrong() -> list[dict[str, str]]:
    """By rank and case: what was said."""
    return run_ranks(_wrong, 2)


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_on_every_rank(case: str) -> None:
    for said in (found[case] for found in wrong()):
        for word in WRONG[case][1]:
            assert word in said, said


def test_blocks_that_the_pages_and_the_example_show_are_right() -> None:
    found = wrong()[0]
    assert "LowRank(rank=8" in found["docs/deepspeed.md"] and "LowRank(rank=8" in found["example"]
    assert "rate=0.5" in found["docs/deepspeed_moe.md"]


def test_a_disabled_block_leaves_the_engine_plain() -> None:
    assert wrong()[0]["disabled"] == "False"


def test_ranks_with_other_settings_find_out() -> None:
    assert all("rank" in found["ranks disagree"] for found in wrong())


@pytest.mark.parametrize(("case", "said"), [("missing", "no block"), ("unreadable", "lowrank")])
def test_what_is_wrong_on_one_rank_is_raised_on_all(case: str, said: str) -> None:
    here, there = (found[case] for found in wrong())
    assert said in here and said in there and "rank 1" in here


def _run(*command: str, more: str = "") -> subprocess.CompletedProcess[str]:
    paths = f"{ROOT}{os.pathsep}{more}"
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=200)


def test_an_unmodified_script_is_served(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, json, deepspeed.ops\n"
        "deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False\n"
        "from deepspeed import initialize, init_distributed\n"
        "import torch\n"
        "init_distributed('gloo')\n"
        "model = torch.nn.Linear(64, 64)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "engine, *_ = initialize(model=model, optimizer=optimizer, config=sys.argv[1])\n"
        "for _ in range(2):\n"
        "    engine.backward(engine(torch.randn(4, 64)).square().mean()); engine.step()\n"
        "sys.stdout.write(f\"ratio {engine.commcomp.stats()['gradient']['ratio']}\\n\"); sys.stdout.flush()\n"
    )
    config = tmp_path / "ds.json"
    config.write_text(
        '{"train_micro_batch_size_per_gpu": 4, "commcomp": {"gradient": {"method": "low_rank", "rank": 2}}}'
    )
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = _run(*torchrun, "-m", "commcomp.deepspeed", str(script), str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    ratios = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("ratio")]
    assert len(ratios) == 2 and min(ratios) > 5
    assert "commcomp is active" in done.stdout + done.stderr
    (tmp_path / "jobs").mkdir()
    job_text = "import sys, deepspeed\nprint(deepspeed.initialize is not sys.modules['commcomp.deepspeed.attaching']"
    (tmp_path / "jobs" / "job.py").write_text(f"{job_text}._plain_initialize, sys.argv[1:])\n")
    job = _run("-m", "commcomp.deepspeed", "--local_rank=0", "-m", "jobs.job", "-x", more=str(tmp_path))
    assert "True ['--local_rank=0', '-x']" in job.stdout, job.stderr[-2000:]
    missing = _run("-m", "commcomp.deepspeed", str(tmp_path / "no.py"))
    assert missing.returncode != 0 and "no.py" in missing.stderr
