"""Where a measurement was made: machine, versions, revision."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy
import torch

from commcomp.version import __version__


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """The machine in words and numbers; `device` is where tensors live (default: the CPU)."""
    on_gpu = device is not None and device.type == "cuda"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads_per_process": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
    }


def versions() -> dict[str, str]:
    """Versions of what decides a measurement."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "commcomp": __version__,
    }


def git_revision(folder: Path) -> str | None:
    """The commit of the checkout around `folder`, with `+changes` if tracked files differ; None outside of git."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"]
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
