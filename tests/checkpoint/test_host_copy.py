"""Copies of states: in memory of their own, and in the same memory again."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from commcomp.checkpoint import host_copy
from commcomp.checkpoint.host_copy import host_copies, raw_bytes


@pytest.mark.parametrize("shared_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_copies_are_equal_aligned_and_apart(monkeypatch: pytest.MonkeyPatch, shared_bytes: int, threads: int) -> None:
    monkeypatch.setattr(host_copy, "_SHARED_BYTES", shared_bytes)
    torch.manual_seed(0)
    given = {str(n): torch.randint(0, 256, (n,)).to(torch.uint8) for n in (0, 1, 63, 64, 65, 300, 5000)}
    given |= {"": torch.randn(7, 5).t(), "half": torch.randn(33).half(), "scalar": torch.tensor(3)}
    copies = host_copies(given, {}, threads)
    assert list(copies) == list(given)
    spans = []
    for name, tensor in given.items():
        data = copies[name].data
        assert data.tobytes() == raw_bytes(tensor).tobytes() and data.flags.writeable
        if len(data):
            assert data.ctypes.data % 16 == 0
            spans.append((data.ctypes.data, data.ctypes.data + len(data)))
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_memory_that_fits_serves_again() -> None:
    given = {"a": torch.zeros(10), "b": torch.zeros(20), "c": torch.zeros(30)}
    first = {name: copy.data for name, copy in host_copies(given, {}, 1).items()}
    first["c"].flags.writeable = False
    changed = {"a": torch.ones(10), "b": torch.ones(21), "c": torch.ones(30), "d": torch.ones(2)}
    second = host_copies(changed, first, 1)
    assert second["a"].data is first["a"] and (first["a"].view(np.float32) == 1).all()
    assert second["b"].data.nbytes == 84 and not np.shares_memory(second["b"].data, first["b"])
    assert not np.shares_memory(second["c"].data, first["c"]) and (first["c"] == 0).all()
