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
from commcomp.moe.rate_control import due
from commcomp.moe.row_exchange import Traffic
from commcomp.moe.settings import LSH, Quantized


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
        self._passes = 0
        self._centres: Tensor | None = None
        self._collected: Tensor | None = None
        self._last = (0, 0)
        self._residual: Tensor | None = None

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

    def find(
        self, rows: Tensor, experts: Tensor, counts: Tensor, group: dist.ProcessGroup | None
    ) -> FoundClusters | None:
        """Clusters of the rows of one pass; None: each goes alone.

        `rows`: [n, width], detached, by expert; `experts`: int64 [n]; `counts`: int64 [experts]. Every rank of `group`
        makes the call.
        """
        if self._grouping is None or not self.active:
            return None
        if len(counts) > MOST_EXPERTS:
            raise ValueError(f"{len(counts)} experts; expected at most {MOST_EXPERTS} with moe.LSH")
        # A pass that activation checkpointing repeats in the backward pass must group as the first one did.
        first_time = self.training and torch._C._current_graph_task_id() == -1
        if first_time:
            self._adapt()
            if due(self._passes):
                self._learn(group)
        found = None
        if self._centres is not None:
            self._centres = self._centres.to(rows.device)
            self._require_the_same_layer(len(counts), rows.shape[1])
            found = self._grouping.find(rows, experts, counts, self._centres)
        if first_time:
            self._passes += 1
            if due(self._passes):
                self._collect(rows, experts, counts, found)
        return found

    def _require_the_same_layer(self, num_experts: int, width: int) -> None:
        assert self._centres is not None
        if self._centres.shape != (num_experts, width):
            experts, values = self._centres.shape
            raise ValueError(
                f"this TokenCompressor has met {experts} experts and rows of {values} values, now {num_experts} and "
                f"{width}; give every MoE layer a TokenCompressor of its own"
            )

    def sent(self, rows: int, tokens: int) -> None:
        """Of all ranks, in the pass just made; called once the numbers are on the host."""
        if self.training:
            self._last = (rows, tokens)

    def _adapt(self) -> None:
        """To the rate of the pass before, if there were clusters in it."""
        control = self._grouping.control if self._grouping else None
        if control is not None and self._centres is not None and (control.every_pass or due(self._passes)):
            control.adapt(*self._last)

    def _collect(self, rows: Tensor, experts: Tensor, counts: Tensor, found: FoundClusters | None) -> None:
        """Sum what the next `_learn` takes from all ranks: rows of each expert and their number."""
        rows = rows.float().nan_to_num(0.0, 0.0, 0.0)
        place = torch.arange(len(rows), device=rows.device)
        sums = F.embedding_bag(place, rows, counts.cumsum(0) - counts, mode="sum")
        self._collected = torch.cat((sums, counts.unsqueeze(1).float()), 1)
        if found is not None and self._centres is not None:
            apart = rows - rows.index_select(0, found.leader_of_row)
            centred = rows - self._centres.index_select(0, experts)
            self._residual = (apart.square().sum() / centred.square().sum()).sqrt()

    def _learn(self, group: dist.ProcessGroup | None) -> None:
        if self._collected is None:
            return
        total = self._collected
        if group is not None:
            dist.all_reduce(total, group=group)
            ranks = dist.get_world_size(group)
            self.traffic.wire_bytes += 2 * (ranks - 1) * total.numel() * total.element_size() // ranks
        counts = total[:, -1:]
        fresh = total[:, :-1] / counts.clamp(min=1)
        old = fresh if self._centres is None else self._centres
        self._centres = torch.where(counts > 0, fresh, old)
        self._collected = None

    def stats(self) -> dict[str, Any]:
        """Bytes since the start, and how rows were grouped when that was last looked at.

        wire_bytes, dense_bytes: sent by this rank, and what fp32 rows would have been; ratio; rate: rows sent / tokens
        of the last pass, all ranks; hashes, coords, farthest, as `LSH` has them now; residual: |x - first of its
        cluster| / |x - mean of the expert|.
        """
        wire, dense = self.traffic.wire_bytes, self.traffic.dense_bytes
        rows, tokens = self._last
        return {
            "wire_bytes": wire,
            "dense_bytes": dense,
            "ratio": dense / wire if wire else None,
            "rate": rows / tokens if tokens else None,
            "residual": float(self._residual) if self._residual is not None else None,
            **(self._grouping.stats() if self._grouping else {}),
        }

    def get_extra_state(self) -> dict[str, Any]:
        """What was learnt."""
        return {
            "passes": self._passes,
            "setting": self._grouping.control.value if self._grouping and self._grouping.control else None,
            "last": self._last,
            "centres": self._centres,
            "collected": self._collected,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from what `get_extra_state` gave."""
        self._passes, self._last = int(state["passes"]), tuple(state["last"])
        self._centres, self._collected = state["centres"], state["collected"]
        if self._grouping and self._grouping.control and state["setting"] is not None:
            self._grouping.control.value = float(state["setting"])


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
