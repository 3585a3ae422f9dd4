"""The mean of blocks of values at the rank that owns them: one hop, each rank gets its own block only (FSDP).

Values cross as bytes in an all-to-all and are summed in fp32 at the owner, in rank order; where all are fp32 and the
backend has a real one, a reduce-scatter does it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from commcomp.compressors.wire import FP32, Section
from commcomp.exchange.exchange import MeanExchange, decode_mean, decode_one, encoded_bytes, subtract_one
from commcomp.exchange.transfer import all_to_all


def make_owner_exchange(sections: list[Section], group: dist.ProcessGroup, device: torch.device) -> MeanExchange:
    """The cheapest exchange of sections of which each rank needs its own block only (see `OwnerMean`)."""
    # On CPUs gloo's own reduce-scatter sends as many bytes as an all-reduce, twice what it would have to.
    if device.type != "cpu" and all(section.format == FP32 for section in sections):
        return ReduceScatterMean(sections, group)
    return OwnerMean(sections, group)


class OwnerMean(MeanExchange):
    """Each rank owns one block of every section: all-to-all to the owners, exact mean in fp32 there.

    The blocks of one owner are what `sections` describe. Values and shares are fp32 [ranks, rows, length], one block an
    owner; `finish` gives this rank's own block of the mean, [rows, length].
    """

    def __init__(self, sections: list[Section], group: dist.ProcessGroup) -> None:
        super().__init__(sections, group)
        self._block_bytes = encoded_bytes(sections)
        self.payload_bytes = self.num_ranks * self._block_bytes
        self.wire_bytes = (self.num_ranks - 1) * self._block_bytes

    def start(self, values: list[Tensor], occasion: str) -> None:
        outgoing = values[0].new_empty(self.num_ranks, self._block_bytes, dtype=torch.uint8)
        self._encode(outgoing, values, self.sections, occasion)
        self._outgoing, self._incoming = outgoing, torch.empty_like(outgoing)
        self._work = all_to_all(self._incoming, outgoing, self.group)

    def share(self, index: int) -> Tensor:
        return decode_one(self._outgoing, self.sections, index)

    def subtract_share(self, index: int, total: Tensor, out: Tensor) -> None:
        subtract_one(self._outgoing, self.sections, index, total, out)

    def share_of(self, owner: int, index: int) -> Tensor:
        """`share` for one owner's block, [rows, length]."""
        return decode_one(self._outgoing[owner], self.sections, index)

    def subtract_share_of(self, owner: int, index: int, total: Tensor, out: Tensor) -> None:
        """`subtract_share` for one owner's block: `total` and `out` are [rows, length]."""
        subtract_one(self._outgoing[owner], self.sections, index, total, out)

    def finish(self) -> list[Tensor]:
        self._work.wait()
        return decode_mean(self._incoming, self.sections)

    def release(self) -> None:
        del self._outgoing, self._incoming, self._work


class ReduceScatterMean(MeanExchange):
    """Native reduce-scatter of fp32 values; sections, values and results as in `OwnerMean`."""

    def __init__(self, sections: list[Section], group: dist.ProcessGroup) -> None:
        super().__init__(sections, group)
        self._sizes = [section.rows * section.length for section in sections]
        self.payload_bytes = 4 * self.num_ranks * sum(self._sizes)
        self.wire_bytes = 4 * (self.num_ranks - 1) * sum(self._sizes)

    def start(self, values: list[Tensor], occasion: str) -> None:
        self._values = values
        flat = torch.cat([block.flatten(1) for block in values], dim=1)
        flat /= self.num_ranks  # before the sum, so that it cannot overflow
        self._own = flat.new_empty(flat.shape[1])
        self._work = dist.reduce_scatter_single(self._own, flat.view(-1), group=self.group, async_op=True)

    def share(self, index: int) -> Tensor:
        return self._values[index]

    def finish(self) -> list[Tensor]:
        self._work.wait()
        parts = zip(self._own.split(self._sizes), self.sections, strict=True)
        return [part.view(section.rows, section.length) for part, section in parts]

    def release(self) -> None:
        del self._values, self._own, self._work
