"""Arithmetic in full fp32, whatever the training script allows around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, no gradients, and matrix products in fp32: CUDA kernels launched inside use no TF32."""
    exact_products = _without_tf32() if device.type == "cuda" else nullcontext()
    with torch.no_grad(), torch.autocast(device.type, enabled=False), exact_products:
        yield


@contextmanager
def _without_tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    setting, full = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, setting)
    setattr(matmul, setting, full)
    try:
        yield
    finally:
        setattr(matmul, setting, before)
