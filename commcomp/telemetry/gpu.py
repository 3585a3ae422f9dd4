"""Power, use and memory of an NVIDIA GPU through NVML; where there is none, quietly nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch


class GpuReader:
    """Reads the GPU behind a torch device.

    `read` always returns {} if the device is no NVIDIA GPU, or if the package nvidia-ml-py or the driver's
    library is missing: telemetry must not stop a training run.
    """

    def __init__(self, device: torch.device | str, nvml: Any = None) -> None:
        """`nvml` stands in for the module pynvml in tests."""
        self._nvml: Any = None
        self._handle: Any = None
        device = torch.device(device)
        if device.type == "cuda":
            self._open(device, nvml)

    @property
    def available(self) -> bool:
        """Whether there is a GPU to read."""
        return self._handle is not None

    def read(self) -> dict[str, float]:
        """Return power (watts), utilization (percent) and used memory (bytes), as far as the GPU tells."""
        if not self.available:
            return {}
        nvml, handle = self._nvml, self._handle
        sources: dict[str, Callable[[], float]] = {
            "gpu/power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,  # milliwatts
            "gpu/utilization_percent": lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "gpu/memory_bytes": lambda: float(nvml.nvmlDeviceGetMemoryInfo(handle).used),
        }
        values = {}
        for name, source in sources.items():
            try:
                values[name] = source()
            except nvml.NVMLError:  # some GPUs and virtual machines withhold a value
                continue
        return values

    def close(self) -> None:
        """Release NVML; `read` returns {} afterwards."""
        if self.available:
            self._nvml.nvmlShutdown()
            self._nvml = self._handle = None

    def _open(self, device: torch.device, nvml: Any) -> None:
        try:
            nvml = nvml or importlib.import_module("pynvml")
        except ImportError:
            return
        try:
            nvml.nvmlInit()
        except nvml.NVMLError:
            return
        try:
            # By UUID, because CUDA_VISIBLE_DEVICES renumbers torch's devices but not NVML's.
            uuid = torch.cuda.get_device_properties(device).uuid
            self._handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._nvml = nvml
        except nvml.NVMLError:
            nvml.nvmlShutdown()
