"""Rows a piece at a time: what is found is what is found of all at once."""

from __future__ import annotations

import pytest
import torch

from commcomp.compressors import row_pieces
from commcomp.compressors.row_pieces import by_pieces
from commcomp.moe import LSH
from commcomp.moe.grouping import Grouping
from tests.moe.layers import clustered


@pytest.mark.parametrize("number", [0, 1, 7, 8, 9, 100])
def test_every_row_is_treated_once_and_in_its_place(monkeypatch, number):
    monkeypatch.setattr(row_pieces, "VALUES", 24)
    rows, numbers = torch.randn(number, 3), torch.arange(number)
    pieces = []

    def work(some, theirs):
        pieces.append(len(some))
        return [some * 2, theirs + 1]

    doubled, more = by_pieces(work, rows, numbers)
    assert torch.equal(doubled, rows * 2) and torch.equal(more, numbers + 1) and more.dtype == torch.int64
    assert max(pieces) <= 8 and sum(pieces) == number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "settings",
    [
        LSH(rate=None, farthest=0.7),
        LSH(rate=None, farthest=0.7, search="hash", hashes=1, coords=4),
        LSH(rate=None, farthest=None, search="hash", hashes=1, coords=4),
    ],
    ids=["nearest", "hash", "hash without a limit"],
)
def test_clusters_do_not_depend_on_the_pieces(monkeypatch, settings, dtype):
    counts = torch.tensor([60, 0, 41])
    experts = torch.arange(3).repeat_interleave(counts)
    rows = clustered((101, 16), seed=4, noise=0.3).to(dtype)
    rows[3], rows[70, 2] = torch.nan, torch.inf
    before, centres = rows.clone(), 0.1 * torch.ones(3, 16)
    found = []
    for values in (1 << 30, 16 * 7, 1):
        monkeypatch.setattr(row_pieces, "VALUES", values)
        found.append(Grouping(settings).find(rows, experts, counts, centres))
    assert len(found[0].of_row.unique()) < 90
    for other in found[1:]:
        assert torch.equal(other.of_row, found[0].of_row) and torch.equal(other.per_expert, found[0].per_expert)
        assert torch.equal(other.leader_of_row, found[0].leader_of_row)
    assert torch.equal(rows.nan_to_num(7), before.nan_to_num(7))  # what was given is as it was
    assert torch.equal(centres, 0.1 * torch.ones(3, 16))
