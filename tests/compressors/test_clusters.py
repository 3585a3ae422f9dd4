"""Clusters of rows: hashes, sums, and that nothing sees what comes later."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commcomp.compressors.clusters import FoundClusters, clusters_by_key, clusters_of_leaders
from commcomp.compressors.token_hash import MOST_EXPERTS, TokenHash, most_coords

WIDTH, EXPERTS = 24, 5


def _rows(count: int, seed: int, points: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    rows = torch.randn(points, WIDTH)[torch.randint(0, points, (count,))] + 0.2 * torch.randn(count, WIDTH)
    experts = torch.randint(0, EXPERTS, (count,)).sort().values
    return rows, experts, torch.bincount(experts, minlength=EXPERTS)


def _found(rows: torch.Tensor, experts: torch.Tensor, counts: torch.Tensor, reach: float | None) -> FoundClusters:
    keys = TokenHash(WIDTH, 2, 6, seed=0).keys(rows, experts)
    limit = None if reach is None else torch.full((len(rows),), reach)
    return clusters_by_key(rows, experts, keys, counts, limit)


@given(count=st.integers(0, 80), seed=st.integers(0, 1 << 20), reach=st.sampled_from([None, 0.0, 1.0, 4.0]))
def test_clusters_are_what_they_say(count, seed, reach):
    rows, experts, counts = _rows(count, seed)
    found = _found(rows, experts, counts, reach)
    clusters = found.counted(int(found.per_expert.sum()))
    number = len(clusters.sizes)
    assert clusters.of_row.tolist() == clusters.of_row.clamp(0, max(number - 1, 0)).tolist()
    assert torch.equal(clusters.sizes, torch.bincount(clusters.of_row, minlength=number))
    assert torch.equal(clusters.leaders[clusters.of_row], found.leader_of_row)
    assert torch.equal(experts[clusters.leaders], torch.arange(EXPERTS).repeat_interleave(found.per_expert))
    assert torch.equal(experts[clusters.leaders][clusters.of_row], experts)
    for cluster in range(number):
        members = (clusters.of_row == cluster).nonzero().flatten()
        assert members[0] == clusters.leaders[cluster]
    sums = torch.zeros(number, WIDTH).index_add_(0, clusters.of_row, rows)
    torch.testing.assert_close(clusters.sums(rows), sums)
    torch.testing.assert_close(clusters.means(rows), sums / clusters.sizes.unsqueeze(1))
    assert torch.equal(clusters.first(rows), rows[clusters.leaders])
    assert torch.equal(clusters.spread(sums), sums[clusters.of_row])
    alone = clusters.sizes[clusters.of_row] == 1
    assert torch.equal(clusters.spread(clusters.means(rows))[alone], rows[alone])
    if reach is not None:
        assert ((rows - rows[found.leader_of_row]).square().sum(1) <= reach + 1e-5).all()


@given(seed=st.integers(0, 1 << 20), at=st.integers(0, 59), reach=st.sampled_from([None, 2.0]))
def test_no_row_sees_a_later_one_of_its_expert(seed, at, reach):
    rows, _, _ = _rows(60, seed)
    experts, counts = torch.zeros(60, dtype=torch.int64), torch.tensor([60, 0, 0, 0, 0])
    before = _found(rows, experts, counts, reach).leader_of_row
    changed = rows.clone()
    changed[at:] = torch.randn(60 - at, WIDTH)
    assert torch.equal(_found(changed, experts, counts, reach).leader_of_row[:at], before[:at])


def test_similar_rows_share_a_hash_more_often_than_others():
    torch.manual_seed(0)
    rows, experts = torch.randn(2000, WIDTH), torch.zeros(2000, dtype=torch.int64)
    hashing = TokenHash(WIDTH, 1, 16, seed=3)
    keys = hashing.keys(rows, experts)
    near = (hashing.keys(rows + 0.1 * torch.randn_like(rows), experts) == keys).float().mean()
    far = (hashing.keys(torch.randn_like(rows), experts) == keys).float().mean()
    assert near > 0.6 and far < 0.1
    # 16 coordinates and a sign: each value about equally often.
    shares = torch.unique(keys, return_counts=True)[1] / len(keys)
    assert len(shares) == 32 and shares.max() < 3 / 32


@pytest.mark.parametrize("width", [1, 2, 24, 32, 100])
def test_what_is_kept_of_a_turn_keeps_lengths(width):
    torch.manual_seed(0)
    rows = torch.randn(3000, width)
    coords = most_coords(width, 1)
    turned = TokenHash(width, 1, coords, seed=1).turned(rows)
    torch.testing.assert_close(turned.square().sum(1), rows.square().sum(1))
    half = TokenHash(width, 1, max(1, coords // 2), seed=1).turned(rows)
    if width > 1:
        assert (half.square().sum(1) / rows.square().sum(1)).mean() == pytest.approx(1, rel=0.2)
    with pytest.raises(ValueError, match=f"rows of {width} values"):
        TokenHash(width, 2, coords, seed=0)


def test_keys_are_of_one_expert():
    rows = torch.ones(4, WIDTH)
    experts = torch.tensor([0, 0, 1, MOST_EXPERTS - 1])
    keys = TokenHash(WIDTH, 3, 8, seed=0).keys(rows, experts)
    assert keys[0] == keys[1] < keys[2] < keys[3]


@pytest.mark.parametrize("reach", [torch.full((6,), 1.0), torch.full((6,), torch.inf), None], ids=str)
def test_rows_that_are_not_finite_go_alone_and_take_nobody_along(reach):
    rows, experts, counts = torch.ones(6, WIDTH), torch.zeros(6, dtype=torch.int64), torch.tensor([6, 0, 0, 0, 0])
    rows[0, 3], rows[4] = torch.nan, torch.inf
    leaders = torch.zeros(6, dtype=torch.int64)
    for first in (torch.nan, torch.inf):
        rows[0, 3] = first
        found = clusters_of_leaders(rows, experts, leaders, counts, reach)
        assert found.leader_of_row.tolist() == [0, 1, 2, 3, 4, 5] and found.per_expert.tolist() == [6, 0, 0, 0, 0]
