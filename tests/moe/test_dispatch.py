"""Rows to experts on several ranks and back: the plain all-to-all to the bit, bytes as counted, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from commcomp.moe import LSH, Quantized, TokenCompressor, combine, dispatch
from tests.moe.layers import PUBLISHED, clustered, lsh, ready
from tests.ranks import run_ranks

EXPERTS, WIDTH = 8, 16
SPREADS = {
    "even": lambda rank, ranks: [4] * EXPERTS,
    "uneven": lambda rank, ranks: [(3 * expert + 5 * rank) % 7 for expert in range(EXPERTS)],
    "empty experts": lambda rank, ranks: [9 if expert % 3 == 0 else 0 for expert in range(EXPERTS)],
    "all to one": lambda rank, ranks: [0] * (EXPERTS - 1) + [20 + rank],
    "one token": lambda rank, ranks: [0, 0, int(rank == 0)] + [0] * (EXPERTS - 3),
    "a rank without": lambda rank, ranks: [0] * EXPERTS if rank == 0 else [2] * EXPERTS,
    "none at all": lambda rank, ranks: [0] * EXPERTS,
}


def _expert(number: int, rows: torch.Tensor) -> torch.Tensor:
    """The same to the bit whatever other rows there are; `number` is that among all."""
    return torch.tanh(rows * (0.5 + 0.1 * number)) + number * rows.flip(-1)


def _there_and_back(rank: int, spread: str, methods: tuple[Any, ...], trained: bool) -> Any:
    ranks = dist.get_world_size()
    counts = SPREADS[spread](rank, ranks)
    rows = clustered((sum(counts), WIDTH), seed=rank).requires_grad_()
    compressor = TokenCompressor(*methods) if methods else None
    if compressor is not None and trained:
        ready(compressor, EXPERTS, WIDTH)
    sent = dispatch(rows, torch.tensor(counts), compressor)
    first = rank * EXPERTS // ranks
    pieces = sent.rows.split(sent.rows_per_expert)
    answers = torch.cat([_expert(first + place, piece) for place, piece in enumerate(pieces)])
    back = combine(answers, sent)
    weight = torch.linspace(0.5, 2.0, WIDTH)
    (back * weight).sum().backward()
    alone = rows.detach().clone().requires_grad_()
    expected = torch.cat([_expert(number, piece) for number, piece in enumerate(alone.split(counts))])
    (expected * weight).sum().backward()
    assert rows.grad is not None and alone.grad is not None
    stats = compressor.stats() if compressor else {}
    return back.detach(), expected.detach(), rows.grad, alone.grad, stats, sent.rows_per_expert


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(
    "methods", [(), (Quantized(dtype="fp32"),), (LSH(rate=None, farthest=0.0),)], ids=["plain", "fp32", "rate 1"]
)
def test_lossless_settings_are_the_plain_all_to_all(num_ranks, spread, methods):
    for back, expected, gradient, wanted, *_ in run_ranks(_there_and_back, num_ranks, spread, methods, True):
        assert torch.equal(back, expected)
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(
    ("methods", "error"),
    [
        ((Quantized(),), 0.02),
        ((Quantized(dtype="bf16"),), 0.01),
        ((Quantized(dtype="fp16"),), 0.002),
        ((Quantized(dtype="fp8"),), 0.08),
        ((Quantized(dtype="int4", block=8),), 0.25),
        ((Quantized(dtype="int8", backward_dtype="int4", block=16),), 0.3),
        ((lsh(farthest=0.2),), 0.4),
        ((lsh(search="hash", coords=8),), 0.6),
        ((PUBLISHED,), 1.0),
        ((lsh(farthest=0.2), Quantized()), 0.45),
    ],
    ids=str,
)
def test_lossy_settings_come_near(spread, methods, error):
    results = run_ranks(_there_and_back, 2, spread, methods, True)
    assert results[0][4]["rate"] == results[1][4]["rate"]
    for back, expected, gradient, wanted, *_ in results:
        assert (back - expected).norm() <= error * expected.norm()
        assert (gradient - wanted).norm() <= 2 * error * wanted.norm()


def test_every_rank_gets_what_is_sent_to_its_experts():
    for rank, result in enumerate(run_ranks(_there_and_back, 4, "uneven", (), False)):
        counts = [SPREADS["uneven"](source, 4) for source in range(4)]
        assert result[5] == [sum(of_rank[expert] for of_rank in counts) for expert in (2 * rank, 2 * rank + 1)]


def _bytes(rank: int, methods: tuple[Any, ...]) -> tuple[int, int]:
    compressor = ready(TokenCompressor(*methods), EXPERTS, WIDTH)
    rows = clustered((4 * EXPERTS, WIDTH), seed=rank, noise=0.0).requires_grad_()
    sent = dispatch(rows, torch.tensor([4] * EXPERTS), compressor)
    combine(sent.rows * 2, sent).sum().backward()
    compressor.eval()  # what evaluation sends is left out
    sent = dispatch(rows, torch.tensor([4] * EXPERTS), compressor)
    combine(sent.rows, sent)
    return compressor.traffic.wire_bytes, compressor.traffic.dense_bytes


def test_bytes_are_those_that_leave_the_rank():
    numbers = 3 * 8 * (EXPERTS // 4 + 4)  # of rows and tokens, to each of the others
    rows = 3 * 4 * EXPERTS // 4  # to other ranks
    for wire, dense in run_ranks(_bytes, 4, (Quantized(),)):
        assert dense == 4 * rows * 4 * WIDTH
        assert wire == numbers + 4 * rows * (WIDTH + 4)
    for wire, dense in run_ranks(_bytes, 4, (Quantized(dtype="fp32"),)):
        assert wire == numbers + dense


def _refused(rank: int) -> None:
    with pytest.raises(ValueError, match="7 experts cannot be dealt out evenly over 2 ranks"):
        dispatch(torch.zeros(7, 4), torch.ones(7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected floating-point \[n, width\] and int64 \[experts\]"):
        dispatch(torch.zeros(7), torch.ones(8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"rows_per_expert are torch\.int64 \(8, 4\) and"):
        dispatch(torch.zeros(8, 4, dtype=torch.int64), torch.ones(8, dtype=torch.int64))
    for counts in ([1, 1], [-1, 9]):
        with pytest.raises(ValueError, match="expected numbers that add to that"):
            dispatch(torch.zeros(8, 4), torch.tensor(counts))
    sent = dispatch(torch.zeros(8, 4), torch.ones(8, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected 8 rows, as dispatched"):
        combine(torch.zeros(7, 4), sent)
    combine(sent.rows, sent)
    compressor = ready(TokenCompressor(lsh()), 8, 4)
    with pytest.raises(ValueError, match="give every MoE layer a TokenCompressor of its own"):
        dispatch(torch.zeros(4, 4), torch.ones(4, dtype=torch.int64), compressor)
    sent = dispatch(torch.zeros(8, 4), torch.ones(8, dtype=torch.int64), compressor)
    with pytest.raises(ValueError, match="compensate='none'"):
        combine(torch.zeros(len(sent.rows), 3), sent)


def test_what_does_not_fit_is_refused():
    run_ranks(_refused, 2)


def _without_gradient(rank: int) -> list[float]:
    """A rank that got no rows hands back rows that know nothing of what they were made of."""
    counts = torch.tensor([3, 0])  # expert 1, of rank 1, gets none
    rows = clustered((3, 4), seed=rank).requires_grad_()
    sent = dispatch(rows, counts)
    answers = sent.rows * 2 if len(sent.rows) else torch.empty(0, 4)
    combine(answers, sent).sum().backward()
    assert rows.grad is not None
    return rows.grad.flatten().tolist()


def test_backward_runs_on_a_rank_whose_experts_got_nothing():
    assert run_ranks(_without_gradient, 2) == [[2.0] * 12, [2.0] * 12]


FROZEN_ROWS_METHODS = {
    "as they are": (),
    "int8": (Quantized(),),
    "clusters": (lsh(farthest=0.01),),
    "clusters, int4": (lsh(farthest=0.01, compensate="none"), Quantized(dtype="int4", block=2)),
    "means, bf16": (lsh(search="hash", centroid="mean", compensate="both", farthest=0.01), Quantized(dtype="bf16")),
}
"""Exact but for their number formats: rows are equal or far apart."""


def _rows_without_gradient(rank: int, methods: tuple[Any, ...], learns: bool, recompute: bool) -> Any:
    """Experts alone learn, and one that got no rows is left out."""
    counts = torch.tensor([8, 0])  # expert 1, of rank 1, gets none
    weight = torch.full((4,), 2.0, requires_grad=learns)
    compressor = ready(TokenCompressor(*methods), len(counts), 4) if methods else None
    rows = clustered((int(counts.sum()), 4), seed=rank, noise=0.0)

    def there_and_back(rows: torch.Tensor) -> torch.Tensor:
        sent = dispatch(rows, counts, compressor)
        answers = sent.rows * weight if len(sent.rows) else torch.empty(0, 4)
        return combine(answers, sent)

    back = checkpoint(there_and_back, rows, use_reentrant=False) if recompute else there_and_back(rows)
    if learns:
        back.square().sum().backward()
    return back.requires_grad, rows, back.detach(), weight.grad


@pytest.mark.parametrize("recompute", [False, True], ids=["once", "recomputed"])
@pytest.mark.parametrize("methods", FROZEN_ROWS_METHODS)
def test_backward_runs_everywhere_where_rows_have_no_gradient(methods, recompute):
    results = run_ranks(_rows_without_gradient, 2, FROZEN_ROWS_METHODS[methods], True, recompute, timeout=60)
    everything = torch.cat([rows for _, rows, _, _ in results])
    for has_gradient, rows, back, _ in results:
        assert has_gradient
        torch.testing.assert_close(back, 2 * rows, rtol=0.4 if "int4" in methods else 0.02, atol=0.2)
    assert results[1][3] is None  # its expert was left out
    torch.testing.assert_close(results[0][3], 4 * everything.square().sum(0), rtol=0.25, atol=0.5)


@pytest.mark.parametrize("methods", FROZEN_ROWS_METHODS)
def test_answers_have_no_gradient_where_nothing_learns(methods):
    results = run_ranks(_rows_without_gradient, 2, FROZEN_ROWS_METHODS[methods], False, False, timeout=60)
    assert [has_gradient for has_gradient, _, _, _ in results] == [False, False]


def _noted(rank: int) -> tuple[bool, int, int]:
    """Of four ranks only one learns."""
    compressor = TokenCompressor(Quantized(dtype="fp32"))
    weight = torch.ones(4, requires_grad=rank == 2)
    rows = torch.ones(8, 4)
    sent = dispatch(rows, torch.tensor([2] * 4), compressor)
    back = combine(sent.rows * weight, sent)
    back.sum().backward()
    return weight.grad is not None, compressor.traffic.wire_bytes, compressor.traffic.dense_bytes


def test_one_rank_that_learns_is_enough_and_what_is_noted_is_counted():
    numbers, note = 3 * 8 * (1 + 4), 3 * 8
    for rank, (learnt, wire, dense) in enumerate(run_ranks(_noted, 4, timeout=60)):
        assert learnt == (rank == 2)
        assert dense == 3 * 3 * 2 * 4 * 4  # there, back, and the gradient of what came back
        assert wire == dense + numbers + note


def _recomputed(rank: int, reentrant: bool) -> bool:
    """A rank whose experts got nothing has nothing to compute again."""
    counts = torch.tensor([3, 0])
    weight = torch.eye(4, requires_grad=True)

    def there_and_back(rows: torch.Tensor) -> torch.Tensor:
        sent = dispatch(rows, counts)
        answers = torch.tanh(sent.rows @ weight) if len(sent.rows) else sent.rows
        return combine(answers, sent)

    gradients = []
    for recompute in (False, True):
        rows = clustered((3, 4), seed=rank).requires_grad_()
        made = checkpoint(there_and_back, rows, use_reentrant=reentrant) if recompute else there_and_back(rows)
        made.square().sum().backward()
        assert rows.grad is not None
        gradients.append(rows.grad)
    return torch.equal(*gradients)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_with_ranks_whose_experts_got_nothing(reentrant):
    assert run_ranks(_recomputed, 2, reentrant, timeout=60) == [True, True]


def _recomputed_late(rank: int) -> str:
    """Two passes before the first one's gradient. Rank 1 has no tokens and its expert none: nothing differs there."""
    counts = torch.tensor([24 if rank == 0 else 0, 0])
    compressor = TokenCompressor(LSH(rate=0.3))

    def there_and_back(rows: torch.Tensor) -> torch.Tensor:
        sent = dispatch(rows, counts, compressor)
        return combine(sent.rows.square(), sent)

    with pytest.raises(RuntimeError) as error:
        for step in range(20):
            rows = [clustered((int(counts[0]), 4), seed=2 * step + late).requires_grad_() for late in (0, 1)]
            for made in [checkpoint(there_and_back, one, use_reentrant=False) for one in rows]:
                made.sum().backward()
    return str(error.value)


def test_a_pass_that_is_repeated_too_late_ends_on_every_rank():
    one, other = run_ranks(_recomputed_late, 2, timeout=60)
    assert "Recomputed values" in one or "repeated a pass with other clusters" in one
    assert "repeated a pass with other clusters of tokens; with moe.LSH each backward pass must come before" in other


def _autocast(rank: int) -> tuple[torch.dtype, bool]:
    """A rank whose experts got nothing hands back another dtype."""
    rows = clustered((3, 4), seed=rank).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        sent = dispatch(rows, torch.tensor([3, 0]))
        answers = sent.rows @ torch.eye(4) if len(sent.rows) else sent.rows
        back = combine(answers, sent)
    back.sum().backward()
    return back.dtype, bool((back - rows).norm() < 0.02 * rows.norm() and (rows.grad == 1).all())


def test_answers_travel_in_the_dtype_of_the_rows():
    assert run_ranks(_autocast, 2, timeout=60) == [(torch.float32, True)] * 2


def _wider(rank: int) -> torch.Size:
    compressor = ready(TokenCompressor(lsh(compensate="none"), Quantized()), 2, 4)
    sent = dispatch(clustered((6, 4), seed=rank), torch.tensor([3, 3]), compressor)
    return combine(sent.rows.repeat(1, 2), sent).shape


def test_experts_may_change_the_width_without_compensation():
    assert run_ranks(_wider, 2) == [(6, 8), (6, 8)]
