"""The mean over ranks of a list of value blocks, each in its own number format, in one flat exchange.

Three patterns, chosen by the formats and the number of ranks N (B = bytes of one rank's payload):

| pattern    | when                     | collectives              | bytes a rank sends |
|------------|--------------------------|--------------------------|--------------------|
| all-reduce | every section fp32       | all-reduce               | 2 (N-1)/N B        |
| gather     | a narrower format, N = 2 | all-gather               | (N-1) B            |
| two-shot   | a narrower format, N > 2 | all-to-all, all-gather   | 2 (N-1)/N B        |

A sum of int8 or 16-bit values inside the collective would overflow, round differently on every hop, or (bf16 on gloo)
abort. So narrow formats cross as bytes and are summed in fp32 where they arrive, in rank order: every rank decodes the
same bits. Gather needs one hop and no second rounding; from three ranks on, two-shot sends less.

Every rank can tell what it really delivered: `share()`, the mean of which over ranks is the result exactly. In
two-shot the owner of a slice rounds the mean once more and takes that error on its own account.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from commcomp.compressors.wire import FP32, Section
from commcomp.exchange.exchange import MeanExchange, decode, decode_mean, decode_one, encoded_bytes, subtract_one
from commcomp.exchange.owner import OwnerMean
from commcomp.exchange.transfer import all_gather


def make_exchange(sections: list[Section], group: dist.ProcessGroup, *, in_place: bool = False) -> MeanExchange:
    """The cheapest exchange for these sections on this group; `in_place` allows it to overwrite a single section."""
    if all(section.format == FP32 for section in sections):
        return AllReduceMean(sections, group, in_place=in_place)
    return min(GatherMean(sections, group), TwoShotMean(sections, group), key=lambda exchange: exchange.wire_bytes)


def sent_bytes(section: Section, num_ranks: int) -> int:
    """Bytes that a rank sends on the network for the mean of one section on all ranks, if it goes alone."""
    if section.format == FP32:
        return ring_bytes(section.encoded_bytes(), num_ranks)
    owned = section.of_length(-(-section.length // num_ranks))
    two_shot = owned.encoded_bytes() + owned.of_mean(num_ranks).encoded_bytes()
    return (num_ranks - 1) * min(section.encoded_bytes(), two_shot)


def ring_bytes(payload_bytes: int, num_ranks: int) -> int:
    """Bytes that each rank sends in a ring all-reduce of `payload_bytes`: 2 (N-1)/N of them."""
    return 2 * (num_ranks - 1) * payload_bytes // num_ranks


class AllReduceMean(MeanExchange):
    """Native all-reduce of fp32 values; a single section is reduced in place if `in_place`, without a copy."""

    def __init__(self, sections: list[Section], group: dist.ProcessGroup, *, in_place: bool = False) -> None:
        super().__init__(sections, group)
        self._in_place = in_place and len(sections) == 1
        self.payload_bytes = 4 * sum(section.rows * section.length for section in sections)
        self.wire_bytes = ring_bytes(self.payload_bytes, self.num_ranks)

    def start(self, values: list[Tensor], occasion: str) -> None:
        self._values = values
        self._flat = values[0].view(-1) if self._in_place else torch.cat([block.reshape(-1) for block in values])
        self._work = None
        if self.num_ranks > 1:
            self._flat /= self.num_ranks  # before the sum, as DDP does, so that it cannot overflow
            self._work = dist.all_reduce(self._flat, group=self.group, async_op=True)

    def share(self, index: int) -> Tensor:
        return self._values[index]

    def release(self) -> None:
        self._values = []

    def finish(self) -> list[Tensor]:
        if self._work is not None:
            self._work.wait()
        flat = self._flat
        del self._flat, self._work
        sizes = [section.rows * section.length for section in self.sections]
        return [
            part.view(section.rows, section.length)
            for part, section in zip(flat.split(sizes), self.sections, strict=True)
        ]


class GatherMean(MeanExchange):
    """All-gather of every rank's encoded payload; each rank decodes and averages all of them."""

    def __init__(self, sections: list[Section], group: dist.ProcessGroup) -> None:
        super().__init__(sections, group)
        self.payload_bytes = encoded_bytes(sections)
        self.wire_bytes = (self.num_ranks - 1) * self.payload_bytes

    def start(self, values: list[Tensor], occasion: str) -> None:
        self._payload = values[0].new_empty(self.payload_bytes, dtype=torch.uint8)
        self._encode(self._payload, values, self.sections, occasion)
        self._gathered = self._payload.new_empty(self.num_ranks, self.payload_bytes)
        self._work = all_gather(self._gathered, self._payload, self.group) if self.num_ranks > 1 else None

    def share(self, index: int) -> Tensor:
        return decode_one(self._payload, self.sections, index)

    def subtract_share(self, index: int, total: Tensor, out: Tensor) -> None:
        subtract_one(self._payload, self.sections, index, total, out)

    def finish(self) -> list[Tensor]:
        if self._work is None:
            return decode(self._payload, self.sections)
        self._work.wait()
        return decode_mean(self._gathered, self.sections)

    def release(self) -> None:
        del self._payload, self._gathered, self._work


class TwoShotMean(MeanExchange):
    """Each rank owns a slice of every row: mean at the owner (`OwnerMean`), encoded all-gather back."""

    def __init__(self, sections: list[Section], group: dist.ProcessGroup) -> None:
        super().__init__(sections, group)
        self._rank = dist.get_rank(group)
        self._slices = [section.of_length(-(-section.length // self.num_ranks)) for section in sections]
        self._means = [section.of_mean(self.num_ranks) for section in self._slices]
        self._to_owners = OwnerMean(self._slices, group)
        self._mean_bytes = encoded_bytes(self._means)
        self.payload_bytes = self._to_owners.payload_bytes + self._mean_bytes
        self.wire_bytes = self._to_owners.wire_bytes + (self.num_ranks - 1) * self._mean_bytes

    def start(self, values: list[Tensor], occasion: str) -> None:
        pairs = zip(values, self._slices, strict=True)
        self._occasion = occasion
        self._to_owners.start([self._by_owner(block, owned.length) for block, owned in pairs], occasion)

    def advance(self) -> None:
        self._exact = self._to_owners.finish()
        self._encoded = self._exact[0].new_empty(self._mean_bytes, dtype=torch.uint8)
        self._encode(self._encoded, self._exact, self._means, self._occasion)
        self._gathered = self._encoded.new_empty(self.num_ranks, self._mean_bytes)
        self._work = all_gather(self._gathered, self._encoded, self.group)

    def share(self, index: int) -> Tensor:
        own = self._to_owners.share(index)
        own[self._rank] += self._own_account(index)
        return self._from_owners(own, index)

    def subtract_share(self, index: int, total: Tensor, out: Tensor) -> None:
        width, length = self._slices[index].length, self.sections[index].length
        for owner, start in enumerate(range(0, length, width)):
            part = slice(start, min(start + width, length))
            place = owner, index, total[:, part], out[:, part]
            if owner != self._rank and part.stop - start == width:
                self._to_owners.subtract_share_of(*place)
            else:
                self._subtract_decoded(*place)

    def _subtract_decoded(self, owner: int, index: int, total: Tensor, out: Tensor) -> None:
        """For a slice that is padded, or on which this rank takes the error of the second rounding."""
        delivered = self._to_owners.share_of(owner, index)
        if owner == self._rank:
            delivered += self._own_account(index)
        torch.sub(total, delivered[:, : total.shape[1]], out=out)

    def _own_account(self, index: int) -> Tensor:
        """What rounding the mean of this rank's slice once more has added to it, on all ranks together."""
        after = decode_one(self._encoded, self._means, index)
        return self.num_ranks * (after - self._exact[index])

    def finish(self) -> list[Tensor]:
        self._work.wait()
        blocks = decode(self._gathered, self._means)
        return [self._from_owners(block, index) for index, block in enumerate(blocks)]

    def release(self) -> None:
        self._to_owners.release()
        del self._exact, self._encoded, self._gathered, self._work

    def _by_owner(self, values: Tensor, slice_length: int) -> Tensor:
        """[rows, length] to [owners, rows, slice], the last slice padded with zeros."""
        rows, length = values.shape
        padding = self.num_ranks * slice_length - length
        padded = torch.nn.functional.pad(values, (0, padding)) if padding else values
        return padded.view(rows, self.num_ranks, slice_length).transpose(0, 1)

    def _from_owners(self, blocks: Tensor, index: int) -> Tensor:
        """[owners, rows, slice] to [rows, length] of section `index`."""
        return blocks.transpose(0, 1).flatten(1)[:, : self.sections[index].length]
