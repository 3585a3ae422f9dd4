"""Leaders of rows: against a plain loop, in every instruction set and in torch's operations; blind to later rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commcomp.compressors import native, nearest

WIDTH = 24


def _rows(counts: list[int], seed: int, *, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows around a few points, so that some lie near to others; and the expert of each."""
    torch.manual_seed(seed)
    points = torch.randn(12, WIDTH)
    rows = points[torch.randint(0, len(points), (sum(counts),))]
    rows = rows + noise * torch.randn(sum(counts), WIDTH)
    return rows, torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def _by_loop(rows: torch.Tensor, counts: list[int], reach: torch.Tensor) -> list[int]:
    """In double precision, row by row."""
    rows, leaders, start = rows.double(), [], 0
    for count in counts:
        for row in range(start, start + count):
            first = start + (row - start) // nearest.BLOCK * nearest.BLOCK
            known = [one for one in range(first, row) if leaders[one] == one]
            distances = {one: float((rows[row] - rows[one]).square().sum()) for one in known}
            near = {one: distance for one, distance in distances.items() if distance <= reach[row]}
            leaders.append(min(near, key=near.get) if near else row)
        start += count
    return leaders


@pytest.fixture(params=["torch", *(native._native.instruction_sets() if native.available else [])])
def arithmetic(request, monkeypatch):
    """Every way in which leaders are found here."""
    if request.param == "torch":
        monkeypatch.setattr(native, "available", False)
        yield
        return
    native._native.use(request.param)
    yield
    native._native.use(native._native.instruction_sets()[-1])


@pytest.mark.parametrize(
    "counts", [[40, 0, 7, 1], [0, 0], [1], [nearest.BLOCK, 3], [2 * nearest.BLOCK + 5, 31]], ids=str
)
def test_leaders_are_those_of_a_plain_loop(arithmetic, counts):
    rows, experts = _rows(counts, seed=1)
    reach = torch.rand(len(rows)) * 10
    leaders = nearest.nearest_leaders(rows, experts, torch.tensor(counts), reach)
    assert leaders.tolist() == _by_loop(rows, counts, reach)


def test_a_leader_leads_itself_and_is_within_reach(arithmetic):
    counts = [300, 200]
    rows, experts = _rows(counts, seed=2)
    reach = torch.full((len(rows),), 5.0)
    leaders = nearest.nearest_leaders(rows, experts, torch.tensor(counts), reach)
    assert torch.equal(leaders[leaders], leaders)
    assert torch.equal(experts[leaders], experts)
    assert ((rows - rows[leaders]).square().sum(1) <= 5.0001).all()
    assert len(leaders.unique()) < len(rows) // 4


def test_a_chain_that_is_too_long_to_follow_is_cut_and_not_mistaken(arithmetic):
    """On a line with steps just within reach, each row's lot hangs on that of the one before it."""
    rows = torch.arange(200.0).unsqueeze(1).repeat(1, 2) * 2**-0.5
    experts, counts = torch.zeros(200, dtype=torch.int64), torch.tensor([200])
    leaders = nearest.nearest_leaders(rows, experts, counts, torch.full((200,), 1.01))
    assert torch.equal(leaders[leaders], leaders)
    assert ((rows - rows[leaders]).square().sum(1) <= 1.02).all()
    assert leaders[:12].tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10]


@given(seed=st.integers(0, 1 << 20), at=st.integers(0, 99))
def test_no_row_sees_a_later_one(seed, at):
    """Whichever way: later rows are changed, and those before are led as they were."""
    counts = torch.tensor([100])
    rows, experts = _rows([100], seed)
    reach = torch.full((100,), 4.0)
    changed = rows.clone()
    changed[at:] = torch.randn(100 - at, WIDTH) * 3
    for available in {native.available, False}:
        before = nearest.nearest_leaders(rows, experts, counts, reach)
        after = nearest.nearest_leaders(changed, experts, counts, reach)
        assert torch.equal(before[:at], after[:at]), available


def test_rows_that_are_not_finite_stay_alone(arithmetic):
    rows, experts = _rows([60], seed=3, noise=0.0)
    rows[0], rows[7, 3], rows[9] = torch.nan, torch.inf, -torch.inf
    reach = torch.full((60,), 1.0)
    reach[9] = torch.inf
    leaders = nearest.nearest_leaders(rows, experts, torch.tensor([60]), reach)
    bad = [0, 7]
    assert leaders[bad].tolist() == bad
    assert (leaders != torch.arange(60)).any()
    assert all(leader not in bad for row, leader in enumerate(leaders.tolist()) if row not in bad)


def test_shapes_that_do_not_fit_are_refused():
    if not native.available:
        pytest.skip("torch's own errors tell these")
    rows, experts = _rows([10], seed=0)
    with pytest.raises(ValueError, match="rows: 10"):
        nearest.nearest_leaders(rows, experts, torch.tensor([9]), torch.ones(10))
    with pytest.raises(ValueError, match=r"counts are \[-5, 15\]"):
        nearest.nearest_leaders(rows, experts, torch.tensor([-5, 15]), torch.ones(10))
    with pytest.raises(ValueError, match="reach is"):
        nearest.nearest_leaders(rows, experts, torch.tensor([10]), torch.ones(9))
