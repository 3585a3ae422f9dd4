"""Blocks of steps of several contenders in one process group, in turn, so that a slow spell meets all of them."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist


class Contender(ABC):
    """One method with a model of its own."""

    name: str
    batches_a_step = 1
    """Figures are given per batch."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []

    @abstractmethod
    def step(self) -> None:
        """One optimizer step."""

    @abstractmethod
    def counted_bytes(self) -> float:
        """Bytes that the method itself says it has sent."""

    def run_block(self, steps: int, *, keep: bool) -> None:
        """Take about `steps` batches' worth of optimizer steps; `keep` their figures."""
        batches = self.batches_a_step
        steps = max(1, steps // batches)
        dist.barrier()
        sent, counted, (stolen, passed) = _sent_payload_bytes(), self.counted_bytes(), _stolen_and_all_time()
        seconds, cpu_seconds = [], []
        for _ in range(steps):
            cpu, start = time.process_time(), time.perf_counter()
            self.step()
            seconds.append((time.perf_counter() - start) / batches)
            cpu_seconds.append((time.process_time() - cpu) / batches)
        dist.barrier()
        if keep:
            stolen_now, passed_now = _stolen_and_all_time()
            self.blocks.append(
                {
                    "stolen_share": (stolen_now - stolen) / max(1, passed_now - passed),
                    "seconds": seconds,
                    "cpu_seconds": cpu_seconds,
                    "interface_bytes": (_sent_payload_bytes() - sent) / steps / batches,
                    "counted_bytes": (self.counted_bytes() - counted) / steps / batches,
                }
            )


def alternate(contenders: Sequence[Contender], *, rounds: int, steps: int, first: int) -> None:
    """`rounds` blocks of each, after one of `first` steps that does not count."""
    for contender in contenders:
        contender.run_block(first, keep=False)
    for index in range(rounds):
        for contender in contenders:
            contender.run_block(steps, keep=True)
        if dist.get_rank() == 0:
            print(f"round {index + 1} of {rounds}", flush=True)


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
