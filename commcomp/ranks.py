"""The ranks that one `GradientSync` averages over: their process groups, and what they must agree on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commcomp.exchange.agreement import SAME_ARGUMENTS, require_agreement_of_all
from commcomp.exchange.group import make_exchange_group
from commcomp.exchange.vote import FiniteVote


class Ranks:
    """Groups of our own where a device needs them; a collective over `parent` (None: all ranks).

    On CUDA every collective is launched from the hook in its order, as DDP's own would be, so the model's group serves
    (a second NCCL communicator could deadlock with it). Elsewhere a worker thread launches them, and needs a group for
    itself: `given`, or one made here.

    Args:
        other_shards: with replicas, the ranks that hold the other shards of this rank's replica.
    """

    def __init__(
        self,
        parent: dist.ProcessGroup | None,
        device: torch.device,
        other_shards: dist.ProcessGroup | None,
        given: dist.ProcessGroup | None = None,
    ) -> None:
        self.device = device
        self._alone = device.type != "cuda"
        self.group = given or make_exchange_group(parent, alone=self._alone)
        """Ranks that exchange gradients with this one: with replicas, the same shard of each."""
        self._made = [self.group] if self._alone and given is None else []
        self._shards = other_shards
        self.num_ranks, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)

    def agree(
        self, facts: Mapping[str, Any], of_replicas: Mapping[str, Any] | None = None, remedy: str = SAME_ARGUMENTS
    ) -> None:
        """ValueError on every rank unless `facts` are the same on all; `of_replicas` only need be in `group`."""
        facts_by_group = [({**facts, **(of_replicas or {})}, self.group)]
        if self._shards is not None:
            facts_by_group.append((dict(facts), self._shards))
        require_agreement_of_all(facts_by_group, self.device, remedy=remedy)

    def make_vote(self, count: Callable[[int, int], None], *, sharded: bool) -> FiniteVote | None:
        """Ranks of one shard group see different means; a collective over it where the model has replicas."""
        if not sharded:
            return None
        if self._shards is None:
            return FiniteVote(self.group, count, always=False)
        self._shards = make_exchange_group(self._shards, alone=self._alone)
        self._made += [self._shards] if self._alone else []
        return FiniteVote(self._shards, count, always=True)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over `group`, fp32; a collective."""
        total = values.to(torch.float32, copy=True).contiguous()
        dist.all_reduce(total, group=self.group)
        return total.div_(self.num_ranks)

    def close(self) -> None:
        """Let go of the groups made here. On every rank."""
        for group in self._made:
            dist.destroy_process_group(group)
        self._made = []
