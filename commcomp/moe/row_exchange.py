"""Rows to the ranks of their experts and back, in any number format, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from commcomp.compressors.wire import Format, Section
from commcomp.exchange.transfer import all_to_all_uneven

_NOTE_BYTES = 8
"""A rank's word to each other rank behind its rows; so many bytes that the next block begins where any dtype may."""


@dataclass
class Traffic:
    """What this rank handed to all-to-alls; its own rows are not among them."""

    wire_bytes: int = 0
    """Bytes sent, the numbers of rows among them."""
    dense_bytes: int = 0
    """What the same tokens take in fp32, uncompressed."""


@dataclass(frozen=True)
class Route:
    """Who sends how many rows to whom. Experts are numbered through over the ranks of `group`, equally many on each."""

    group: dist.ProcessGroup | None
    """None: this process alone."""
    sent: Sequence[Sequence[int]]
    """[ranks][experts of a rank]: rows that go from here."""
    received: Sequence[Sequence[int]]
    """[ranks][experts of a rank]: rows that come from there."""
    forward_format: Format | None
    """Of rows; None: as they are."""
    backward_format: Format | None
    """Of gradients."""
    tokens_sent: Sequence[int]
    """[ranks]: tokens that the rows in `sent` stand for."""
    tokens_received: Sequence[int]
    """[ranks]: the same of `received`."""
    traffic: Traffic
    mark: int = 0
    """Made of all ranks' numbers of rows, the same on every rank: tells passes apart."""

    @property
    def rows_per_expert(self) -> list[int]:
        """Rows that each expert of this rank gets from all ranks."""
        return [sum(counts) for counts in zip(*self.received, strict=True)]

    def to_experts(self, rows: Tensor, format: Format | None) -> Tensor:
        """Rows in the order of all experts, to rows in the order of this rank's experts, and in each of the ranks."""
        self._count(self.tokens_sent, rows.shape[1])
        arrived, _ = self._exchange(rows.split(_totals(self.sent)), self.sent, self.received, format)
        parts = [piece.split(list(counts)) for piece, counts in zip(arrived, self.received, strict=True)]
        return torch.cat([part for of_expert in zip(*parts, strict=True) for part in of_expert])

    def from_experts(self, rows: Tensor, format: Format | None) -> Tensor:
        """The inverse of `to_experts`."""
        return self.from_experts_with_note(rows, format, None)[0]

    def from_experts_with_note(self, rows: Tensor, format: Format | None, note: bool | None) -> tuple[Tensor, bool]:
        """And whether any rank notes True, in the same messages; None on all ranks: nothing is noted."""
        self._count(self.tokens_received, rows.shape[1])
        by_expert = iter(rows.split([count for counts in zip(*self.received, strict=True) for count in counts]))
        parts = [[next(by_expert) for _ in self.received] for _ in self.received[0]]
        pieces = [torch.cat(of_rank) for of_rank in zip(*parts, strict=True)]
        arrived, notes = self._exchange(pieces, self.received, self.sent, format, note)
        # Where this rank notes True, the host need not wait for what others do.
        return torch.cat(arrived), note or (note is not None and any(bool(one.any()) for one in notes))

    def _count(self, tokens: Sequence[int], width: int) -> None:
        if self.group is not None:
            self.traffic.dense_bytes += 4 * width * (sum(tokens) - tokens[dist.get_rank(self.group)])

    def _exchange(
        self,
        pieces: Sequence[Tensor],
        sent: Sequence[Sequence[int]],
        received: Sequence[Sequence[int]],
        format: Format | None,
        note: bool | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The rows that have arrived from each rank, and the notes behind them."""
        example = pieces[0]
        width, dtype, device = example.shape[1], example.dtype, example.device
        if format is None and self.group is None:
            return list(pieces), []
        behind = 0 if note is None else _NOTE_BYTES
        sizes, out_sizes = (
            [_bytes(rows, example, format) + behind for rows in _totals(counts)] for counts in (sent, received)
        )
        out = torch.empty(sum(out_sizes), dtype=torch.uint8, device=device)
        data = out if self.group is None else torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        for piece, whole in zip(pieces, data.split(sizes), strict=True):
            place, behind_it = whole.split([len(whole) - behind, behind])
            behind_it.fill_(bool(note))
            if format is None:
                place.view(dtype).copy_(piece.reshape(-1))
            else:
                Section(len(piece), width, format).encode_into(place, piece.float().contiguous())
        if self.group is not None:
            rank = dist.get_rank(self.group)
            self.traffic.wire_bytes += sum(sizes) - sizes[rank]
            all_to_all_uneven(out, out_sizes, data, sizes, self.group).wait()
        parts = [whole.split([len(whole) - behind, behind]) for whole in out.split(out_sizes)]
        notes = [note for _, note in parts]
        places = [(place, rows) for (place, _), rows in zip(parts, _totals(received), strict=True)]
        if format is None:
            return [place.view(dtype).view(rows, width) for place, rows in places], notes
        return [Section(rows, width, format).decode(place).to(dtype) for place, rows in places], notes


class ToExperts(torch.autograd.Function):
    """`Route.to_experts`. What it returns beside, an empty tensor, goes into `FromExperts`: so that both backward
    passes run on every rank and in the same order, whatever becomes of rows that a rank did not get.

    Both save a tensor and ask for it first: activation checkpointing then repeats them at one place on every rank.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route) -> tuple[Tensor, Tensor]:
        _keep(ctx, route)
        return route.to_experts(rows, route.forward_format), rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        route = _kept(ctx)
        return route.from_experts(gradient, route.backward_format), None


class FromExperts(torch.autograd.Function):
    """`Route.from_experts`. `learn`, where the rows that were dispatched have no gradient: whether this rank's answers
    have one. If no rank's have, what comes back has none; else it has one on every rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tie: Tensor, route: Route, learn: bool | None) -> Tensor:
        _keep(ctx, route)
        answers, learnt_somewhere = route.from_experts_with_note(rows, route.forward_format, learn)
        if learn is not None and not learnt_somewhere:
            ctx.mark_non_differentiable(answers)
        return answers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        route = _kept(ctx)
        return route.to_experts(gradient, route.backward_format), gradient.new_empty(0), None, None


def _keep(ctx: Any, route: Route) -> None:
    ctx.route = route
    ctx.save_for_backward(torch.tensor(route.mark, device="cpu"))


def _kept(ctx: Any) -> Route:
    """Raises RuntimeError, on every rank, where activation checkpointing has repeated the pass in another way."""
    route: Route = ctx.route
    (mark,) = ctx.saved_tensors
    if int(mark) != route.mark:
        raise RuntimeError(
            "activation checkpointing repeated a pass with other clusters of tokens; with moe.LSH each backward pass "
            "must come before the layer's next forward pass"
        )
    return route


def _totals(counts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(of_rank) for of_rank in counts]


def _bytes(rows: int, example: Tensor, format: Format | None) -> int:
    if format is None:
        return rows * example.shape[1] * example.element_size()
    return format.encoded_bytes(rows, example.shape[1])
