"""The backward pass of clusters: finite differences in fp64, autograd of one process, and the formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from commcomp.moe import LSH, TokenCompressor, combine, dispatch
from tests.moe.layers import clustered, lsh, ready

EXPERTS, WIDTH = 2, 6
COUNTS = [9, 7]


def _expert(rows: Tensor, counts: list[int], weights: Tensor) -> Tensor:
    pieces = zip(rows.split(counts), weights, strict=True)
    return torch.cat([torch.tanh(piece @ weight) @ weight.T for piece, weight in pieces])


def _weights() -> Tensor:
    return torch.randn(EXPERTS, WIDTH, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _layer(rows: Tensor, weights: Tensor, settings: LSH) -> Tensor:
    compressor = ready(TokenCompressor(settings), EXPERTS, WIDTH)
    sent = dispatch(rows, torch.tensor(COUNTS), compressor)
    made = combine(_expert(sent.rows, sent.rows_per_expert, weights), sent)
    assert len(sent.rows) <= len(rows) - 4  # there are clusters
    return made


def _clusters(rows: Tensor, settings: LSH) -> tuple[Tensor, Tensor, list[int]]:
    """Cluster of each row, first row of each, clusters of each expert."""
    experts = torch.arange(EXPERTS).repeat_interleave(torch.tensor(COUNTS))
    compressor = ready(TokenCompressor(settings), EXPERTS, WIDTH)
    found = compressor.find(rows.detach(), experts, torch.tensor(COUNTS))
    assert found is not None
    number = int(found.per_expert.sum())
    return found.of_row, found.counted(number).leaders, found.per_expert.tolist()


def _reference(rows: Tensor, weights: Tensor, settings: LSH) -> Tensor:
    """The layer's function by plain operations, clusters taken as constants."""
    of_row, leaders, counts = _clusters(rows, settings)
    mean = torch.stack([rows[of_row == cluster].mean(0) for cluster in range(len(leaders))])
    first = rows[leaders]
    if settings.compensate == "both":
        centroid = mean if settings.centroid == "mean" else first
        return _expert(centroid, counts, weights)[of_row] + rows - centroid[of_row]
    # The value of the chosen centroid, the gradient of the mean.
    centroid = mean if settings.centroid == "mean" else first.detach() + mean - mean.detach()
    made = _expert(centroid, counts, weights)[of_row]
    if settings.compensate == "none":
        return made
    apart = rows - centroid[of_row]
    return made + apart - apart.detach()


SETTINGS = [
    lsh(search=search, centroid=centroid, compensate=compensate, hashes=1, coords=4, farthest=0.9)
    for search in ("nearest", "hash")
    for centroid in ("first", "mean")
    for compensate in ("both", "gradient", "none")
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_values_and_gradients_are_those_of_autograd(settings):
    results = []
    for function in (_layer, _reference):
        rows = clustered((sum(COUNTS), WIDTH), seed=1, points=3).double().requires_grad_()
        weights = _weights().requires_grad_()
        made = function(rows, weights, settings)
        (made * torch.linspace(-1, 2, made.numel()).view_as(made)).sum().backward()
        results.append((made.detach(), rows.grad, weights.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "settings",
    [
        one
        for one in SETTINGS
        if one.compensate == "both" or (one.compensate == "none" and one.centroid == "mean")
    ],
    ids=str,
)
def test_gradients_are_finite_differences(settings):
    """Of the settings that have the derivative of what they compute. Steps are too small to change a cluster."""
    rows = clustered((sum(COUNTS), WIDTH), seed=2, points=3).double().requires_grad_()
    weights = _weights().requires_grad_()
    assert torch.autograd.gradcheck(lambda *both: _layer(*both, settings), (rows, weights), eps=1e-6, atol=1e-5)


def test_only_rows_of_clusters_travel_backward_too():
    """By the gradient that the experts get: the sum of each cluster's, one row each."""
    settings = lsh(farthest=0.9, coords=4)
    rows = clustered((sum(COUNTS), WIDTH), seed=1, points=3).double().requires_grad_()
    compressor = ready(TokenCompressor(settings), EXPERTS, WIDTH)
    sent = dispatch(rows, torch.tensor(COUNTS), compressor)
    answers = sent.rows * 3
    answers.retain_grad()
    back = combine(answers, sent)
    weight = torch.arange(back.numel(), dtype=torch.float64).view_as(back)
    (back * weight).sum().backward()
    of_row, leaders, _ = _clusters(rows, settings)
    assert answers.grad is not None and answers.grad.shape == (len(leaders), WIDTH)
    for cluster in range(len(leaders)):
        torch.testing.assert_close(answers.grad[cluster], weight[of_row == cluster].sum(0))
