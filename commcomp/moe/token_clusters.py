"""Clusters of tokens on the way to their experts and back, with gradients.

For cluster j with members S_j: c_j is its first token or its mean, y_k = E(c_j) + x_k - c_j. With g_k = dL/dy_k and
G_j their sum over S_j, the expert gets the gradient G_j and returns H_j; then c_j has the gradient H_j - G_j and
x_k has g_k beside its part of that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from commcomp.compressors.clusters import Clusters


class Centroids(torch.autograd.Function):
    """[n, width] to [m, width]: the mean of each cluster, or its first row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, clusters: Clusters, mean: bool) -> Tensor:
        ctx.clusters, ctx.mean = clusters, mean
        return clusters.means(rows) if mean else clusters.first(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        clusters: Clusters = ctx.clusters
        if ctx.mean:
            share = gradient / clusters.sizes.unsqueeze(1).to(gradient.dtype)
            return clusters.spread(share), None, None
        of_rows = gradient.new_zeros(clusters.rows, gradient.shape[1])
        return of_rows.index_copy_(0, clusters.leaders, gradient), None, None


class Expanded(torch.autograd.Function):
    """[m, width], what experts made of the centroids, to [n, width]: each row its cluster's, plus what it differs from
    the centroid by. A row that is its cluster's centroid gets exactly what the expert made of it."""

    @staticmethod
    def forward(ctx: Any, answers: Tensor, centroids: Tensor, rows: Tensor, apart: Tensor, clusters: Clusters) -> Tensor:
        ctx.clusters = clusters
        return clusters.spread(answers) + apart

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
