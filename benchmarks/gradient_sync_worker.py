"""Times gradient synchronisation methods in turn inside one process group; started by gradient_sync.py.

Every method gets its own model and optimizer, under DDP or fully_shard. Rank 0 writes the raw figures of every block of
steps (timed_blocks.py) as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import commcomp  # noqa: E402
from benchmarks.methods import BenchmarkMethod, by_name  # noqa: E402
from benchmarks.timed_blocks import Contender, alternate  # noqa: E402
from benchmarks.unreduced import shard_unreduced  # noqa: E402
from commcomp.hooks.fsdp_gather import GatherCompression  # noqa: E402
from commcomp.telemetry.environment import machine  # noqa: E402
from gpt_model import GPT, GPTConfig  # noqa: E402
from stdlib_text import Batches, load_split  # noqa: E402
from train_gradients import compress_gathers, spread, synchronise_gradients  # noqa: E402


class GradientContender(Contender):
    """A way of synchronising gradients, under DDP or fully_shard."""

    def __init__(self, method: BenchmarkMethod, config: GPTConfig, batches: Batches) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name, self.batches_a_step = method.name, method.micro_steps
        self.model, self._state, self._gathers = _spread(GPT(config), method)
        self._batches, self._batch = batches, 0
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def step(self) -> None:
        micro_steps = self.batches_a_step
        self._optimizer.zero_grad()
        for index in range(micro_steps):
            tokens, targets = self._batches.at(self._batch)
            self._batch += 1
            with nullcontext() if index == micro_steps - 1 else self.model.no_sync():
                (self.model(tokens, targets) / micro_steps).backward()
        self._optimizer.step()

    def counted_bytes(self) -> float:
        reduced = self._state.stats()["wire_bytes"] if self._state is not None else 0.0
        return reduced + (self._gathers.wire_bytes if self._gathers is not None else 0)


def _spread(
    model: nn.Module, method: BenchmarkMethod
) -> tuple[nn.Module, commcomp.GradientSync | None, GatherCompression | None]:
    cpu = torch.device("cpu")
    if method.parallel != "ddp" and method.gradient["method"] == "no_communication":
        return shard_unreduced(model, method.parallel, cpu), None, None
    model = spread(model, method.parallel, bucket_cap_mb=method.bucket_cap_mb, device=cpu)
    gathers = compress_gathers(model, method.parallel, method.gather_bits, method.gather_difference)
    return model, synchronise_gradients(model, method.parallel, method.gradient), gathers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--window", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    config = GPTConfig()
    text, _ = load_split()
    batches = Batches(text, batch=options.batch, context=options.window, rank=dist.get_rank(), seed=0)
    contenders = [GradientContender(by_name(name), config, batches) for name in options.methods]
    # The first steps: torch's dense ones, bucket rebuilding and allocation.
    alternate(contenders, rounds=options.rounds, steps=options.steps, first=4)
    if dist.get_rank() == 0:
        parameters = sum(parameter.numel() for parameter in contenders[0].model.parameters())
        blocks = {contender.name: contender.blocks for contender in contenders}
        options.out.write_text(json.dumps({"machine": machine(), "parameters": parameters, "blocks": blocks}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
