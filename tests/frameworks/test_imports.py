"""Who does not use a framework does not load it; who lacks it is told what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

FRAMEWORKS = ["accelerate", "deepspeed", "lightning", "lightning_fabric", "pytorch_lightning", "transformers"]


def python(source: str) -> str:
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120)
    return run.stdout + run.stderr


def test_commcomp_loads_no_framework_and_tells_what_to_install() -> None:
    source = f"""
import importlib, sys
import commcomp, commcomp.fsdp, commcomp.accelerate
print(sorted(set(sys.modules) & set({FRAMEWORKS})))
sys.modules.update(dict.fromkeys({FRAMEWORKS}))  # as if they were not installed
for module in ("lightning", "transformers"):
    try:
        importlib.import_module("commcomp." + module)
    except ModuleNotFoundError as error:
        print(error)
"""
    loaded, lightning, transformers = python(source).splitlines()
    assert loaded == "[]"
    assert "pip install 'commcomp[lightning]'" in lightning
    assert "pip install 'commcomp[transformers]'" in transformers


def test_the_older_name_of_lightning_serves_where_it_is_the_scripts() -> None:
    pytest.importorskip("pytorch_lightning")
    source = (
        "import pytorch_lightning, lightning_fabric.plugins, sys\n"
        "from commcomp.lightning import Compression, SnapshotIO\n"
        "print(issubclass(Compression, pytorch_lightning.Callback), 'lightning.pytorch' in sys.modules, "
        "issubclass(SnapshotIO, lightning_fabric.plugins.CheckpointIO))"
    )
    assert python(source).splitlines()[-1] == "True False True"
