"""Clusters of rows: which rows of a block one row stands for, without a look at anything that comes later."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from commcomp.compressors.row_pieces import by_pieces, squared_lengths_


@dataclass(frozen=True)
class FoundClusters:
    """Clusters whose number is on the device alone. All int64, of n rows.

    The clusters of an expert are numbered after those of the experts before it.
    """

    of_row: Tensor
    """[n]: the cluster of each row."""
    leader_of_row: Tensor
    """[n]: the first row of its cluster."""
    per_expert: Tensor
    """[experts]: clusters of each expert."""

    def counted(self, number: int) -> Clusters:
        """`number`: the sum of `per_expert`."""
        rows = len(self.of_row)
        order = self.of_row.argsort(stable=True)
        sizes = self.of_row.new_zeros(number).scatter_add_(0, self.of_row, torch.ones_like(self.of_row))
        leaders = self.of_row.new_empty(number).scatter_(0, self.of_row, self.leader_of_row)
        return Clusters(self.of_row, order, sizes.cumsum(0) - sizes, sizes, leaders, rows)


@dataclass(frozen=True)
class Clusters:
    """Which of n rows belong together, in m clusters. All int64."""

    of_row: Tensor
    """[n]: the cluster of each row."""
    order: Tensor
    """[n]: the rows, cluster by cluster, in each as they came."""
    starts: Tensor
    """[m]: where in `order` a cluster begins."""
    sizes: Tensor
    """[m]."""
    leaders: Tensor
    """[m]: the first row of each cluster."""
    rows: int

    def sums(self, rows: Tensor) -> Tensor:
        """[n, length] to [m, length]: the sum over each cluster, added in the order of its rows."""
        if not len(self.starts):
            return rows.new_zeros(0, rows.shape[1])
        return F.embedding_bag(self.order, rows, self.starts, mode="sum")

    def means(self, rows: Tensor) -> Tensor:
        """[n, length] to [m, length]; of a cluster of one row exactly that row."""
        return self.sums(rows) / self.sizes.unsqueeze(1).to(rows.dtype)

    def first(self, rows: Tensor) -> Tensor:
        """[n, length] to [m, length]: the leader of each cluster."""
        return rows.index_select(0, self.leaders)

    def spread(self, values: Tensor) -> Tensor:
        """[m, length] to [n, length]: to each row what its cluster has."""
        return values.index_select(0, self.of_row)


def clusters_by_key(rows: Tensor, experts: Tensor, keys: Tensor, counts: Tensor, reach: Tensor | None) -> FoundClusters:
    """Rows with equal keys form a cluster, led by the first of them; a row out of reach of that one stays alone.

    `rows`: [n, length]; `experts`, `keys`: int64 [n], keys rising with the expert; `counts`: int64 [experts]. `reach`:
    fp32 [n], the largest squared distance from its leader at which a row belongs to it; None: any. What becomes of a
    row depends on itself and on rows before it alone. Rows that are not finite, and those they would lead, stay alone.
    No host waits.
    """
    ordered, order = keys.sort(stable=True)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=begins[1:])
    place = torch.arange(len(keys), device=keys.device)
    first = torch.where(begins, place, 0).cummax(0).values
    leaders = torch.empty_like(order).scatter_(0, order, order.index_select(0, first))
    return clusters_of_leaders(rows, experts, leaders, counts, reach)


def clusters_of_leaders(
    rows: Tensor, experts: Tensor, leaders: Tensor, counts: Tensor, reach: Tensor | None
) -> FoundClusters:
    """Clusters of rows with the same leader, which has itself; out of its reach, or where either is not finite, a row
    becomes its own."""
    own = torch.arange(len(leaders), device=leaders.device)

    def squared(some: Tensor, their_leaders: Tensor) -> list[Tensor]:
        apart = rows.index_select(0, their_leaders)
        return [squared_lengths_(torch.sub(some, apart, out=apart).float())]

    (distances,) = by_pieces(squared, rows, leaders)
    near = distances.isfinite()
    if reach is not None:
        near &= distances <= reach
    leaders = torch.where(near, leaders, own)
    leads = leaders == own
    number = leads.cumsum(0) - 1
    per_expert = torch.zeros_like(counts).scatter_add_(0, experts, leads.long())
    return FoundClusters(number.index_select(0, leaders), leaders, per_expert)
