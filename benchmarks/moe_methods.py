"""The ways in which benchmarks/moe.py sends tokens: ours, torch's all-to-all, and none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from commcomp.moe import LSH, MoELayer, Quantized

PLAIN, PLAIN_BF16, AT_HOME = "plain fp32", "plain bf16", "no all-to-all"
OURS: dict[str, Sequence[LSH | Quantized]] = {
    "commcomp bf16": [Quantized(dtype="bf16")],
    "commcomp int8": [Quantized(dtype="int8")],
    "commcomp int4": [Quantized(dtype="int4")],
    "commcomp clusters 0.5 int8": [LSH(rate=0.5), Quantized(dtype="int8")],
    "commcomp clusters 0.35 int8": [LSH(rate=0.35), Quantized(dtype="int8")],
    "commcomp clusters 0.75 int4": [LSH(rate=0.75), Quantized(dtype="int4")],
    "commcomp clusters 0.5 int4": [LSH(rate=0.5), Quantized(dtype="int4")],
}
METHODS = (AT_HOME, PLAIN, PLAIN_BF16, *OURS)


class PlainMoELayer(MoELayer):
    """The same layer through torch's own differentiable all-to-all, in `wire_dtype`."""

    wire_dtype = torch.float32
    rows_sent = 0

    def through_experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        ranks = dist.get_world_size()
        local = len(counts) // ranks
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts)
        both = torch.stack((counts, arriving)).view(2, ranks, local)
        sent, received = both.sum(-1).tolist()
        here = dist.get_rank()
        # Those that go there and those that go back, forward and backward.
        self.rows_sent += 2 * (sum(sent) - sent[here] + sum(received) - received[here])
        arrived = all_to_all_single_autograd(rows.to(self.wire_dtype), received, sent, dist.group.WORLD).to(rows.dtype)
        pieces = arrived.split(both[1].flatten().tolist())
        by_expert = [piece for expert in range(local) for piece in pieces[expert::local]]
        made = self.experts(torch.cat(by_expert), both[1].sum(0).tolist())
        sizes = both[1].T.flatten().tolist()
        answers = made.split(sizes)
        by_rank = torch.cat([answers[expert * ranks + rank] for rank in range(ranks) for expert in range(local)])
        back = all_to_all_single_autograd(by_rank.to(self.wire_dtype), sent, received, dist.group.WORLD)
        return back.to(rows.dtype)

    def sent_bytes(self, width: int) -> int:
        """So far, but for the numbers of rows."""
        return self.rows_sent * width * self.wire_dtype.itemsize


class PlainBf16MoELayer(PlainMoELayer):
    """Rows and their gradients are sent in bf16."""

    wire_dtype = torch.bfloat16


class AtHomeMoELayer(MoELayer):
    """As many rows through as many experts, and nothing sent: the limit. It trains another model."""

    def through_experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        local = len(counts) // dist.get_world_size()
        sizes = counts.tolist()
        pieces = rows.split(sizes)
        experts = list(self.experts.values())
        parts = [
            torch.cat([pieces[number] for number in range(place, len(pieces), local)]) for place in range(local)
        ]
        made = [expert(part) for expert, part in zip(experts, parts, strict=True)]
        back = {
            number: piece
            for place in range(local)
            for number, piece in zip(
                range(place, len(pieces), local), made[place].split(sizes[place::local]), strict=True
            )
        }
        return torch.cat([back[number] for number in range(len(pieces))])


LAYERS: dict[str, type[MoELayer]] = {PLAIN: PlainMoELayer, PLAIN_BF16: PlainBf16MoELayer, AT_HOME: AtHomeMoELayer}
"""What stands for `MoELayer` where it is not ours."""
