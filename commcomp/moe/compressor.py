"""What is done to one MoE layer's tokens before they travel: its settings, and what it learns from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from commcomp.compressors.clusters import FoundClusters
from commcomp.compressors.token_hash import MOST_EXPERTS
from commcomp.compressors.wire import Format
from commcomp.moe.grouping import Grouping
from commcomp.moe.learnt import Learnt
from commcomp.moe.rate_control import RateControl, due
from commcomp.moe.row_exchange import Traffic
from commcomp.moe.settings import LSH, MoEConfig, Quantized


class TokenCompressor(nn.Module):
    """Compresses the tokens of one MoE layer: `TokenCompressor(LSH(rate=0.35), Quantized(dtype="int8"))`, or one alone.

    It acts in training only: after `eval()` tokens travel as they are (see `compressing`). What it learns - the mean of
    each expert's tokens, and how finely to hash - is equal on all ranks and goes into the state dict. One object a
    layer: a second layer would spoil the statistics of the first.
    """

    def __init__(self, *methods: LSH | Quantized) -> None:
        super().__init__()
        self.lsh: LSH | None = None
        self.quantized: Quantized | None = None
        for method in methods:
            name = "lsh" if isinstance(method, LSH) else "quantized"
            if not isinstance(method, (LSH, Quantized)):
                raise TypeError(f"TokenCompressor got {method!r}; expected commcomp.moe.LSH(...) or .Quantized(...)")
            if getattr(self, name) is not None:
                raise ValueError(f"TokenCompressor got two {type(method).__name__}; expected at most one of each kind")
            setattr(self, name, method)
        self.in_evaluation = False
        self.traffic = Traffic()
        self._grouping = Grouping(self.lsh) if self.lsh else None
        self.learnt = Learnt()
        self._residual: Tensor | None = None

    @classmethod
    def from_config(cls, config: MoEConfig) -> TokenCompressor:
        """By the `moe` block of a configuration."""
        return cls(*(method for method in (config.lsh, config.quantized) if method is not None))

    @property
    def active(self) -> bool:
        """Whether tokens are compressed now."""
        return self.training or self.in_evaluation

    @property
    def formats(self) -> tuple[Format | None, Format | None]:
        """Of rows and of their gradients; None: as they are."""
        if self.quantized is None or not self.active:
            return None, None
        return self.quantized.forward_format(), self.quantized.backward_format()

    def find(self, rows: Tensor, experts: Tensor, counts: Tensor) -> FoundClusters | None:
        """Clusters of the rows of one pass; None: each goes alone. `learn` must follow.

        `rows`: [n, width], detached, by expert; `experts`: int64 [n]; `counts`: int64 [experts].
        """
        if self._grouping is None or not self.active:
            return None
        if len(counts) > MOST_EXPERTS:
            raise ValueError(f"{len(counts)} experts; expected at most {MOST_EXPERTS} with moe.LSH")
        if self._learns:
            self._adapt()
            self.learnt.begin_pass()
        if self.learnt.centres is None:
            return None
        centres = self.learnt.centres = self.learnt.centres.to(rows.device)
        if centres.shape != (len(counts), rows.shape[1]):
            return None  # `learn` says so, once ranks have found out whether they are alike
        with torch.autocast(rows.device.type, enabled=False):  # distances in bf16 would be of little worth
            return self._grouping.find(rows, experts, counts, centres)

    def learn(
        self,
        rows: Tensor,
        experts: Tensor,
        counts: Tensor,
        found: FoundClusters | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        """From the pass that `find` was called for. Every rank of `group` makes the call, in the same pass."""
        if self._grouping is None or not self.active:
            return
        self._require_the_same_layer(len(counts), rows.shape[1])
        if not self._learns:
            return
        self.learnt.passes += 1
        if due(self.learnt.passes):
            self._look(rows, experts, counts, found, group)

    @property
    def _learns(self) -> bool:
        # A pass that activation checkpointing repeats in the backward pass must group as the first one did.
        return self.training and torch._C._current_graph_task_id() == -1

    def _require_the_same_layer(self, num_experts: int, width: int) -> None:
        centres = self.learnt.centres
        if centres is not None and centres.shape != (num_experts, width):
            experts, values = centres.shape
            raise ValueError(
                f"this TokenCompressor has met {experts} experts and rows of {values} values, now {num_experts} and "
                f"{width}; give every MoE layer a TokenCompressor of its own"
            )

    def sent(self, rows: int, tokens: int) -> None:
        """Of all ranks, in the pass just made; called once the numbers are on the host."""
        if self.training:
            self.learnt.rows, self.learnt.tokens = rows, tokens

    def _adapt(self) -> None:
        """To the rate of the pass before, if there were clusters in it."""
        control, learnt = self._control, self.learnt
        if control is not None and learnt.centres is not None and (control.every_pass or due(learnt.passes)):
            control.adapt(learnt.rows, learnt.tokens)

    @property
    def _control(self) -> RateControl | None:
        return self._grouping.control if self._grouping else None

    def _look(
        self,
        rows: Tensor,
        experts: Tensor,
        counts: Tensor,
        found: FoundClusters | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Take the means of experts' rows, of all ranks, for the passes to come."""
        rows = rows.float().nan_to_num(0.0, 0.0, 0.0)
        place = torch.arange(len(rows), device=rows.device)
        sums = F.embedding_bag(place, rows, counts.cumsum(0) - counts, mode="sum")
        total = torch.cat((sums, counts.unsqueeze(1).float()), 1)
        if group is not None:
            dist.all_reduce(total, group=group)
            ranks = dist.get_world_size(group)
            self.traffic.wire_bytes += 2 * (ranks - 1) * total.numel() * total.element_size() // ranks
        fresh = total[:, :-1] / total[:, -1:].clamp(min=1)
        old = self.learnt.centres
        self.learnt.next_centres = fresh if old is None else torch.where(total[:, -1:] > 0, fresh, old)
        if found is not None and old is not None:
            apart = rows - rows.index_select(0, found.leader_of_row)
            centred = rows - old.index_select(0, experts)
            self._residual = (apart.square().sum() / centred.square().sum()).sqrt()

    def stats(self) -> dict[str, Any]:
        """Bytes since the start, of training passes, and how rows were grouped when that was last looked at.

        wire_bytes, dense_bytes: sent by this rank, and what fp32 rows would have been; ratio; rate: rows sent / tokens
        of the last pass, all ranks; hashes, coords, farthest, as `LSH` has them now; residual: |x - first of its
        cluster| / |x - mean of the expert|.
        """
        wire, dense = self.traffic.wire_bytes, self.traffic.dense_bytes
        rows, tokens = self.learnt.rows, self.learnt.tokens
        return {
            "wire_bytes": wire,
            "dense_bytes": dense,
            "ratio": dense / wire if wire else None,
            "rate": rows / tokens if tokens else None,
            "residual": float(self._residual) if self._residual is not None else None,
            **(self._grouping.stats() if self._grouping else {}),
        }

    def get_extra_state(self) -> str:
        """What was learnt."""
        if self._control is not None:
            self.learnt.setting = self._control.value
        return self.learnt.to_text()

    def set_extra_state(self, state: str) -> None:
        """Go on from what `get_extra_state` gave. Raises ValueError for anything else."""
        self.learnt = Learnt.from_text(state)
        if self._control is not None and self.learnt.setting is not None:
            self._control.value = self.learnt.setting


@contextmanager
def compressing(model: nn.Module) -> Iterator[None]:
    """Compress in evaluation too, as in training: to see what compression changes."""
    compressors = [module for module in model.modules() if isinstance(module, TokenCompressor)]
    before = [one.in_evaluation for one in compressors]
    for one in compressors:
        one.in_evaluation = True
    try:
        yield
    finally:
        for one, was in zip(compressors, before, strict=True):
            one.in_evaluation = was
