"""Whether a step is finite on every rank, where ranks see different parts of the means."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from commcomp.exchange.mean import ring_bytes

_BYTES = 4


class FiniteVote:
    """One value a step over `group`: under FSDP a rank receives its own piece only, and residuals of all must agree.

    `count` is told the bytes handed over and the bytes sent. `always`: also in steps in which all ranks of an exchange
    receive the same.
    """

    def __init__(self, group: dist.ProcessGroup, count: Callable[[int, int], None], *, always: bool) -> None:
        self._group, self._count, self.always = group, count, always
        self._num_ranks = dist.get_world_size(group)

    def __call__(self, finite: Tensor) -> Tensor:
        """`finite`, a bool scalar tensor of this rank, as one of all ranks; on a device nobody waits for it."""
        if self._num_ranks == 1:
            return finite
        least = finite.to(torch.float32).reshape(1)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self._group)
        self._count(_BYTES, ring_bytes(_BYTES, self._num_ranks))
        return least[0] > 0
