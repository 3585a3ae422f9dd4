"""Times gradient synchronisation methods in turn inside one process group; started by gradient_sync.py.

Every method gets its own model and optimizer, under DDP or fully_shard. Blocks of steps alternate between the methods,
so a slow spell of the machine meets all of them. Rank 0 writes the raw figures of every block as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import commcomp  # noqa: E402
from benchmarks.methods import BenchmarkMethod, by_name  # noqa: E402
from benchmarks.unreduced import shard_unreduced  # noqa: E402
from commcomp.hooks.fsdp_gather import GatherCompression  # noqa: E402
from commcomp.telemetry.environment import machine  # noqa: E402
from gpt_model import GPT, GPTConfig  # noqa: E402
from stdlib_text import Batches, load_split  # noqa: E402
from train_gradients import compress_gathers, spread, synchronise_gradients  # noqa: E402


class Contender:
    """One method with a model of its own."""

    def __init__(self, method: BenchmarkMethod, config: GPTConfig, batches: Batches) -> None:
        torch.manual_seed(0)
        self.method, self.batches = method, batches
        self.model, self.state, self.gathers = _spread(GPT(config), method)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.step = 0
        self.blocks: list[dict[str, Any]] = []

    def run_block(self, steps: int, *, keep: bool) -> None:
        """Take about `steps` batches' worth of optimizer steps; `keep` their figures, which are per batch."""
        steps = max(1, steps // self.method.micro_steps)
        dist.barrier()
        sent, counted, (stolen, passed) = _sent_payload_bytes(), self._counted_bytes(), _stolen_and_all_time()
        seconds, cpu_seconds = [], []
        for _ in range(steps):
            cpu, start = time.process_time(), time.perf_counter()
            self._step()
            seconds.append((time.perf_counter() - start) / self.method.micro_steps)
            cpu_seconds.append((time.process_time() - cpu) / self.method.micro_steps)
        dist.barrier()
        if keep:
            stolen_now, passed_now = _stolen_and_all_time()
            self.blocks.append(
                {
                    "stolen_share": (stolen_now - stolen) / max(1, passed_now - passed),
                    "seconds": seconds,
                    "cpu_seconds": cpu_seconds,
                    "interface_bytes": (_sent_payload_bytes() - sent) / steps / self.method.micro_steps,
                    "counted_bytes": (self._counted_bytes() - counted) / steps / self.method.micro_steps,
                }
            )

    def _step(self) -> None:
        micro_steps = self.method.micro_steps
        self.optimizer.zero_grad()
        for index in range(micro_steps):
            tokens, targets = self.batches.at(self.step)
            self.step += 1
            with nullcontext() if index == micro_steps - 1 else self.model.no_sync():
                (self.model(tokens, targets) / micro_steps).backward()
        self.optimizer.step()

    def _counted_bytes(self) -> float:
        reduced = self.state.stats()["wire_bytes"] if self.state is not None else 0.0
        return reduced + (self.gathers.wire_bytes if self.gathers is not None else 0)


def _spread(
    model: nn.Module, method: BenchmarkMethod
) -> tuple[nn.Module, commcomp.GradientSync | None, GatherCompression | None]:
    cpu = torch.device("cpu")
    if method.parallel != "ddp" and method.gradient["method"] == "no_communication":
        return shard_unreduced(model, method.parallel, cpu), None, None
    model = spread(model, method.parallel, bucket_cap_mb=method.bucket_cap_mb, device=cpu)
    gathers = compress_gathers(model, method.parallel, method.gather_bits, method.gather_difference)
    return model, synchronise_gradients(model, method.parallel, method.gradient), gathers


def _stolen_and_all_time() -> tuple[int, int]:
    """Ticks of all cores that went to other guests of the machine's host, and ticks in all; (0, 0) if not known."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0, 0
    ticks = [int(value) for value in stat.read_text().splitlines()[0].split()[1:9]]
    return ticks[7], sum(ticks)


_HEADER_BYTES = 66
"""Ethernet 14, IPv4 20, TCP 20 and its timestamp option 12: what each packet carries besides payload."""


def _sent_payload_bytes() -> int:
    """TCP payload bytes that left this node's network interface so far, by the kernel's counters."""
    interface = os.environ.get("COMMCOMP_LINK_INTERFACE")
    if interface is None:
        return 0
    counters = Path(f"/sys/class/net/{interface}/statistics")
    sent, packets = (int((counters / name).read_text()) for name in ("tx_bytes", "tx_packets"))
    return sent - _HEADER_BYTES * packets


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
    contenders = [Contender(by_name(name), config, batches) for name in options.methods]
    for contender in contenders:  # past torch's dense first steps, bucket rebuilding and allocation
        contender.run_block(4, keep=False)
    for index in range(options.rounds):
        for contender in contenders:
            contender.run_block(options.steps, keep=True)
        if dist.get_rank() == 0:
            print(f"round {index + 1} of {options.rounds}", flush=True)
    if dist.get_rank() == 0:
        parameters = sum(parameter.numel() for parameter in contenders[0].model.parameters())
        blocks = {contender.method.name: contender.blocks for contender in contenders}
        options.out.write_text(json.dumps({"machine": machine(), "parameters": parameters, "blocks": blocks}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
