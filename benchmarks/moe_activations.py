"""Which tokens of a model in training are alike: rates and residuals by layer, and what that does to experts' answers.

    .venv/bin/python -m benchmarks.moe_activations    # 10 minutes, one process

A Mixture-of-Experts GPT is trained plainly; after some steps one batch goes through each MoE layer as if compressed by
each setting. Writes JSON and a plot under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from benchmarks.record import RESULTS, provenance  # noqa: E402
from commcomp import moe  # noqa: E402
from commcomp.compressors.clusters import Clusters  # noqa: E402
from commcomp.moe.grouping import Grouping  # noqa: E402
from moe_gpt_model import MoEGPT, MoEGPTConfig  # noqa: E402
from stdlib_text import Batches, load_split  # noqa: E402

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "nearest, first": [{"farthest": reach} for reach in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)],
    "hash, first": [
        {"search": "hash", "hashes": hashes, "coords": coords, "farthest": None}
        for hashes, coords in ((1, 16), (2, 4), (2, 8), (2, 16), (2, 64), (3, 16), (4, 16))
    ],
    "hash, mean (published)": [
        {"search": "hash", "hashes": hashes, "coords": coords, "farthest": None, "centroid": "mean"}
        for hashes, coords in ((1, 16), (2, 4), (2, 8), (2, 16), (2, 64), (3, 16), (4, 16))
    ],
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 200, 700])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS / "moe_activations.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {**provenance(options), "layers": measure(options)}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result["layers"], options.out.with_suffix(".png"))
    for entry in result["layers"]:
        print(
            f"step {entry['step']:4d} layer {entry['layer']} {entry['setting']:24s} rate {entry['rate']:.2f} "
            f"residual {entry['residual']:.2f} answers off by {entry['none']:.2f}, compensated {entry['both']:.2f}"
        )
    print(f"wrote {options.out}")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry for every step, layer and setting."""
    torch.manual_seed(0)
    config = MoEGPTConfig(layers=4, heads=4, width=192, context=128)
    model = MoEGPT(config, lambda: None)
    text, _ = load_split()
    batches = Batches(text, batch=options.batch, context=config.context, rank=0, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    entries = []
    for step in range(1, max(options.steps) + 1):
        loss = model(*batches.at(step)) + 0.01 * model.balance_loss()
        optimizer.zero_grad()
        loss.backward()
        moe.clip_grad_norm_(model, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 40)
        optimizer.step()
        if step in options.steps:
            entries += _of_layers(model, batches, step)
            print(f"step {step}, loss {loss.item():.3f}", flush=True)
    return entries


@torch.no_grad()
def _of_layers(model: MoEGPT, batches: Batches, step: int) -> list[dict[str, Any]]:
    seen: list[tuple[Tensor, list[int], Tensor]] = []
    hooks = [
        layer.experts.register_forward_hook(lambda _, given, made: seen.append((*given, made)))
        for layer in model.moe_layers()
    ]
    for number in (1_000_000, 1_000_001):  # batches that training has not met: for the means, and for the figures
        model(*batches.at(number))
    for hook in hooks:
        hook.remove()
    layers = model.moe_layers()
    entries = []
    for number, layer in enumerate(layers):
        before, (rows, counts, answers) = seen[number], seen[number + len(layers)]
        parts = before[0].split(before[1])
        centres = torch.stack([part.sum(0) / max(1, len(part)) for part in parts])
        for name, settings in SETTINGS.items():
            for one in settings:
                figures = _figures(layer, rows, counts, answers, centres, moe.LSH(rate=None, **one))
                entries.append({"step": step, "layer": number, "setting": name, "of": one, **figures})
    return entries


def _figures(
    layer: moe.MoELayer, rows: Tensor, counts: list[int], answers: Tensor, centres: Tensor, lsh: moe.LSH
) -> dict[str, float]:
    """Residuals are relative to distances from the expert's mean, errors of answers to the answers."""
    numbers = torch.tensor(counts)
    experts = torch.arange(len(counts)).repeat_interleave(numbers)
    found = Grouping(lsh).find(rows, experts, numbers, centres)
    clusters: Clusters = found.counted(int(found.per_expert.sum()))
    centroids = clusters.means(rows) if lsh.centroid == "mean" else clusters.first(rows)
    made = clusters.spread(layer.experts(centroids, found.per_expert.tolist()))
    apart = rows - clusters.spread(centroids)
    return {
        "rate": len(clusters.sizes) / len(rows),
        "residual": float(apart.norm() / (rows - centres.index_select(0, experts)).norm()),
        "none": float((made - answers).norm() / answers.norm()),
        "both": float((made + apart - answers).norm() / answers.norm()),
    }


def plot(entries: list[dict[str, Any]], path: Path) -> None:
    """Error of answers over rate, a panel a layer and step; dashed: what a token differs by is added."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = sorted({entry["step"] for entry in entries})
    layers = sorted({entry["layer"] for entry in entries})
    figure, panels = pyplot.subplots(
        len(layers), len(steps), figsize=(4 * len(steps), 3.2 * len(layers)), sharex=True, sharey=True, squeeze=False
    )
    for row, layer in enumerate(layers):
        for column, step in enumerate(steps):
            panel = panels[row][column]
            for color, name in enumerate(SETTINGS):
                own = [e for e in entries if (e["step"], e["layer"], e["setting"]) == (step, layer, name)]
                own.sort(key=lambda entry: entry["rate"])
                rates = [entry["rate"] for entry in own]
                panel.plot(rates, [entry["none"] for entry in own], "o-", color=f"C{color}", label=name, markersize=3)
                panel.plot(rates, [entry["both"] for entry in own], "--", color=f"C{color}", linewidth=0.8)
            panel.set_title(f"MoE layer {layer}, after {step} steps", fontsize=9)
            panel.set_xlim(0, 1), panel.set_ylim(0, 1)
            panel.grid(alpha=0.3)
    panels[-1][0].set_xlabel("rows sent / tokens")
    panels[0][0].set_ylabel("answers off by (relative)")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
