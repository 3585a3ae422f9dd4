"""What all exchanges have in common: sections in one flat payload, and the calls of a step."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from commcomp.compressors.wire import Section


class MeanExchange(ABC):
    """One exchange of fixed layout: `start(values, occasion)`, `advance()`, `finish()`; may be used again after that.

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
    def start(self, values: list[Tensor], occasion: str) -> None:
        """Launch the exchange of `values`, one fp32 [rows, length] block a section. Does not wait for the network.

        `values` must stay as they are until `release`. `occasion`, such as the step and a parameter, decides the random
        numbers of what rounds at random, so that training which was resumed rounds as if it had not stopped.
        """

    def advance(self) -> None:  # noqa: B027
        """Launch what depends on the first collective, after waiting for it; nothing where there is only one."""

    @abstractmethod
    def share(self, index: int) -> Tensor:
        """After `advance`: what this rank delivered of section `index`, fp32 [rows, length]."""

    def subtract_share(self, index: int, total: Tensor, out: Tensor) -> None:
        """out = total - share(index), to the bit; perhaps the same memory. Shaped as the values of section `index`."""
        torch.sub(total, self.share(index), out=out)

    @abstractmethod
    def finish(self) -> list[Tensor]:
        """After `advance`: wait and return the means, fp32 [rows, length] each; bit-identical on all ranks."""

    @abstractmethod
    def release(self) -> None:
        """Let go of this exchange's tensors; `share` is gone then."""

    def _encode(self, out: Tensor, values: list[Tensor], sections: list[Section], occasion: str) -> None:
        # A mean is rounded with other numbers than what it was made of: else its rounding would not be fair.
        encode(out, values, sections, rounding_generator(sections, out.device, f"{type(self).__name__} {occasion}"))


@dataclass(frozen=True)
class Share:
    """What this rank delivered of one section of an exchange, for as long as that is not released."""

    exchange: MeanExchange
    index: int

    def decoded(self) -> Tensor:
        """fp32, shaped as the section's values."""
        return self.exchange.share(self.index)

    def subtract_from(self, total: Tensor, out: Tensor) -> None:
        """out = total - decoded(), to the bit, without forming it where that can be; perhaps the same memory."""
        self.exchange.subtract_share(self.index, total, out)


def rounding_generator(sections: list[Section], device: torch.device, occasion: str) -> torch.Generator | None:
    """For sections of which any rounds at random: other numbers on every rank and on every `occasion`; else None."""
    if not any(section.format.random for section in sections):
        return None
    return torch.Generator(device).manual_seed(zlib.crc32(f"{occasion} {dist.get_rank()}".encode()))


def encode(out: Tensor, values: list[Tensor], sections: list[Section], generator: torch.Generator | None) -> None:
    """Put one block of values a section, fp32 [..., rows, length], into a payload, uint8 [..., bytes of all]."""
    for block, (section, piece) in zip(values, pieces(out, sections), strict=True):
        section.encode_into(piece, block, generator)


def encoded_bytes(sections: list[Section]) -> int:
    """Bytes of all sections, one after another."""
    return sum(section.encoded_bytes() for section in sections)


def pieces(data: Tensor, sections: list[Section]) -> Iterator[tuple[Section, Tensor]]:
    """Each section with its bytes in `data`, uint8 [..., bytes of all]."""
    start = 0
    for section in sections:
        size = section.encoded_bytes()
        yield section, data[..., start : start + size]
        start += size


def decode(data: Tensor, sections: list[Section]) -> list[Tensor]:
    """Every section of a payload, uint8 [..., bytes of all]."""
    return [section.decode(piece) for section, piece in pieces(data, sections)]


def subtract_one(data: Tensor, sections: list[Section], index: int, total: Tensor, out: Tensor) -> None:
    """out = total - section `index` of a payload."""
    section, piece = list(pieces(data, sections))[index]
    section.subtract_decoded(out, total, piece)


def decode_one(data: Tensor, sections: list[Section], index: int) -> Tensor:
    """Section `index` of a payload."""
    section, piece = list(pieces(data, sections))[index]
    return section.decode(piece)


def decode_mean(data: Tensor, sections: list[Section]) -> list[Tensor]:
    """The mean of N payloads, uint8 [N, bytes of all], by section."""
    return [section.decode_mean(piece) for section, piece in pieces(data, sections)]
