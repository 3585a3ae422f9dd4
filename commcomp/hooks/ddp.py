"""The communication hook for DistributedDataParallel."""

# No `from __future__ import annotations` here: DDP compares the annotations with the classes themselves.

import torch
import torch.distributed as dist

from commcomp.gradient_sync import GradientSync


def comm_hook(state: GradientSync, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average one gradient bucket over the ranks in the form that `state` prescribes.

    Use as `model.register_comm_hook(state, commcomp.comm_hook)`. Returns at once; the future holds the bucket's
    buffer with the mean gradient.
    """
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
