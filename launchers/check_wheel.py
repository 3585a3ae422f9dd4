"""Checks the commcomp that is installed: both C++ modules are there, and values come back through them.

Run from outside the repository's root, or by its path: python launchers/check_wheel.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import commcomp
from commcomp import _checkpoint, _native
from commcomp.checkpoint import SnapshotStore
from commcomp.compressors.native import decode_int8_rows, encode_int8_rows


def main() -> None:
    values = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)) * 0.02
    with tempfile.TemporaryDirectory() as folder:
        store = SnapshotStore(folder)
        size = Path(store.save(0, {"w": values}).path).stat().st_size
        loaded = store.load()["w"]
    assert torch.equal(values, loaded) and size < 4 * values.numel(), size

    rows, length = values.shape
    coded = torch.empty(rows * length + 4 * rows, dtype=torch.uint8)
    assert encode_int8_rows(coded, values, rows * length)
    decoded = decode_int8_rows(coded, rows, length, rows * length, mean=False)
    assert decoded is not None and (decoded - values).abs().max() < values.abs().max() / 100
    print(f"{Path(commcomp.__file__).parent}: {Path(_checkpoint.__file__).name} and {Path(_native.__file__).name} work")


if __name__ == "__main__":
    main()
