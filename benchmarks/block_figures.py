"""Figures of the blocks of steps that timed_blocks.py makes, and tables of them."""

from __future__ import annotations

import math
import statistics
from typing import Any

_STOLEN_ALLOWED = 0.01
"""Share of a block's CPU time that other guests of the host may take; blocks with more are left out."""


def summarise(blocks: list[dict[str, Any]], idle: list[dict[str, Any]] | None) -> dict[str, float]:
    """Figures of one method; CPU time added is taken within each round, since the machine's speed drifts over them."""
    kept = _quiet_of([(block,) for block in blocks])
    seconds = sorted(value for (block,) in kept for value in block["seconds"])
    cpu = [value for (block,) in kept for value in block["cpu_seconds"]]
    added = [
        statistics.median(block["cpu_seconds"]) - statistics.median(base["cpu_seconds"])
        for block, base in _quiet_of(list(zip(blocks, idle or [], strict=False)))
    ]
    return {
        "median_step_seconds": statistics.median(seconds),
        "p10_step_seconds": seconds[len(seconds) // 10],
        "p90_step_seconds": seconds[len(seconds) * 9 // 10],
        "median_cpu_seconds": statistics.median(cpu),
        **({"median_cpu_seconds_added": statistics.median(added)} if added else {}),
        "blocks": len(blocks),
        "blocks_left_out": len(blocks) - len(kept),
        "stolen_share": statistics.fmean(block["stolen_share"] for (block,) in kept),
        "interface_payload_bytes_per_step": statistics.fmean(block["interface_bytes"] for block in blocks),
        "counted_bytes_per_step": statistics.fmean(block["counted_bytes"] for block in blocks),
    }


def _quiet_of(groups: list[tuple[dict[str, Any], ...]]) -> list[tuple[dict[str, Any], ...]]:
    """Groups of blocks of which none was disturbed; all groups if fewer than three are left."""
    quiet = [group for group in groups if all(block["stolen_share"] <= _STOLEN_ALLOWED for block in group)]
    return quiet if len(quiet) >= 3 else groups


def print_targets(targets: dict[str, dict[str, float]], title: str) -> None:
    print(f"\n{title}")
    for name, entry in targets.items():
        print(f"  {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in entry.items()))


def print_rows(rate: str, rows: dict[str, dict[str, float]]) -> None:
    columns = ("step ms", "p10", "p90", "CPU ms", "added", "MB sent", "counted", "left out")
    print(f"\n{rate:40s} " + " ".join(f"{column:>9s}" for column in columns))
    for name, row in rows.items():
        times = [1e3 * row[key] for key in ("median_step_seconds", "p10_step_seconds", "p90_step_seconds")]
        cpu = [1e3 * row.get(key, math.nan) for key in ("median_cpu_seconds", "median_cpu_seconds_added")]
        sent = [row[key] / 1e6 for key in ("interface_payload_bytes_per_step", "counted_bytes_per_step")]
        cells = [f"{value:9.1f}" for value in times + cpu] + [f"{value:9.4f}" for value in sent]
        cells.append(f"{row['blocks_left_out']:6d}/{row['blocks']:d}")
        print(f"{name:40s} " + " ".join(cells))
