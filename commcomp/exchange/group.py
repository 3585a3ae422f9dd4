"""A process group for commcomp's collectives alone: their order is then independent of everybody else's."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

PASS_A_GROUP = (
    "call group = torch.distributed.new_group(ranks) on every rank of the world and pass it as exchange_group=group"
)
SAME_NUMBER = "make equally many groups on every rank before the device mesh"


def existing_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """`group`, or that of all ranks for None. ValueError where there is none, or this rank is no member of it."""
    if not dist.is_initialized():
        raise ValueError("GradientSync needs a process group; call torch.distributed.init_process_group first")
    found = group or distributed_c10d._get_default_group()
    if not isinstance(found, dist.ProcessGroup):  # new_group gives a number to ranks that are no members
        raise ValueError(f"rank {dist.get_rank()} is no member of process_group; construct GradientSync on others only")
    return found


def make_exchange_group(parent: dist.ProcessGroup, *, remedy: str = PASS_A_GROUP) -> dist.ProcessGroup:
    """A new group of `parent`'s ranks with its timeout; a collective over `parent`.

    Raises ValueError, the same on every rank of `parent`, where torch cannot make it.
    """
    if parent == distributed_c10d._get_default_group():
        return dist.new_group(timeout=_timeout_of(parent))
    # torch derives the new group's name from how many groups a rank is in; unequal counts would wait for ever.
    device = min(parent._device_types, key=lambda device: device.type != "cpu")
    count = torch.tensor([len(distributed_c10d._world.pg_names)], device=device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size(parent))]
    dist.all_gather(counts, count, group=parent)
    if len({int(value) for value in counts}) > 1:
        raise ValueError(
            "the ranks of the model's process group are members of unequally many groups "
            f"({[int(value) for value in counts]}), so torch cannot make another one for them alone; {remedy}"
        )
    members = dist.get_process_group_ranks(parent)
    return dist.new_group(members, timeout=_timeout_of(parent), use_local_synchronization=True)


def _timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """The group's own timeout; None (torch's default) where its backend does not tell."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            return options._timeout
    return None
