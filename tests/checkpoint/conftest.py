from __future__ import annotations

import pytest

from commcomp.checkpoint import codec_registry
from tests.checkpoint.codecs import DECODERS


@pytest.fixture
def with_codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The codecs of codecs.py are in the registry."""
    for method, decoder in DECODERS.items():
        monkeypatch.setitem(codec_registry.decoders, method, decoder)
