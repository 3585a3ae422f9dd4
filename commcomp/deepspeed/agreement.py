"""What fails on one rank is raised on all, so that none waits for it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from commcomp.checkpoint.errors import SnapshotError


def agree(problem: Exception | None, where: str, facts: Any = None, own: Any = None) -> list[Any]:
    """What all ranks have as `own`, in rank order; raises on each of them if one has a problem, or other facts."""
    every = gather((problem and f"{type(problem).__name__}: {problem}", facts, own))
    if problem is not None:
        raise problem
    for rank, (text, others, _) in enumerate(every):
        if text:
            raise SnapshotError(f"{where} failed on rank {rank}: {text}")
        if others != every[0][1]:
            raise ValueError(f"{where}: rank {rank} has {others}, rank 0 {every[0][1]}; give all ranks the same")
    return [theirs for _, _, theirs in every]


def gather(own: Any) -> list[Any]:
    """One object of each rank, in rank order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found
