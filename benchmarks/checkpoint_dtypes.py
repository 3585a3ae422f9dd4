"""Lossless snapshots of tensors that are neither fp32 nor bf16, against what others make of them: ratios and MB/s.

    .venv/bin/python -m pip install -c launchers/constraints.txt -e '.[benchmarks]'       # zstandard, ZipNN
    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.checkpoint_dtypes --snapshots runs/snapshots   # 10 minutes

Tensors: the matrices of a GPT of 10.8 million parameters in fp16, fp8 (scaled so that the largest is half the largest
of the format), int8 and, to compare, bf16; masks of their largest tenth; text as bytes and as numbered words, counters,
a permutation, coins; and weights and moments of a network that is trained in fp64. Ratios are raw bytes over bytes of
the file, alone and against the snapshot before; of others over bytes of the streams. MB/s are of one core.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.byte_coders import CODERS, size_of
from benchmarks.checkpoint import measure_mode
from benchmarks.checkpoint_baselines import pair
from benchmarks.checkpoint_training import State, load_settings, load_snapshot, one_deterministic_thread
from benchmarks.record import RESULTS, ROOT, provenance
from commcomp.checkpoint.codec.words import words_of
from commcomp.checkpoint.dtypes import dtype_name
from commcomp.checkpoint.host_copy import raw_bytes

sys.path.insert(0, str(ROOT / "examples"))

from stdlib_text import load_split

PAIRS = ((200, 210), (200, 250), (400, 600))
_FP64_STEPS = (200, 210, 250)

Tensors = Mapping[str, Tensor]


def casts(state: State) -> dict[str, Tensors]:
    """What a run may hold that follows from the weights of a state, by kind."""
    weights = {name: value for name, value in state["model"].items() if value.dim() >= 2}
    largest = max(float(value.abs().max()) for value in weights.values())
    every = torch.cat([value.flatten() for value in weights.values()]).abs()
    threshold = every.kthvalue(int(0.9 * every.numel())).values

    def cast(dtype: torch.dtype, scale: float = 1.0) -> Tensors:
        return {name: (value * scale).to(dtype) for name, value in weights.items()}

    eighths = {dtype: torch.finfo(dtype).max / 2 / largest for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
    return {
        "bf16 weights": cast(torch.bfloat16),
        "fp16 weights": cast(torch.float16),
        "fp8 e4m3 weights": cast(torch.float8_e4m3fn, eighths[torch.float8_e4m3fn]),
        "fp8 e5m2 weights": cast(torch.float8_e5m2, eighths[torch.float8_e5m2]),
        "int8 weights": cast(torch.int8, 127 / largest),
        "bool mask of a tenth": {name: value.abs() > threshold for name, value in weights.items()},
    }


def integers() -> dict[str, Tensors]:
    """Buffers that no snapshot before helps with."""
    text = load_split()[0][: 1 << 21].tobytes()
    words = re.findall(rb"\w+|\W", text)
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    random = torch.Generator().manual_seed(0)
    found = {
        "int64 bytes of text": torch.tensor(np.frombuffer(text, np.uint8).astype(np.int64)),
        "int64 words of text": torch.tensor([numbers[word] for word in words]),
        "int64 positions": torch.arange(4096).expand(64, 4096).contiguous(),
        "int64 permutation": torch.randperm(1 << 18, generator=random),
        "bool, random": torch.rand(1 << 20, generator=random) < 0.5,
    }
    return {name: {"buffer": tensor} for name, tensor in found.items()}


def counters() -> tuple[Tensors, Tensors]:
    """Visits of 2^18 places, and some more of them."""
    random = torch.Generator().manual_seed(0)
    before = torch.randint(0, 1000, (1 << 18,), generator=random)
    return {"buffer": before}, {"buffer": before + torch.poisson(torch.full((1 << 18,), 2.0), generator=random).long()}


def fp64_states() -> list[Tensors]:
    """Weights and moments of a network of 0.4 million parameters after _FP64_STEPS steps of AdamW."""
    torch.manual_seed(0)
    sizes = (128, 512, 512, 64)
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (torch.nn.Linear(a, b), torch.nn.Tanh())]  # noqa: RUF007
    network = torch.nn.Sequential(*layers[:-1]).double()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    target, states = torch.randn(128, 64).double(), []
    for step in range(1, _FP64_STEPS[-1] + 1):
        given = torch.randn(64, 128).double()
        loss = (network(given) - torch.sin(given @ target / 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in _FP64_STEPS:
            kept = {name: value.clone() for name, value in network.state_dict().items()}
            for number, moments in optimizer.state_dict()["state"].items():
                kept |= {f"{number}.{kind}": moments[kind].clone() for kind in ("exp_avg", "exp_avg_sq")}
            states.append(kept)
    return states


def measure(name: str, given: Tensors, before: Tensors | None) -> dict[str, float]:
    """Ratios by coder, and MB/s of ours."""
    states = [{"model": dict(tensors)} for tensors in (before, given) if tensors is not None]
    found = measure_mode(states, "lossless")
    row = {
        "raw_bytes": found["raw_bytes"],
        "alone": measure_mode(states[-1:], "lossless")["ratio"],
        "against the one before": found["ratio"],
        "MB/s encoding": found["raw_bytes"] / 1e6 / found["encode_seconds"],
        "MB/s decoding": found["raw_bytes"] / 1e6 / found["decode_seconds"],
    }
    now, then = (None if tensors is None else _words(tensors) for tensors in (given, before))
    assert now is not None
    row["zstd-19"] = _ratio("zstd-19", now, now)
    if then is not None:
        row["zstd-19 of XOR"] = _ratio("zstd-19", now ^ then, then)
        row["BitX"] = _ratio("BitX", now, then)
    if now.itemsize == 2:
        row["ZipNN"] = _ratio("ZipNN", now, now)  # as if it were bf16: it knows no fp16
    print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    return row


def _words(tensors: Tensors) -> np.ndarray:
    """All values as unsigned integers, tied tensors once."""
    once = {tensor.data_ptr(): tensor for tensor in tensors.values()}.values()
    return np.concatenate([words_of(dtype_name(tensor.dtype)).of(raw_bytes(tensor)) for tensor in once])


def _ratio(coder: str, values: np.ndarray, previous: np.ndarray) -> float:
    return values.nbytes / size_of(CODERS[coder].encode(values, previous))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshots", type=Path, required=True, help="what benchmarks.checkpoint_snapshots made")
    parser.add_argument("--pairs", type=pair, nargs="+", default=list(PAIRS), metavar="BEFORE:AFTER")
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint_dtypes.json")
    options = parser.parse_args()
    one_deterministic_thread()
    rows: dict[str, Any] = {}
    for before, after in options.pairs:
        then, now = (casts(load_snapshot(options.snapshots, step)) for step in (before, after))
        for kind in now:
            name = f"{kind}, {before}->{after}"
            rows[name] = measure(name, now[kind], then[kind])
    rows |= {name: measure(name, tensors, None) for name, tensors in integers().items()}
    rows["int64 counters"] = measure("int64 counters", *reversed(counters()))
    first, *later = fp64_states()
    for step, state in zip(_FP64_STEPS[1:], later):
        name = f"fp64 weights and moments, {_FP64_STEPS[0]}->{step}"
        rows[name] = measure(name, state, first)
    result = {**provenance(options), "run": load_settings(options.snapshots), "ratios": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
