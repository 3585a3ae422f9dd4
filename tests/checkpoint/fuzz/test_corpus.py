"""What the fuzzers found worth keeping: nothing crashes, and everything gives what it gave when it was recorded."""

from __future__ import annotations

import json

import pytest

from tests.checkpoint.fuzz.replay import CORPUS, OUTCOMES, REFUSED, TARGETS, outcomes


@pytest.mark.parametrize("target", TARGETS)
def test_every_input_gives_what_it_gave(target: str) -> None:
    recorded = json.loads(OUTCOMES.read_text())[target]
    found = outcomes(target)
    assert found == recorded
    assert sum(outcome != REFUSED for outcome in found.values()) > 3


def test_the_corpus_is_small() -> None:
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(sizes) < 200_000
