"""The ranks that one `GradientSync` averages over: their process groups, and what they must agree on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commcomp.exchange.agreement import SAME_ARGUMENTS, require_agreement_of_all
from commcomp.exchange.group import PASS_A_GROUP, SAME_NUMBER, existing_group, make_exchange_group
from commcomp.exchange.vote import FiniteVote


class Ranks:
    """The groups of `parent`'s ranks (None: all ranks); no collective by itself. ValueError where there is no group.

    On CUDA every collective is launched from the hook in its order, as DDP's own would be, so the model's groups serve
    (a second NCCL communicator could deadlock with them). Elsewhere a worker thread launches them, and needs groups for
    itself: `given`, or those of `make_groups`.

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
        self.group = existing_group(parent)
        """Ranks that exchange gradients with this one: with replicas, the same shard of each."""
        self._shards = other_shards
        self._given = given
        self._made: list[dist.ProcessGroup] = []
        self.num_ranks, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)

    def facts(self) -> dict[str, Any]:
        """What must be equal on all ranks before groups are made, JSON-able."""
        return {"number of ranks": self.num_ranks, "exchange_group given": self._given is not None}

    def require_given(self) -> None:
        """Raise ValueError if the group that was given is not of the ranks that it is for."""
        if self._given is None:
            return
        expected = dist.get_process_group_ranks(self.group)
        found = dist.get_process_group_ranks(self._given) if isinstance(self._given, dist.ProcessGroup) else None
        if found != expected:
            raise ValueError(
                f"exchange_group is of ranks {found or '(none)'}; those that average gradients with rank "
                f"{dist.get_rank()} are {expected}: make it of exactly these"
            )

    def make_groups(self) -> None:
        """Groups for the worker thread; a collective. ValueError on every rank where torch cannot make one of them."""
        if self.device.type == "cuda":
            self.group = self._given or self.group
            return
        problems: list[ValueError] = []
        remedy = PASS_A_GROUP if self._shards is None else SAME_NUMBER
        group = self._given or self._make(self.group, remedy, problems)
        if self._shards is not None:
            shards = self._make(self._shards, SAME_NUMBER, problems)
            # Over the groups that there were: what went wrong did so in one of them.
            self.agree({"groups that torch cannot make": [str(problem) for problem in problems]}, remedy=SAME_NUMBER)
            self._shards = shards
        if problems:
            raise problems[0]
        self.group = group

    def _make(self, parent: dist.ProcessGroup, remedy: str, problems: list[ValueError]) -> dist.ProcessGroup:
        try:
            self._made.append(make_exchange_group(parent, remedy=remedy))
        except ValueError as error:  # the same on all ranks of `parent`, but not on those of another
            problems.append(error)
            return parent
        return self._made[-1]

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
