"""First inputs for the fuzzers: true chunks in every cut and format. `python -m tests.checkpoint.fuzz.seeds FOLDER`."""

from __future__ import annotations

import itertools
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from commcomp.checkpoint import SnapshotStore
from commcomp.checkpoint.codec.native import CODERS, MAX, Known, encode_floats, encode_symbols
from tests.checkpoint.fuzz.files import of_files

_CUTS = ("linear", "logarithmic", "relative")
_SPECIAL = np.array([0, 1 << 31, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000], np.uint32)


def floats(random: np.random.Generator, format: str, cut: str, shown: int, count: int, kind: str, coder: str) -> bytes:
    """`shown`: 1, predictions are known; 2, scales; 3, both."""
    values = (random.normal(0, 0.02, count) * np.exp(random.normal(0, 2, count))).astype(np.float32)
    if kind == "special":
        values = random.choice(_SPECIAL, count).view(np.float32)
    resolution, scale = int(random.integers(5)), np.float32(0.01)
    head = _CUTS.index(cut) << 1 | (format == "bf16") | shown << 3
    given = struct.pack("<BBHf", head, resolution, count, scale)
    known: list[np.ndarray | None] = [None, None]
    for place, width in enumerate((1, 1e-2)):
        if not shown >> place & 1:
            continue
        few = (np.abs(random.normal(0, 0.02, 4)) * width).astype("<f4")
        if kind != "special":
            values = (values * np.float32(1e-3) + np.resize(few, count)) if place == 0 else values
        given += struct.pack("<B", 3) + few.tobytes()
        known[place] = np.resize(few, count)
    raw = values.view(np.uint32)
    raw = raw.view(np.uint8) if format == "fp32" else (raw >> 16).astype(np.uint16).view(np.uint8)
    how = Known(cut, known[0], known[1], float(scale), resolution + 1 if cut == "linear" else resolution)
    return given + encode_floats(format, raw, how, count // 3 + 1 if coder == MAX else 0)


def symbols(random: np.random.Generator, num_contexts: int, count: int, width: float, coder: str) -> bytes:
    given = struct.pack("<BBHB", num_contexts - 1, 1, count, 15)
    few = random.integers(0, num_contexts, 16).astype(np.uint8)
    contexts = np.resize(few, count)
    values = (random.normal(128, width, count) + contexts).astype(np.int64).astype(np.uint8)
    columns = count // 3 + 1 if coder == MAX else 0
    return given + few.tobytes() + encode_symbols(values, contexts, num_contexts, columns)


def lattices(random: np.random.Generator, octaves: bool, shown: int, step: float) -> bytes:
    """`shown`: 1, predictions are given; 2, references; 3, both."""
    given = struct.pack("<BBBf", octaves | shown << 1, 2, 40, step)
    for matrix in range(3):
        if matrix == 0 or shown >> matrix - 1 & 1:
            given += b"\x0f" + np.exp(random.normal(0, 2, 16)).astype("<f4").tobytes()
    return given + random.integers(-50, 50, 4).astype("<i2").tobytes()


def files(folder: Path) -> list[bytes]:
    """Small snapshots, alone and with a parent: what is raw, what is exact, and a lossy training."""
    torch.manual_seed(0)
    start = torch.randn(16, 16)
    weight = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([weight])
    few = {"empty": torch.empty(0, 2), "zeros": np.zeros(60, np.int16), "halves": torch.ones(9).bfloat16(), "lr": 0.1}
    exact, lossy = (
        SnapshotStore(folder / "exact", threads=1),
        SnapshotStore(folder / "lossy", "standard", threads=1, coder=MAX),
    )
    for step in range(2):
        (weight * torch.randn(16, 16)).sum().backward()
        optimizer.step()
        exact.save(step, few | {"w": start + step * 1e-4 * weight.data, "again": few["halves"].clone()})
        lossy.save(step, {"w": weight.data, "optimizer": {"state": optimizer.state_dict()["state"]}})
    stores = [[folder / name / f"step-{step:012}.ccsnap" for step in range(2)] for name in ("exact", "lossy")]
    return [data for first, second in stores for data in (of_files(first), of_files(second, first))]


def main(folder: Path) -> None:
    random = np.random.default_rng(0)
    made: dict[str, list[bytes]] = {"floats": [], "symbols": [], "lattices": [], "files": []}
    for format, cut, shown, count in itertools.product(("fp32", "bf16"), _CUTS, range(4), (1, 9, 150)):
        for kind, coder in itertools.product(("alike", "special"), CODERS):
            made["floats"].append(floats(random, format, cut, shown, count, kind, coder))
    for num_contexts, count, width in itertools.product((1, 2, 16, 255), (1, 9, 300), (0, 1, 20)):
        made["symbols"] += [symbols(random, num_contexts, count, width, coder) for coder in CODERS]
    for octaves, shown, step in itertools.product((False, True), range(4), (1e-3, 0.6, 60)):
        made["lattices"].append(lattices(random, octaves, shown, step))
    with tempfile.TemporaryDirectory() as stores:
        made["files"] = files(Path(stores))
    for target, inputs in made.items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(inputs):
            (folder / target / f"seed-{number}").write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
