"""The communication hook for DistributedDataParallel, and for FullyShardedDataParallel (FSDP1)."""

# No `from __future__ import annotations` here: DDP compares the annotations with the classes themselves.

from typing import Any, cast

import torch
import torch.distributed as dist

from commcomp.gradient_sync import GradientSync
from commcomp.hooks.fsdp1 import UnitState, reduce_unit


def comm_hook(
    state: GradientSync, bucket: dist.GradBucket, output: torch.Tensor | None = None
) -> torch.futures.Future[torch.Tensor]:
    """Average one gradient bucket over the ranks in the form that `state` prescribes.

    Use as `model.register_comm_hook(state, commcomp.comm_hook)`. Returns at once; the future holds the bucket's
    buffer with the mean gradient. FSDP1 calls it with a unit's flat gradient for `bucket` and, unless it is NO_SHARD,
    with this rank's piece for `output`; the mean is in `.grad` when the backward pass ends.
    """
    if isinstance(state, UnitState) or (isinstance(state, GradientSync) and isinstance(bucket, torch.Tensor)):
        return reduce_unit(state, cast(Any, bucket), output)
    if not isinstance(state, GradientSync):
        raise TypeError(
            f"commcomp.comm_hook got a state of type {type(state).__name__}; expected a commcomp.GradientSync: "
            "model.register_comm_hook(commcomp.GradientSync(model, ...), commcomp.comm_hook)"
        )
    return state.reduce_bucket(
        bucket.buffer(),
        bucket.parameters(),
        bucket.gradients(),
        first=bucket.index() == 0,
        last=bucket.is_last(),
    )
