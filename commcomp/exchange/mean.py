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

Every rank can tell what it really delivered: `shares()`, the mean of which over ranks is the result exactly. In
two-shot the owner of a slice rounds the mean once more and takes that error on its own account.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from commcomp.compressors.wire import Section, decode, decode_mean, encode_into


class MeanExchange(ABC):
    """One exchange of fixed layout: `start(values)`, `advance()`, `finish()`; may be used again after that.

    All ranks of `group` must make the calls on their exchanges in the same order.
    """

    def __init__(self, sections: list[Section], group: dist.ProcessGroup) -> None:
        self.sections = sections
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        self.payload_bytes = 0
        """Bytes that one exchange hands to collectives on this rank."""
        self.wire_bytes = 0
        """Bytes that this rank sends on the network for it, headers of the transport left out."""

    @abstractmethod
    def start(self, values: list[Tensor]) -> None:
        """Launch the exchange of `values`, one fp32 [rows, length] block a section. Does not wait for the network.

        `values` must stay as they are until `release`.
        """

    def advance(self) -> None:  # noqa: B027
        """Launch what depends on the first collective, after waiting for it; nothing where there is only one."""

    @abstractmethod
    def shares(self) -> list[Tensor]:
        """After `advance`: what this rank delivered, fp32 [rows, length] each."""

    @abstractmethod
    def finish(self) -> list[Tensor]:
        """After `advance`: wait and return the means, fp32 [rows, length] each; bit-identical on all ranks."""

    @abstractmethod
    def release(self) -> None:
        """Let go of this exchange's tensors; `shares` is gone then."""


def make_exchange(sections: list[Section], group: dist.ProcessGroup, *, in_place: bool = False) -> MeanExchange:
    """The cheapest exchange for these sections on this group; `in_place` allows it to overwrite a single section."""
    if all(section.dtype == "fp32" for section in sections):
        return AllReduceMean(sections, group, in_place=in_place)
    return GatherMean(sections, group) if dist.get_world_size(group) <= 2 else TwoShotMean(sections, group)


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

    def start(self, values: list[Tensor]) -> None:
        self._values = values
        self._flat = values[0].view(-1) if self._in_place else torch.cat([block.reshape(-1) for block in values])
        self._work = None
        if self.num_ranks > 1:
            self._flat /= self.num_ranks  # before the sum, as DDP does, so that it cannot overflow
            self._work = dist.all_reduce(self._flat, group=self.group, async_op=True)

    def shares(self) -> list[Tensor]:
        return self._values

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
        self._lengths = [section.length for section in sections]
        self.payload_bytes = sum(section.encoded_bytes() for section in sections)
        self.wire_bytes = (self.num_ranks - 1) * self.payload_bytes

    def start(self, values: list[Tensor]) -> None:
        self._payload = values[0].new_empty(self.payload_bytes, dtype=torch.uint8)
        _encode_all(self._payload, values, self.sections, self._lengths)
        self._gathered = self._payload.new_empty(self.num_ranks, self.payload_bytes)
        self._work = _all_gather(self._gathered, self._payload, self.group) if self.num_ranks > 1 else None

    def shares(self) -> list[Tensor]:
        return _decode_all(self._payload, self.sections, self._lengths)

    def finish(self) -> list[Tensor]:
        if self._work is None:
            return self.shares()
        self._work.wait()
        return _decode_all(self._gathered, self.sections, self._lengths, decode_mean)

    def release(self) -> None:
        del self._payload, self._gathered, self._work


class TwoShotMean(MeanExchange):
    """Each rank owns a slice of every row: all-to-all to the owners, exact mean in fp32, encoded all-gather back."""

    def __init__(self, sections: list[Section], group: dist.ProcessGroup) -> None:
        super().__init__(sections, group)
        self._rank = dist.get_rank(group)
        self._slices = [-(-section.length // self.num_ranks) for section in sections]
        pairs = zip(sections, self._slices, strict=True)
        self._slice_bytes = sum(section.encoded_bytes(length) for section, length in pairs)
        self.payload_bytes = self.num_ranks * self._slice_bytes + self._slice_bytes
        self.wire_bytes = 2 * (self.num_ranks - 1) * self._slice_bytes

    def start(self, values: list[Tensor]) -> None:
        outgoing = values[0].new_empty(self.num_ranks, self._slice_bytes, dtype=torch.uint8)
        by_owner = [self._by_owner(block, length) for block, length in zip(values, self._slices, strict=True)]
        _encode_all(outgoing, by_owner, self.sections, self._slices)
        self._outgoing, self._incoming = outgoing, torch.empty_like(outgoing)
        self._work = dist.all_to_all_single(self._incoming, outgoing, group=self.group, async_op=True)

    def advance(self) -> None:
        self._work.wait()
        self._exact = _decode_all(self._incoming, self.sections, self._slices, decode_mean)
        self._encoded = self._outgoing.new_empty(self._slice_bytes)
        _encode_all(self._encoded, self._exact, self.sections, self._slices)
        self._gathered = torch.empty_like(self._incoming)
        self._work = _all_gather(self._gathered, self._encoded, self.group)

    def shares(self) -> list[Tensor]:
        own = self._decode(self._outgoing)
        for block, before, after in zip(own, self._exact, self._decode(self._encoded), strict=True):
            block[self._rank] += self.num_ranks * (after - before)
        return self._from_owners(own)

    def finish(self) -> list[Tensor]:
        self._work.wait()
        return self._from_owners(self._decode(self._gathered))

    def release(self) -> None:
        del self._outgoing, self._incoming, self._exact, self._encoded, self._gathered, self._work

    def _decode(self, data: Tensor) -> list[Tensor]:
        return _decode_all(data, self.sections, self._slices)

    def _by_owner(self, values: Tensor, slice_length: int) -> Tensor:
        """[rows, length] to [owners, rows, slice], the last slice padded with zeros."""
        rows, length = values.shape
        padding = self.num_ranks * slice_length - length
        padded = torch.nn.functional.pad(values, (0, padding)) if padding else values
        return padded.view(rows, self.num_ranks, slice_length).transpose(0, 1)

    def _from_owners(self, blocks: list[Tensor]) -> list[Tensor]:
        return [
            block.transpose(0, 1).flatten(1)[:, : section.length]
            for block, section in zip(blocks, self.sections, strict=True)
        ]


def _all_gather(out: Tensor, own: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Start gathering `own`, [bytes], from all ranks into `out`, [ranks, bytes]."""
    return dist.all_gather_single(out.view(-1), own, group=group, async_op=True)


def _encode_all(out: Tensor, values: list[Tensor], sections: list[Section], lengths: list[int]) -> None:
    start = 0
    for block, section, length in zip(values, sections, lengths, strict=True):
        size = section.encoded_bytes(length)
        encode_into(out[..., start : start + size], block, section.dtype)
        start += size


def _decode_all(
    data: Tensor, sections: list[Section], lengths: list[int], how: Callable[[Tensor, int, int, str], Tensor] = decode
) -> list[Tensor]:
    blocks, start = [], 0
    for section, length in zip(sections, lengths, strict=True):
        size = section.encoded_bytes(length)
        blocks.append(how(data[..., start : start + size], section.rows, length, section.dtype))
        start += size
    return blocks
