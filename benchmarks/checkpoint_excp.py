"""ExCP's recipe for snapshots (arXiv 2406.11257), written anew from its description, as a lossy baseline.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.checkpoint_excp --snapshots runs/snapshots --chain 200 400 600

Weights are coded as the residual to the reconstruction of the snapshot before, both moments by themselves. Of a tensor
those residuals are kept that exceed their median times min(2.5, alpha / sqrt(mean of v)), and first moments above beta
times their mean where the weight is kept; second moments are kept where the first are. What is not kept becomes zero.
Kept values go to the nearest of 15 k-means centres (fp16), indices are packed two to a byte, and LZMA codes them.

Since alpha is absolute, the ratio follows the scale of the gradients: the recipe keeps more, at more bytes, where
they are larger. Rows therefore give the scale of v and the shares of m and v that are zero.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import lzma
import math
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.checkpoint_training import (
    State,
    adam_tensors,
    load_settings,
    load_snapshot,
    one_deterministic_thread,
)
from benchmarks.record import RESULTS, provenance
from benchmarks.scalar_kmeans import centres_of, nearest

CENTRES = 15
_RAW = 255
"""In place of the number of centres: values as they are, for tensors with so few that centres do not pay."""
Values = NDArray[np.float32]


@dataclass(frozen=True)
class Recipe:
    """The numbers of the recipe. `centre_dtype` float32 differs from it: fp16 ends at 6e-8, above most v."""

    alpha: float = 5e-5
    beta: float = 2.0
    centre_dtype: str = "float16"
    median_in_place_of_zero_v: bool = False
    """Also not the recipe: what is pruned of v becomes the median of the tensor."""


@dataclass(frozen=True)
class Encoded:
    """A snapshot as it would lie on disk: an LZMA stream for each of w, m and v."""

    streams: dict[str, bytes]
    recipe: Recipe

    def bytes(self) -> dict[str, int]:
        return {kind: len(stream) for kind, stream in self.streams.items()}


def kept(residual: Values, first: Values, second: Values, recipe: Recipe) -> tuple[NDArray[np.bool_], ...]:
    """Which weights and which moments of a tensor are not pruned; both masks have its shape."""
    size = np.abs(residual)
    factor = min(2.5, recipe.alpha / max(float(np.sqrt(second.mean(dtype=np.float64))), 1e-30))
    weights = size > np.median(size) * factor
    moment = np.abs(first)
    return weights, weights & (moment > recipe.beta * moment.mean(dtype=np.float64))


def encode(state: State, reference: State, recipe: Recipe = Recipe()) -> Encoded:
    """Code a state against the reconstruction of the one before."""
    parts: dict[str, list[bytes]] = {"w": [], "m": [], "v": []}
    before = adam_tensors(reference)
    for name, tensors in adam_tensors(state).items():
        weight, first, second = map(_array, tensors)
        residual = weight - _array(before[name][0])
        weight_mask, moment_mask = kept(residual, first, second, recipe)
        parts["w"].append(_pack(residual, weight_mask, recipe))
        parts["m"].append(_pack(first, moment_mask, recipe))
        parts["v"].append(_pack(second, moment_mask, recipe))
        if recipe.median_in_place_of_zero_v:
            parts["v"].append(struct.pack("<f", np.median(second)))
    streams = {kind: lzma.compress(b"".join(part), preset=9) for kind, part in parts.items()}
    return Encoded(streams, recipe)


def decode(encoded: Encoded, state: State, reference: State) -> State:
    """The reconstruction, from the streams and the reference; of `state` only what is neither w, m nor v is taken."""
    rebuilt = copy.deepcopy(state)
    readers = {kind: _Reader(lzma.decompress(stream)) for kind, stream in encoded.streams.items()}
    before = adam_tensors(reference)
    for name, (weight, first, second) in adam_tensors(rebuilt).items():
        shape, dtype = tuple(weight.shape), encoded.recipe.centre_dtype
        w, m, v = (readers[kind].values(weight.numel(), dtype).reshape(shape) for kind in "wmv")
        if encoded.recipe.median_in_place_of_zero_v:
            v = np.where(v == 0, np.float32(readers["v"].number()), v)
        weight.copy_(torch.from_numpy(_array(before[name][0]) + w))
        first.copy_(torch.from_numpy(m))
        second.copy_(torch.from_numpy(v))
    return rebuilt


@dataclass
class ExcpChain:
    """Maps one state after another to its reconstruction, each coded against the one before; the first stays exact."""

    recipe: Recipe = field(default_factory=Recipe)
    reference: State | None = None
    sizes: list[dict[str, int]] = field(default_factory=list)
    """Bytes of w, m and v of every coded state."""
    seconds: list[tuple[float, float]] = field(default_factory=list)
    """Processor time of encoding and decoding."""

    def __call__(self, state: State) -> State:
        if self.reference is None:
            self.reference = copy.deepcopy(state)
            return self.reference
        start = time.process_time()
        encoded = encode(state, self.reference, self.recipe)
        between = time.process_time()
        self.reference = decode(encoded, state, self.reference)
        self.seconds.append((between - start, time.process_time() - between))
        self.sizes.append(encoded.bytes())
        return self.reference


RECIPES = {
    "excp": Recipe(),
    "excp-fp32-centres": Recipe(centre_dtype="float32"),
    "excp-median-v": Recipe(centre_dtype="float32", median_in_place_of_zero_v=True),
}


def _array(tensor: Tensor) -> Values:
    return tensor.detach().float().numpy()


def _pack(values: Values, mask: NDArray[np.bool_], recipe: Recipe) -> bytes:
    """Number of centres, centres, two indices a byte; index 0 is zero. Few values: as they are, zeros included."""
    chosen = values[mask]
    if np.count_nonzero(chosen) <= CENTRES:
        return bytes([_RAW]) + np.where(mask, values, np.float32(0)).astype("<f4").tobytes()
    centres = centres_of(chosen, CENTRES).astype(recipe.centre_dtype)
    indices = np.zeros(values.size + values.size % 2, np.uint8)
    indices[: values.size][mask.ravel()] = 1 + nearest(chosen, centres.astype(np.float64))
    return bytes([len(centres)]) + centres.tobytes() + (indices[::2] | indices[1::2] << 4).tobytes()


class _Reader:
    """Reads what _pack wrote, one tensor after another."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, count: int) -> bytes:
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self) -> float:
        return struct.unpack("<f", self.take(4))[0]

    def values(self, size: int, centre_dtype: str) -> Values:
        count = self.take(1)[0]
        if count == _RAW:
            return np.frombuffer(self.take(4 * size), "<f4").copy()
        centres = np.frombuffer(self.take(count * np.dtype(centre_dtype).itemsize), centre_dtype).astype(np.float32)
        packed = np.frombuffer(self.take((size + 1) // 2), np.uint8)
        indices = np.stack([packed & 15, packed >> 4], axis=1).ravel()[:size]
        return np.concatenate([np.zeros(1, np.float32), centres])[indices]


def measure(folder: Path, chain: Sequence[int], recipe: Recipe) -> list[dict[str, Any]]:
    """Bytes, bits a value, errors and shares kept of every snapshot of the chain after the first."""
    coder = ExcpChain(recipe)
    coder(load_snapshot(folder, chain[0]))
    rows = []
    for before, after in itertools.pairwise(chain):
        state = load_snapshot(folder, after)
        rebuilt = coder(state)
        pairs = list(zip(adam_tensors(state).values(), adam_tensors(rebuilt).values()))
        count = sum(true[0].numel() for true, _ in pairs)
        sizes = coder.sizes[-1]
        rows.append(
            {
                "pair": f"{before}->{after}",
                "bytes": sizes,
                "bits_a_value": {kind: 8 * size / count for kind, size in sizes.items()},
                "ratio": 12 * count / sum(sizes.values()),
                "share_of_zeros": {kind: _zeros(pairs, place) / count for kind, place in (("m", 1), ("v", 2))},
                "root_mean_v": math.sqrt(sum(float(true[2].double().sum()) for true, _ in pairs) / count),
                "encode_seconds": coder.seconds[-1][0],
                "decode_seconds": coder.seconds[-1][1],
            }
        )
        bits = ", ".join(f"{kind} {value:.3f}" for kind, value in rows[-1]["bits_a_value"].items())
        print(f"{before}->{after}: {bits} bits, {rows[-1]['ratio']:.2f}x", flush=True)
    return rows


def _zeros(pairs: list[Any], place: int) -> int:
    return sum(int((rebuilt[place] == 0).sum()) for _, rebuilt in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshots", type=Path, required=True, help="what benchmarks.checkpoint_snapshots made")
    parser.add_argument("--chain", type=int, nargs="+", action="append", help="steps; the first is the exact reference")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["excp", "excp-fp32-centres"])
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint_excp.json")
    options = parser.parse_args()
    one_deterministic_thread()
    chains = options.chain or [[200, 400, 600], list(range(200, 601, 50))]
    rows = {name: [measure(options.snapshots, chain, RECIPES[name]) for chain in chains] for name in options.recipes}
    result = {**provenance(options), "run": load_settings(options.snapshots), "chains": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
