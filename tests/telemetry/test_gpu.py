"""GPU readings, with NVML played by a stand-in."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from commcomp.telemetry.gpu import GpuReader


class FakeNvml:
    """Behaves like the module pynvml with one GPU; functions named in `broken` raise its error."""

    class NVMLError(Exception):
        pass

    def __init__(self, *broken: str) -> None:
        self.broken = broken
        self.open = 0

    def _check(self, name: str) -> None:
        if name in self.broken:
            raise self.NVMLError(name)

    def nvmlInit(self) -> None:
        self._check("init")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._check("handle")
        return uuid

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self._check("power")
        assert handle == "GPU-1234"
        return 312_500

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=87, memory=40)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(total=80 * 10**9, used=3 * 10**9, free=77 * 10**9)


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))


def test_reads_watts_percent_and_bytes() -> None:
    reader = GpuReader("cuda:0", FakeNvml())
    assert reader.available
    assert reader.read() == {"gpu/power_watts": 312.5, "gpu/utilization_percent": 87.0, "gpu/memory_bytes": 3e9}


def test_a_value_the_gpu_withholds_is_left_out() -> None:
    assert set(GpuReader("cuda:0", FakeNvml("power")).read()) == {"gpu/utilization_percent", "gpu/memory_bytes"}


@pytest.mark.parametrize("broken", ["init", "handle"])
def test_without_a_driver_or_gpu_it_reads_nothing_and_leaves_nvml_closed(broken: str) -> None:
    nvml = FakeNvml(broken)
    reader = GpuReader("cuda:0", nvml)
    assert not reader.available
    assert reader.read() == {}
    reader.close()
    assert nvml.open == 0


def test_a_cpu_never_touches_nvml() -> None:
    nvml = FakeNvml()
    assert GpuReader("cpu", nvml).read() == {}
    assert nvml.open == 0


def test_without_the_package_it_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # makes `import pynvml` raise ImportError
    assert GpuReader("cuda:0").read() == {}


def test_closing_releases_nvml_once() -> None:
    nvml = FakeNvml()
    reader = GpuReader("cuda:0", nvml)
    reader.close()
    reader.close()
    assert nvml.open == 0
    assert reader.read() == {}
