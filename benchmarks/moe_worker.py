"""Times ways of sending tokens in turn inside one process group; started by moe.py.

Every way has its own model and optimizer. Gradients of what is not an expert go through commcomp's low rank in all of
them, so that the all-to-all is what the link is used for. Rank 0 writes the raw figures of every block as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import commcomp  # noqa: E402
from benchmarks.moe_methods import LAYERS, OURS, PlainMoELayer  # noqa: E402
from benchmarks.timed_blocks import Contender, alternate  # noqa: E402
from commcomp import moe  # noqa: E402
from commcomp.telemetry.environment import machine  # noqa: E402
from moe_gpt_model import MoEGPT, MoEGPTConfig  # noqa: E402
from stdlib_text import Batches, load_split  # noqa: E402


class TokenContender(Contender):
    """A way of sending tokens."""

    def __init__(self, name: str, config: MoEGPTConfig, batches: Batches) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name = name
        methods = OURS.get(name)
        make = (lambda: moe.TokenCompressor(*methods)) if methods else (lambda: None)
        self.bare = MoEGPT(config, make, LAYERS.get(name, moe.MoELayer))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self.bare, moe.local_experts_of(self.bare)
        )
        self._model = DistributedDataParallel(self.bare)
        self._gradients = commcomp.GradientSync(
            self._model, commcomp.LowRank(rank=4, factor_dtype="int8", dense_dtype="bf16"), measure_every=0
        )
        self._model.register_comm_hook(self._gradients, commcomp.comm_hook)
        self._batches, self._batch = batches, 0
        self._optimizer = torch.optim.AdamW(self.bare.parameters(), lr=1e-3)

    def step(self) -> None:
        tokens, targets = self._batches.at(self._batch)
        self._batch += 1
        self._optimizer.zero_grad()
        (self._model(tokens, targets) + 0.01 * self.bare.balance_loss()).backward()
        moe.clip_grad_norm_(self.bare, 1.0)
        self._optimizer.step()

    def counted_bytes(self) -> float:
        return self._gradients.stats()["wire_bytes"] + self.token_bytes()

    def token_bytes(self) -> float:
        """Of all-to-alls."""
        total = 0.0
        for layer in self.bare.moe_layers():
            if isinstance(layer, PlainMoELayer):
                total += layer.sent_bytes(self.bare.config.width)
            elif layer.compressor is not None:
                total += layer.compressor.traffic.wire_bytes
        return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", required=True)
    for name in ("batch", "context", "width", "layers", "experts", "rounds", "steps", "first"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    config = MoEGPTConfig(
        layers=options.layers, heads=4, width=options.width, context=options.context, experts=options.experts
    )
    text, _ = load_split()
    batches = Batches(text, batch=options.batch, context=options.context, rank=dist.get_rank(), seed=0)
    contenders = [TokenContender(name, config, batches) for name in options.methods]
    alternate(contenders, rounds=options.rounds, steps=options.steps, first=options.first)
    if dist.get_rank() == 0:
        rows = {}
        for contender in contenders:
            compressors = [layer.compressor for layer in contender.bare.moe_layers() if layer.compressor]
            steps = options.first + options.rounds * options.steps
            rows[contender.name] = {
                "blocks": contender.blocks,
                "token_bytes_per_step": contender.token_bytes() / steps,
                "layers": [compressor.stats() for compressor in compressors],
            }
        parameters = sum(one.numel() for one in contenders[0].bare.parameters())
        options.out.write_text(json.dumps({"machine": machine(), "parameters": parameters, "methods": rows}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
