"""The forward pass of one of DeepSpeed's MoE layers with compressed tokens.

The pass stays DeepSpeed's own, from the gate to the weighted sum: what it finds by the name `_AllToAll` is another.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe import sharded_moe
from torch import Tensor, nn

from commcomp.complaint import warn
from commcomp.moe import Dispatched, MoEConfig, TokenCompressor, combine, dispatch


class CompressedForward:
    """Stands for `forward` of one `deepspeed.moe.sharded_moe.MOELayer`, an attribute of that object alone.

    In evaluation it is DeepSpeed's own pass, unless inside `commcomp.moe.compressing(model)`.
    """

    def __init__(self, layer: Any, config: MoEConfig) -> None:
        self.layer, self.config = layer, config
        self.compressor = TokenCompressor.from_config(config).train(layer.training)
        self.compressor.register_load_state_dict_pre_hook(_learn_anew_if_absent)
        self.plain_bytes = 0

    @torch.compiler.disable  # an engine that is compiled leaves this layer out: how many rows go is not known before
    def __call__(self, *input: Tensor, **kwargs: Any) -> Tensor:
        theirs = sharded_moe.MOELayer.forward
        if not self.compressor.active:
            return theirs(self.layer, *input, **kwargs)
        crossing = Crossing(self)
        names = {**theirs.__globals__, "_AllToAll": crossing}
        ours = FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__, theirs.__closure__)
        with self.layer.gate.register_forward_hook(crossing.note_routes):
            return ours(self.layer, *input, **kwargs)

    def count_plain(self, padded: Tensor, ranks: int) -> None:
        """What DeepSpeed's all-to-all would send of `padded`, [experts, capacity, width], and of its gradient."""
        size = padded.numel() * padded.element_size() * (ranks - 1) // ranks

        def add(_: object = None) -> None:
            self.plain_bytes += size

        add()
        if padded.requires_grad:
            padded.register_hook(add)

    def stats(self) -> dict[str, Any]:
        """As `TokenCompressor.stats()`, with `plain_bytes` and the `ratio` plain_bytes / wire_bytes."""
        made = self.compressor.stats()
        wire = made["wire_bytes"]
        return {**made, "plain_bytes": self.plain_bytes, "ratio": self.plain_bytes / wire if wire else None}


class Crossing:
    """Stands for `sharded_moe._AllToAll` during one forward pass: to the experts first, then back.

    Of the [experts, capacity, width] that DeepSpeed sends, the places that the gate gave to no token stay here.
    """

    def __init__(self, owner: CompressedForward) -> None:
        self._owner = owner
        self._routes: tuple[Tensor, Tensor] | None = None
        self._sent: Dispatched | None = None

    def note_routes(self, gate: nn.Module, _: Any, output: Any) -> None:
        """A forward hook of the gate. Raises TypeError where it makes something else than DeepSpeed's TopKGate."""
        self._routes = _routes_of(gate, output)

    def apply(self, group: dist.ProcessGroup, rows: Tensor) -> Tensor:
        """[experts, capacity, width] by expert to as many rows, or fewer, for each by the rank they come from, [ranks x
        experts here, most rows of one expert and rank, width]; at the second call the way back."""
        if self._sent is None:
            return self._to_experts(group, rows)
        return self._from_experts(group, rows)

    def _to_experts(self, group: dist.ProcessGroup, tokens: Tensor) -> Tensor:
        experts, capacity, width = self._shape = tokens.shape
        ranks = dist.get_world_size(group)
        self._owner.count_plain(tokens, ranks)
        self._places, counts = self._taken(experts, capacity)
        rows = tokens.reshape(-1, width).index_select(0, self._places)
        self._sent = dispatch(rows, counts, self._owner.compressor, group)
        received = self._sent.way_back.route.received
        most = max(1, *(max(counts) for counts in received))  # reshape(..., -1, width) needs one row
        self._places_here = _places(received, most).to(rows.device)
        padded = rows.new_zeros(len(received) * len(received[0]) * most, width)
        return padded.index_copy(0, self._places_here, self._sent.rows).view(-1, most, width)

    def _from_experts(self, group: dist.ProcessGroup, answers: Tensor) -> Tensor:
        assert self._sent is not None
        experts, capacity, _ = self._shape
        width = answers.shape[-1]
        rows = combine(answers.reshape(-1, width).index_select(0, self._places_here), self._sent).to(answers.dtype)
        padded = rows.new_zeros(experts * capacity, width).index_copy(0, self._places, rows)
        self._owner.count_plain(padded, dist.get_world_size(group))
        return padded.view(experts, capacity, width)

    def _taken(self, experts: int, capacity: int) -> tuple[Tensor, Tensor]:
        """Where tokens lie in [experts x capacity], by expert and in each in the order of tokens: int64 [n]; and the
        number of each expert's, int64 [experts].

        DeepSpeed's own order, for k=2, is that of tokens of a first choice and behind them those of a second: rows of
        earlier tokens would then follow those of later ones.
        """
        assert self._routes is not None
        indices, locations = self._routes
        kept = (indices.reshape(-1) >= 0).nonzero().squeeze(1)
        expert = indices.reshape(-1).index_select(0, kept).long()
        token = kept % indices.shape[1]
        order = (expert * indices.shape[1] + token).argsort(stable=True)
        places = expert * capacity + locations.reshape(-1).index_select(0, kept).long()
        counts = expert.new_zeros(experts).scatter_add_(0, expert, torch.ones_like(expert))
        return places.index_select(0, order), counts


def _routes_of(gate: nn.Module, output: Any) -> tuple[Tensor, Tensor]:
    """(indices, locations), [k, tokens]: the expert of each choice, -1 where it is dropped, and its place there."""
    fits = isinstance(output, tuple) and len(output) == 7 and all(isinstance(one, Tensor) for one in output[3:5])
    if not fits or output[3].dim() != 2 or output[3].shape != output[4].shape or output[3].is_floating_point():
        shown = [tuple(one.shape) if isinstance(one, Tensor) else one for one in output]
        raise TypeError(
            f"{type(gate).__name__} made {shown}; expected (loss, capacity, experts, indices [k, tokens], locations "
            "[k, tokens], gates, counts) as deepspeed.moe.sharded_moe.TopKGate does; leave the block moe out of the "
            "configuration for other gates"
        )
    return output[3], output[4]


def _places(received: Any, most: int) -> Tensor:
    """Where rows by expert, and in each by rank, lie in [ranks, experts, most]. `received`: [ranks][experts]."""
    counts = torch.tensor(received)
    ranks, experts = counts.shape
    starts = (most * torch.arange(ranks * experts)).view(ranks, experts).T.reshape(-1)
    counts = counts.T.reshape(-1)
    before = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return starts.repeat_interleave(counts) + torch.arange(len(before)) - before


def _learn_anew_if_absent(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Checkpoints of runs without compression can be gone on from."""
    key = prefix + "_extra_state"
    if key not in state_dict:
        warn(f"the state dict has no {key}; what is known of that layer's tokens is kept, at first nothing")
        state_dict[key] = module.get_extra_state()
