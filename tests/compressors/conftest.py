"""What tests of native passes share: every instruction set in turn, and threads however little there is to do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from commcomp import _native
from commcomp.compressors import native

SETS = _native.instruction_sets()


@pytest.fixture(params=SETS, scope="module")
def instruction_set(request) -> Iterator[str]:
    _native.use(request.param)
    yield request.param
    _native.use(SETS[-1])


@pytest.fixture
def three_threads(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(native, "VALUES_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
