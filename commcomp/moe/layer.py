"""A complete expert-parallel layer, small."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from commcomp.moe.compressor import TokenCompressor
from commcomp.moe.dispatching import combine, dispatch, group_or_all
from commcomp.moe.experts import Experts, Gate, Routing


class MoELayer(nn.Module):
    """Each token goes through `top_k` of `num_experts` feed-forward experts, which are dealt out over ranks.

    Experts' parameters are this rank's own: keep them out of DistributedDataParallel by `local_experts_of`. Their
    gradients are divided by the number of ranks, so that a loss that is each rank's mean gives the mean over all.

    Args:
        width, hidden: of a token and inside an expert.
        capacity_factor: an expert takes at most this many times its even share of a rank's tokens, those first in time
            first; what is dropped there counts as 0. None: all.
        compressor: of this layer's tokens alone.
        group: the ranks among which the experts are dealt out; None: all. Without torch.distributed, this process.
        seed: with an expert's number it decides its weights.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        top_k: int = 2,
        *,
        capacity_factor: float | None = None,
        compressor: TokenCompressor | None = None,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        group = group_or_all(group)
        ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        if num_experts % ranks:
            raise ValueError(f"{num_experts} experts cannot be dealt out evenly over {ranks} ranks")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}; expected 1 to {num_experts}, the number of experts")
        if capacity_factor is not None and not capacity_factor > 0:
            raise ValueError(f"capacity_factor is {capacity_factor}; expected a number above 0, or None")
        local = num_experts // ranks
        self.num_experts, self.top_k, self.capacity_factor = num_experts, top_k, capacity_factor
        self._group = _Shared(group)
        self.gate = Gate(width, num_experts, top_k)
        self.experts = Experts(width, hidden, range(rank * local, (rank + 1) * local), seed, ranks)
        self.compressor = compressor

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks among which the experts are dealt out."""
        return self._group.value

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, length, width] to the same, and the load-balancing loss (scalar, 1 at balance) to add a little of."""
        batch, length, width = tokens.shape
        flat = tokens.reshape(-1, width)
        routing = self.gate(flat)
        order, counts = self._by_expert(routing, batch, length)
        token = order // self.top_k
        answers = self.through_experts(flat.index_select(0, token), counts)
        weights = routing.weights.reshape(-1).index_select(0, order).to(answers.dtype)
        made = torch.zeros_like(flat).index_add(0, token, answers * weights.unsqueeze(1))
        return made.view_as(tokens), routing.balance_loss

    def through_experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        """What the experts make of rows, [n, width] by expert, `counts` (int64 [num_experts]) of each; their order."""
        sent = dispatch(rows, counts, self.compressor, self.group)
        return combine(self.experts(sent.rows, sent.rows_per_expert), sent)

    def _by_expert(self, routing: Routing, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Choices, numbered as in `experts`, by expert and in each by position in the text; and how many of each."""
        experts = routing.experts.view(batch, length, self.top_k).transpose(0, 1)  # first positions first
        number = torch.arange(experts.numel(), device=experts.device).view(batch, length, self.top_k)
        by_time = number.transpose(0, 1).reshape(-1)
        of_choice = experts.reshape(-1)
        ordered, order = of_choice.sort(stable=True)
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=experts.device)
        counts.scatter_add_(0, of_choice, torch.ones_like(of_choice))
        order = by_time.index_select(0, order)
        if self.capacity_factor is not None:
            capacity = math.ceil(self.capacity_factor * len(order) / self.num_experts)
            place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts).index_select(0, ordered)
            order, counts = order[place < capacity], counts.clamp(max=capacity)
        return order, counts


class _Shared:
    """A process group, which a copy of a layer has in common with it: it cannot be copied itself."""

    def __init__(self, value: dist.ProcessGroup | None) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, object]) -> _Shared:
        return self


def local_experts_of(model: nn.Module) -> list[str]:
    """Names of the parameters that each rank has its own of: those of every `MoELayer`'s experts.

    `DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, local_experts_of(model))` before the
    model is wrapped.
    """
    own = {id(parameter) for layer in _layers(model) for parameter in layer.experts.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in own]


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, largest: float) -> Tensor:
    """As torch.nn.utils.clip_grad_norm_, with every rank's experts in the norm, so that all scale by the same.

    For gradients that have been averaged; a collective over each layer's group. Returns the norm, a scalar.
    """
    squares: dict[dist.ProcessGroup | None, list[Tensor]] = {}
    own: set[int] = set()
    for layer in _layers(model):
        for parameter in layer.experts.parameters():
            own.add(id(parameter))
            squares.setdefault(layer.group, []).append(_square_of(parameter))
    total = torch.stack([_square_of(one) for one in model.parameters() if id(one) not in own]).sum()
    for group, ones in squares.items():
        of_experts = torch.stack(ones).sum()
        if group is not None:
            dist.all_reduce(of_experts, group=group)
        total = total + of_experts
    norm = total.sqrt()
    nn.utils.clip_grads_with_norm_(model.parameters(), largest, norm)
    return norm


def _square_of(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    return parameter.new_zeros((), dtype=torch.float32) if gradient is None else gradient.float().square().sum()


def _layers(model: nn.Module) -> list[MoELayer]:
    return [module for module in model.modules() if isinstance(module, MoELayer)]
