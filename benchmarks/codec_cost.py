"""What compressing a bucket costs a rank, against the time that the bytes it saves would take: when does a method pay?

    .venv/bin/python -m benchmarks.codec_cost                  # 5 minutes on one CPU core
    .venv/bin/python -m benchmarks.codec_cost --device cuda    # the same on a GPU

Cost is a whole step of one bucket on one rank, as GradientSync makes it: add the residual, encode, decode, keep the
residual, write the mean; and once more the decoding, since each of two ranks decodes both payloads. Saved are the bytes
of a bf16 all-reduce between two ranks, 2 bytes a value, less those of the method.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commcomp
from benchmarks.record import RESULTS, provenance
from commcomp import layout
from commcomp.config import Dense, LowRank, Method, Quantized, Sparse
from commcomp.exchange.mean import sent_bytes

RANKS = 2
LINKS = {"1 Gbit/s": 1e9, "10 Gbit/s": 1e10, "100 Gbit/s": 1e11}
ROWS = {10**5: (250, 400), 10**6: (1000, 1000), 6 * 10**6: (2000, 3000), 10**8: (10_000, 10_000)}
"""By number of values; 6 million are DDP's usual bucket."""
METHODS: dict[str, Method] = {
    "bf16": Dense("bf16"),
    "8 bits": Quantized(bits=8),
    "4 bits": Quantized(bits=4),
    "4 bits, rotated": Quantized(bits=4, rotate=True),
    "sparse 25 %": Sparse(density=0.25, value_dtype="int8"),
    "sparse 1 %": Sparse(density=0.01),
    "sparse 0.1 %": Sparse(density=0.001),
    "rank 4 int8": LowRank(rank=4, factor_dtype="int8"),
    "rank 16 int8": LowRank(rank=16, factor_dtype="int8"),
}


def measure(method: Method, size: int, device: torch.device, least_seconds: float) -> dict[str, Any]:
    """Seconds and bytes of one method for one matrix of `size` values."""
    torch.manual_seed(0)
    rows, columns = ROWS[size]
    layer = nn.Linear(columns, rows, bias=False, device=device)
    settings = {"residual_dtype": "none" if isinstance(method, Dense) else "fp32", "measure_every": 0}
    model = DistributedDataParallel(layer)  # else parameters might be unused, for all that GradientSync knows
    state = commcomp.GradientSync(model, method, strict=False, **settings)
    gradient = torch.randn(size, device=device)
    bucket = gradient.clone()

    def step() -> None:
        bucket.copy_(gradient)
        state.reduce_bucket(bucket, [layer.weight], [bucket.view(rows, columns)], first=True, last=True).wait()

    copying = _median_seconds(lambda: bucket.copy_(gradient), device, least_seconds)
    seconds = _median_seconds(step, device, least_seconds) - copying
    sections = layout.sections(state.effective["weight"], (rows, columns))
    sent = sum(sent_bytes(section, RANKS) for section in sections)
    whole = 2 * (RANKS - 1) * 2 * size // RANKS
    seconds += sum(_decoding(section, device, least_seconds) for section in sections)
    state.close()
    return {
        "seconds": seconds,
        "copy_seconds": copying,
        # Gradient and residual are read and written once at least, a copy reads and writes one of them.
        "share_of_memory_bandwidth": (1 if isinstance(method, Dense) else 2) * copying / seconds,
        "bytes": sent,
        "bytes_of_bf16": whole,
        "saved_seconds": {link: 8 * (whole - sent) / rate for link, rate in LINKS.items()},
    }


def _decoding(section: Any, device: torch.device, least_seconds: float) -> float:
    encoded = torch.empty(section.encoded_bytes(), dtype=torch.uint8, device=device)
    generator = torch.Generator(device).manual_seed(0)
    section.encode_into(encoded, torch.randn(section.rows, section.length, device=device), generator)
    return _median_seconds(lambda: section.decode(encoded), device, least_seconds)


def _median_seconds(work: Callable[[], object], device: torch.device, least_seconds: float) -> float:
    """Of runs that together take `least_seconds`, seven at least; the first two are not counted."""
    taken: list[float] = []
    while len(taken) < 9 or sum(taken) < least_seconds:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sizes", nargs="+", type=int, default=[10**5, 10**6, 6 * 10**6], choices=tuple(ROWS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=tuple(METHODS))
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--least-seconds", type=float, default=2.0, help="time given to each measurement")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    backend = "nccl" if options.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    table = {}
    for name in options.methods:
        for size in options.sizes:
            table.setdefault(name, {})[size] = measure(METHODS[name], size, device, options.least_seconds)
            _print_row(name, size, table[name][size])
    dist.destroy_process_group()
    out = options.out or RESULTS / f"codec_cost_{options.device}.json"
    out.write_text(json.dumps({**provenance(options), "ranks": RANKS, "methods": table}, indent=1) + "\n")
    print(f"wrote {out}")


def _print_row(name: str, size: int, row: dict[str, Any]) -> None:
    pays = [f"{link} {seconds / row['seconds']:.3g}" for link, seconds in row["saved_seconds"].items()]
    print(
        f"{name:16s} {size:>10d} values: {1e3 * row['seconds']:9.3f} ms, {row['bytes'] / 1e6:9.4f} of "
        f"{row['bytes_of_bf16'] / 1e6:.4f} MB, {row['share_of_memory_bandwidth']:.0%} of the memory's bandwidth; "
        f"saved / cost: {', '.join(pays)}",
        flush=True,
    )


if __name__ == "__main__":
    main()
