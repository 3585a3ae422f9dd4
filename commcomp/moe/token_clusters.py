"""Clusters of tokens on the way to their experts and back, with gradients.

For cluster j with members S_j, c_j is its first token or its mean, and y_k = E(c_j) + x_k - c_j. With g_k = dL/dy_k and
G_j their sum over S_j, the expert gets the gradient G_j and returns H_j; then c_j has the gradient H_j - G_j, and
dL/dx_k is g_k and x_k's part of that, (H_j - G_j) / |S_j| for a mean. (LSH-MoE, arXiv:2411.08446, section 3.2, gives
the way there; the way back follows from it.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from commcomp.compressors.clusters import Clusters


class Centroids(torch.autograd.Function):
    """[n, width] to [m, width]: the mean of each cluster, or its first row. The gradient of a first row goes to that
    row alone, or, with `shared`, to all of its cluster as that of a mean would."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, clusters: Clusters, mean: bool, shared: bool) -> Tensor:
        ctx.clusters, ctx.shared = clusters, mean or shared
        return clusters.means(rows) if mean else clusters.first(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        clusters: Clusters = ctx.clusters
        if ctx.shared:
            share = gradient / clusters.sizes.unsqueeze(1).to(gradient.dtype)
            return clusters.spread(share), None, None, None
        of_rows = gradient.new_zeros(clusters.rows, gradient.shape[1])
        return of_rows.index_copy_(0, clusters.leaders, gradient), None, None, None


class Expanded(torch.autograd.Function):
    """[m, width], what experts made of the centroids, to [n, width]: each row its cluster's, plus `apart`, what it
    differs from the centroid by. A row that is its cluster's centroid gets exactly what the expert made of it.

    Without `apart` nothing is added, and the gradient is as if it had been.
    """

    @staticmethod
    def forward(
        ctx: Any, answers: Tensor, centroids: Tensor, rows: Tensor, apart: Tensor | None, clusters: Clusters
    ) -> Tensor:
        ctx.clusters = clusters
        expanded = clusters.spread(answers)
        return expanded if apart is None else expanded + apart

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        of_clusters = ctx.clusters.sums(gradient)
        return of_clusters, -of_clusters, gradient, None, None


class Repeated(torch.autograd.Function):
    """[m, width] to [n, width]: each row its cluster's."""

    @staticmethod
    def forward(ctx: Any, answers: Tensor, clusters: Clusters) -> Tensor:
        ctx.clusters = clusters
        return clusters.spread(answers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.clusters.sums(gradient), None
