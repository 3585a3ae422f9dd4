"""Forged tensors: whatever stands in settings, side data and payload, a decoder raises or gives as many values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commcomp.checkpoint import SnapshotStore, codec_registry
from commcomp.checkpoint.decoder import _DAMAGE
from tests.checkpoint.codec.training import Training


@pytest.mark.parametrize("mode", ["lossless", "standard"])
def test_forged_tensors_do_no_harm(tmp_path: Path, mode: str) -> None:
    training, store = Training(amsgrad=True), SnapshotStore(tmp_path, mode=mode, threads=1)
    for step in (5, 6):
        training.step(5)
        state = {**training.state(), "ema": {k: v * 0.99 for k, v in training.model.state_dict().items()}}
        if step == 6:
            _with_rows_of(state, store.load(5))
        store.save(step, state)
    random, raised, tried, seen = np.random.default_rng(0), 0, 0, set()
    with store._files.open(6) as chain:
        reader = chain[0]
        for stored in reader.tensors.values():
            header = stored.header
            if header.method not in ("floats", "lattice"):
                continue
            seen |= {str(header.settings["center"]), str("keeps" in header.settings.get("lattice", {}))}
            decode = codec_registry.decoders[header.method]
            side, payload = reader.side(stored), reader.chunk(stored, 0)
            inputs = [np.frombuffer(random.bytes(header.num_bytes), np.uint8) for _ in header.inputs]
            for _ in range(300):
                forged = [bytearray(side), bytearray(payload)]
                settings = json.loads(json.dumps(dict(header.settings)))
                what = int(random.integers(3))
                if what == 2:
                    key = str(random.choice(list(settings)))
                    settings[key] = [None, -1, 1 << 40, "x", {}, [], float("nan"), {"kind": "even"}][random.integers(8)]
                else:
                    place = int(random.integers(len(forged[what])))
                    forged[what][place : place + int(random.integers(9))] = random.bytes(int(random.integers(9)))
                tried += 1
                try:
                    spoiled = replace(header, settings=settings)
                    out = decode(spoiled, bytes(forged[0]), bytes(forged[1]), 0, header.num_values, inputs)
                    assert out.dtype == np.uint8 and out.shape == (header.num_bytes,)
                except _DAMAGE:
                    raised += 1
    assert seen >= ({"largest", "average"} if mode == "lossless" else {"True", "False"}), seen
    assert tried > 1000 and raised > tried / 4, (tried, raised)


def _with_rows_of(state: dict[str, Any], before: dict[str, Any]) -> None:
    """Some rows of a weight and its moments as they were."""
    moments, earlier = (one["optimizer"]["state"][1] for one in (state, before))
    pairs = [(moments[name], earlier[name]) for name in moments if name != "step"]
    for tensor, other in [*pairs, (state["model"]["wide.weight"], before["model"]["wide.weight"])]:
        tensor[:20] = other[:20]
