"""All-to-all and all-gather of blocks of bytes.

On CPUs by point-to-point messages, with every receive posted before any send. gloo's own collectives post their sends
first: a rank that comes late finds its peer ready and sends its whole block, and only behind it goes the note that it
is ready to receive. So the two directions of a link take turns, where they could be used at once.

gloo ends the process where a message is longer than what waits for it. So ranks agree on what they send: at
construction where all blocks are equally long (exchange/agreement.py), or by telling one another before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

_TAG = 0x636F6D
"""So that no message is taken for one of the user's in the same group."""


class Transfer:
    """Messages on their way; they keep their tensors alive."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        self._works = works

    def wait(self) -> None:
        """Return when all have arrived and all that was sent may be overwritten."""
        for work in self._works:
            work.wait()


def all_to_all(out: Tensor, blocks: Tensor, group: dist.ProcessGroup) -> Transfer:
    """Start sending `blocks[i]` to rank i and receiving into `out[i]` from it; both uint8 [ranks, bytes]."""
    if blocks.device.type != "cpu":
        return Transfer([_started(dist.all_to_all_single(out, blocks, group=group, async_op=True))])
    return _exchange(out.unbind(0), blocks.unbind(0), group)


def all_to_all_uneven(
    out: Tensor, out_sizes: Sequence[int], blocks: Tensor, sizes: Sequence[int], group: dist.ProcessGroup
) -> Transfer:
    """Start sending blocks of `sizes` bytes to the ranks in order, and receiving blocks of `out_sizes` from them.

    `blocks`: uint8 [sum of `sizes`]; `out`: uint8 [sum of `out_sizes`]. What one rank sends another must expect.
    """
    if blocks.device.type != "cpu":
        work = dist.all_to_all_single(out, blocks, list(out_sizes), list(sizes), group=group, async_op=True)
        return Transfer([_started(work)])
    return _exchange(out.split(list(out_sizes)), blocks.split(list(sizes)), group)


def all_gather(out: Tensor, own: Tensor, group: dist.ProcessGroup) -> Transfer:
    """Start gathering `own`, uint8 [bytes], of every rank into `out`, [ranks, bytes]."""
    if own.device.type != "cpu":
        return Transfer([_started(dist.all_gather_single(out.view(-1), own, group=group, async_op=True))])
    return _exchange(out.unbind(0), [own] * len(out), group)


def _exchange(out: Sequence[Tensor], blocks: Sequence[Tensor], group: dist.ProcessGroup) -> Transfer:
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    out[rank].copy_(blocks[rank])
    # Everybody begins with its next neighbour, so that nobody gets all the first messages.
    others = [(rank + distance) % num_ranks for distance in range(1, num_ranks)]
    from_whom = [other for other in reversed(others) if len(out[other])]
    to_whom = [other for other in others if len(blocks[other])]
    receives = [_started(dist.irecv(out[other], group=group, group_src=other, tag=_TAG)) for other in from_whom]
    sends = [_started(dist.isend(blocks[other], group=group, group_dst=other, tag=_TAG)) for other in to_whom]
    return Transfer([*receives, *sends])


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is not in the process group"
    return work
