"""What finding clusters of tokens costs, beside the experts' forward pass on the same tokens.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.moe_cost    # 2 minutes, one thread

Tokens lie around a number of points that sets how many rows are sent. Seconds are the thread's own, so that other work
on the machine counts little; page faults show how much fresh memory was taken. Writes benchmarks/results/moe_cost.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import RESULTS, provenance
from commcomp.moe import LSH
from commcomp.moe.experts import Experts
from commcomp.moe.grouping import Grouping

SHAPES = ((192, 768, 4096), (1024, 4096, 2048), (1024, 4096, 4096))
"""(width, inside the expert, tokens), for 8 experts."""
SEARCHES = {
    "nearest": LSH(rate=None, farthest=0.7),
    "hash": LSH(rate=None, search="hash", hashes=2, coords=16, farthest=None),
    "hash, with a limit": LSH(rate=None, search="hash", hashes=2, coords=16, farthest=0.7),
}
_EXPERTS = 8


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, default=RESULTS / "moe_cost.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for shape in SHAPES for points in (0.1, 0.4, 4.0) for row in measure(*shape, points, options.repeats)]
    options.out.write_text(json.dumps({**provenance(options), "rows": rows}, indent=1) + "\n")
    for row in rows:
        share = 100 * row["seconds"] / row["expert_seconds"]
        print(
            f"width {row['width']:5d} tokens {row['tokens']:5d} {row['search']:20s} rate {row['rate']:.2f} "
            f"{1e3 * row['seconds']:7.2f} ms, {share:5.1f} % of the experts' pass, {row['page_faults']:.0f} page faults"
        )
    print(f"wrote {options.out}")


@torch.no_grad()
def measure(width: int, hidden: int, tokens: int, points: float, repeats: int) -> list[dict[str, Any]]:
    """`points`: around how many points a token the tokens lie."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randn(max(1, int(points * tokens)), width, generator=generator)
    rows = places[torch.randint(0, len(places), (tokens,), generator=generator)]
    rows = rows + 0.3 * torch.randn(tokens, width, generator=generator)
    numbers = torch.randint(0, _EXPERTS, (tokens,), generator=generator).sort().values
    counts = torch.bincount(numbers, minlength=_EXPERTS)
    centres = torch.zeros(_EXPERTS, width)
    experts = Experts(width, hidden, range(_EXPERTS), seed=0, ranks=1)
    whole, _ = _cost(lambda: experts(rows, counts.tolist()), repeats)
    found = []
    for name, lsh in SEARCHES.items():
        grouping = Grouping(lsh)

        def search(grouping: Grouping = grouping) -> Tensor:
            clusters = grouping.find(rows, numbers, counts, centres)
            return clusters.counted(int(clusters.per_expert.sum())).sizes

        rate = len(search()) / tokens
        seconds, faults = _cost(search, repeats)
        row = {"width": width, "hidden": hidden, "tokens": tokens, "search": name, "rate": rate}
        found.append({**row, "seconds": seconds, "expert_seconds": whole, "page_faults": faults})
    return found


def _cost(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median of the thread's seconds, and page faults, of one call."""
    work()
    taken = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(repeats):
        start = time.thread_time()
        work()
        taken.append(time.thread_time() - start)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return statistics.median(taken), faults / repeats


if __name__ == "__main__":
    main()
