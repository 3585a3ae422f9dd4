"""One rank of benchmarks/moe_over_training.py: examples/train_moe.py with a look at its tokens at every evaluation.

    torchrun --standalone --nproc-per-node 2 benchmarks/moe_over_training_worker.py moe=lsh_int8 output_dir=...

Takes the settings of the example. Leaves looks.json beside result.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from commcomp import moe  # noqa: E402
from commcomp.moe.row_exchange import Traffic  # noqa: E402
from moe_gpt_model import MoEGPT  # noqa: E402
from stdlib_text import held_out_batches, load_split  # noqa: E402
from train_gpt import held_out_loss, train  # noqa: E402
from train_moe import make_model, recipe  # noqa: E402
from train_setup import Place, check_settings, distributed  # noqa: E402


class WatchedMoELayer(moe.MoELayer):
    """Keeps what went through its experts and what they answered, when evaluated."""

    seen: tuple[Tensor, Tensor, Tensor] | None = None

    def through_experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        answers = super().through_experts(rows, counts)
        self.seen = None if self.training else (rows, counts, answers)
        return answers


class Looks:
    """What clusters do to held-out text at some steps of a run: one entry a call. A collective."""

    def __init__(self, config: DictConfig, place: Place) -> None:
        _, text = load_split()
        context = config.model.context
        self._place = place
        self._held_out = held_out_batches(text, batch=config.eval_batch, context=context, count=config.eval_batches)
        # As many tokens as in a step, and other ones on each rank.
        by_rank = held_out_batches(text, batch=config.batch, context=context, count=place.world_size)
        self._batch = tuple(part.to(place.device) for part in by_rank[place.rank])
        self.entries: list[dict[str, Any]] = []

    @torch.no_grad()
    def take(self, model: MoEGPT, step: int) -> None:
        """After `step` steps of training, which it leaves no trace in."""
        layers = model.moe_layers()
        stats = [layer.compressor.stats() for layer in layers]
        traffics = [layer.compressor.traffic for layer in layers]
        for layer in layers:
            layer.compressor.traffic = Traffic()
        with moe.compressing(model):
            compressed = held_out_loss(model, self._held_out, self._place)
        model.eval()
        model(*self._batch)
        of_layers = [
            {"training_rate": own["rate"], "bytes_ratio": own["ratio"], **_figures(layer)}
            for layer, own in zip(layers, stats, strict=True)
        ]
        model.train()
        for layer, traffic in zip(layers, traffics, strict=True):
            layer.compressor.traffic, layer.seen = traffic, None
        self.entries.append({"step": step, "held_out_compressed": compressed, "layers": of_layers})


def _figures(layer: WatchedMoELayer) -> dict[str, float]:
    """Of all ranks' rows, without their number format. residual: |x - what stands for it| / |x - mean of the expert|;
    off, off_with_residual: |answer - the expert's own| / |the expert's own|, and with what x differs by added."""
    compressor = layer.compressor
    if compressor.lsh is None or layer.seen is None:
        return {}
    rows, counts, answers = layer.seen
    settings = compressor.lsh, compressor.quantized
    experts = torch.arange(len(counts), device=rows.device).repeat_interleave(counts)
    made = []
    with moe.compressing(layer):
        found = compressor.find(rows, experts, counts)
        for compensate in ("none", "both"):
            compressor.lsh, compressor.quantized = replace(settings[0], compensate=compensate), None
            made.append(layer.through_experts(rows, counts))
    compressor.lsh, compressor.quantized = settings
    clusters = found.counted(int(found.per_expert.sum()))
    centroids = clusters.means(rows) if settings[0].centroid == "mean" else clusters.first(rows)
    differences = (
        rows - clusters.spread(centroids),
        rows - compressor.learnt.centres.index_select(0, experts),
        made[0] - answers,
        made[1] - answers,
        answers,
    )
    squares = torch.stack([one.double().square().sum() for one in differences])
    numbers = torch.tensor([len(clusters.sizes), len(rows)], dtype=torch.float64, device=rows.device)
    total = torch.cat((squares, numbers))
    dist.all_reduce(total)
    apart, centred, off, off_with_residual, size, sent, tokens = total.tolist()
    return {
        "rate": sent / tokens,
        "residual": (apart / centred) ** 0.5,
        "off": (off / size) ** 0.5,
        "off_with_residual": (off_with_residual / size) ** 0.5,
    }


@hydra.main(version_base=None, config_path="../configs", config_name="train_moe")
def main(config: DictConfig) -> None:
    """One rank."""
    check_settings(config)
    with distributed(config.device, config.timeout_seconds) as place:
        looks = Looks(config, place)
        watched = partial(make_model, layer_type=WatchedMoELayer)
        train(config, place, replace(recipe(config), make_model=watched, evaluated=looks.take))
        if place.rank == 0:
            (Path(config.output_dir) / "looks.json").write_text(json.dumps(looks.entries))


if __name__ == "__main__":
    main()
