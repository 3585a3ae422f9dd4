"""Step time, bytes and loss of a Mixture-of-Experts GPT whose tokens cross really limited links.

    sudo .venv/bin/python -m benchmarks.moe steps               # 25 minutes: 2 nodes, three link rates
    sudo .venv/bin/python -m benchmarks.moe steps --nodes 4
    .venv/bin/python -m benchmarks.moe loss                     # 2 hours: held-out loss at equal steps, on loopback
    sudo .venv/bin/python -m benchmarks.moe race --rate 262mbit --loss-steps 400    # 15 minutes: seconds to a loss

The rates of `steps` are such that torch's all-to-all of bf16 rows takes about 30, 45 and 70 % of a step: what it takes
is measured first, at two rates. Each part writes JSON under benchmarks/results/ and prints a table. What `loss`
measures does not depend on the link.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.block_figures import print_rows, print_targets, summarise
from benchmarks.moe_loss import METHODS as LOSS_METHODS
from benchmarks.moe_loss import measure_loss, measure_race
from benchmarks.moe_methods import AT_HOME, METHODS, PLAIN, PLAIN_BF16
from benchmarks.record import RESULTS, provenance, run_on_cluster
from launchers.shaped_cluster import ShapedCluster, capabilities

_PROBED = (60, 1000)
"""Mbit/s at which the time that plain bf16's all-to-all takes is measured: some of it goes with one over the rate."""
_FASTEST = 4000
_SHAPE = ("batch", "context", "width", "layers", "experts")


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Step times of all methods at links where plain bf16's all-to-all takes the shares of `options.shares`."""
    # What a step takes without an all-to-all is what all others are measured by.
    methods = [AT_HOME, *(name for name in options.methods or METHODS if name != AT_HOME)]
    with ShapedCluster(nodes=options.nodes, rate=f"{_PROBED[0]}mbit") as cluster:
        wanted = _rates_of(options.shares, cluster, options)
        rates: dict[str, Any] = {}
        for share, rate in zip(options.shares, wanted, strict=True):
            cluster.set_rate(rate)
            raw = _run(cluster, methods, rate, options)
            rates[rate] = {"wanted_share": share, "rows": _rows(raw)}
    return {
        **provenance(options),
        "machine": raw["machine"],
        "parameters": raw["parameters"],
        "rates": rates,
        "targets": {rate: _targets(entry["rows"]) for rate, entry in rates.items()},
    }


def _rates_of(shares: list[float], cluster: ShapedCluster, options: argparse.Namespace) -> list[str]:
    """Rates at which plain bf16's all-to-all takes these shares, from its seconds at two: fixed + sent / rate."""
    added, homes = [], []
    for probed in _PROBED:
        cluster.set_rate(f"{probed}mbit")
        rows = _rows(_run(cluster, [AT_HOME, PLAIN_BF16], f"{probed}mbit", options))
        home, plain = (rows[name]["median_step_seconds"] for name in (AT_HOME, PLAIN_BF16))
        homes.append(home)
        added.append(plain - home)
    sent = (added[0] - added[1]) / (1 / _PROBED[0] - 1 / _PROBED[1])
    fixed, home = added[0] - sent / _PROBED[0], min(homes)
    rates = [sent / max(share / (1 - share) * home - fixed, sent / _FASTEST) for share in shares]
    print(f"plain bf16's all-to-all: {fixed:.3f} s and {sent:.1f} s / (Mbit/s), in steps of {home:.3f} s", flush=True)
    return [f"{round(rate)}mbit" for rate in rates]


def _run(cluster: ShapedCluster, methods: list[str], rate: str, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "blocks.json"
        arguments = ["--methods", *methods, "--out", str(out)]
        for name in (*_SHAPE, "rounds", "steps", "first"):
            arguments += [f"--{name}", str(getattr(options, name))]
        run_on_cluster(cluster, ["benchmarks/moe_worker.py", *arguments], rate)
        return json.loads(out.read_text())


def _rows(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    home = raw["methods"].get(AT_HOME)
    rows = {}
    for name, entry in raw["methods"].items():
        figures: dict[str, Any] = summarise(entry["blocks"], home and home["blocks"])
        figures["token_bytes_per_step"] = entry["token_bytes_per_step"]
        figures["layers"] = entry["layers"]
        rows[name] = figures
    return rows


def _targets(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    home = rows[AT_HOME]["median_step_seconds"]
    targets = {}
    for name, row in rows.items():
        seconds = row["median_step_seconds"]
        entry = {"all-to-all / step": 1 - home / seconds}
        for plain in (PLAIN, PLAIN_BF16, "commcomp bf16", "commcomp int8"):
            if plain in rows and plain != name != AT_HOME:
                entry[f"{plain} / this"] = rows[plain]["median_step_seconds"] / seconds
        if PLAIN in rows and name != AT_HOME:
            entry["bytes, plain fp32 / this"] = rows[PLAIN]["token_bytes_per_step"] / row["token_bytes_per_step"]
        if row["interface_payload_bytes_per_step"]:
            sent = row["interface_payload_bytes_per_step"]
            entry["interface bytes / counted bytes"] = sent / row["counted_bytes_per_step"]
        targets[name] = entry
    return targets


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("steps", "loss", "race"))
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rate", default="262mbit", help="race: of every node's link")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.45, 0.7])
    parser.add_argument("--methods", nargs="+", help="rows by name, default all")
    parser.add_argument("--batch", type=int, default=8, help="windows of text a rank and step")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="steps: blocks a method")
    parser.add_argument("--steps", type=int, default=6, help="steps: steps a block")
    parser.add_argument("--first", type=int, default=34, help="steps: steps before, in which rates are found")
    parser.add_argument("--loss-steps", type=int, default=1000)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", help="loss: folder of the runs' own files; what is there is not repeated")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    known = METHODS if options.part == "steps" else tuple(LOSS_METHODS)
    if unknown := [name for name in options.methods or () if name not in known]:
        parser.error(f"--methods {unknown[0]!r}; expected of {', '.join(map(repr, known))}")
    if options.part != "loss" and (reason := capabilities()):
        raise SystemExit(f"shaped links do not work here: {reason}")
    result = {"steps": measure_steps, "loss": measure_loss, "race": measure_race}[options.part](options)
    out = options.out or RESULTS / f"moe_{options.part}_{options.nodes}_nodes.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    for rate, entry in result.get("rates", {}).items():
        print_rows(rate, entry["rows"])
        print_targets(result["targets"][rate], f"{rate}, ratios")
    if options.part != "steps":
        print_targets(result["targets"], "held-out loss")
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
