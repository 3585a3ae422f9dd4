"""Ranks that send tokens differently find out together, with what differs, and do not hang."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from commcomp.moe import LSH, Quantized, TokenCompressor, combine, dispatch
from tests.moe.layers import ready
from tests.ranks import run_ranks

EXPERTS, WIDTH = 6, 8


def _pass(compressor: TokenCompressor | None, *, experts: int = EXPERTS, width: int = WIDTH, **how: Any) -> None:
    rows = torch.ones(2 * experts, width, **how)
    sent = dispatch(rows, torch.full((experts,), 2), compressor)
    combine(sent.rows, sent)


def _compressor(*methods: Any) -> TokenCompressor:
    return ready(TokenCompressor(*methods), EXPERTS, WIDTH)


def _different(rank: int, what: str, before: bool) -> str:
    if before:  # all alike at first
        _pass(_compressor(Quantized()))
    odd = rank == 1
    compressor, arguments = _compressor(Quantized()), {}
    if what == "settings":
        compressor = _compressor(Quantized(dtype="int4" if odd else "int8", block=8))
    elif what == "method":
        compressor = _compressor(LSH(rate=None)) if odd else _compressor(Quantized())
    elif what == "none":
        compressor = None if odd else compressor
    elif what == "evaluation":
        compressor.train(not odd)
    elif what == "width":
        arguments = {"width": WIDTH + 2 * odd}
    elif what == "width, with clusters":
        compressor, arguments = _compressor(LSH(rate=None)), {"width": WIDTH + 2 * odd}
    elif what == "dtype":
        arguments = {"dtype": torch.float64 if odd else torch.float32}
    elif what == "gradient":
        arguments = {"requires_grad": odd}
    recorded = not (what == "recording" and odd)
    with pytest.raises(ValueError) as error, torch.set_grad_enabled(recorded):
        _pass(compressor, **arguments)
    _pass(None)  # what follows is not mixed up with what was left
    return str(error.value)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("settings", "settings of the TokenCompressor"),
        ("method", "settings of the TokenCompressor"),
        ("none", "settings of the TokenCompressor"),
        ("evaluation", "whether tokens are compressed now"),
        ("width", "width of a token's row"),
        ("width, with clusters", "width of a token's row"),
        ("dtype", "dtype of rows"),
        ("gradient", "whether rows require gradients"),
        ("recording", "whether gradients are recorded"),
    ],
)
def test_what_differs_is_named_on_every_rank(what: str, named: str, before: bool) -> None:
    messages = run_ranks(_different, 3, what, before, timeout=60)
    assert len(set(messages)) == 1
    assert f"ranks disagree on {named}" in messages[0] and "rank 1" in messages[0]
    assert "give every rank the same layers, settings and dtypes" in messages[0]


def _different_while_learning(rank: int, what: str) -> str:
    """In a pass after which ranks take means of all ranks' rows: none may wait for others in that."""
    compressor = TokenCompressor(LSH())
    _pass(compressor)
    if rank == 1 and what == "evaluation":
        compressor.eval()
    elif rank == 1:
        compressor = _compressor(LSH())
    with pytest.raises(ValueError) as error:
        _pass(compressor)
    _pass(None)
    return str(error.value)


@pytest.mark.parametrize(
    ("what", "named"),
    [("evaluation", "whether tokens are compressed now"), ("state", "training passes of the TokenCompressor")],
)
def test_what_differs_is_found_before_anything_is_learnt(what: str, named: str) -> None:
    messages = run_ranks(_different_while_learning, 2, what, timeout=60)
    assert len(set(messages)) == 1 and f"ranks disagree on {named}" in messages[0]


def test_numbers_of_experts_are_compared_before_anything_is_sent() -> None:
    messages = run_ranks(_different_numbers, 2, timeout=60)
    assert len(set(messages)) == 1 and "ranks disagree on number of experts" in messages[0]


def _different_numbers(rank: int) -> str:
    with pytest.raises(ValueError) as error:
        _pass(None, experts=4 + 4 * rank)
    return str(error.value)


def _different_numbers_in_a_later_world(rank: int) -> str:
    """What was agreed on in a group of the same name says nothing of this one."""
    for experts in (4, 8):
        _pass(None, experts=experts)
    name = dist.group.WORLD.group_name
    address = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.PrefixStore("later", address), rank=rank, world_size=2)
    assert dist.group.WORLD.group_name == name
    return _different_numbers(rank)


def test_a_later_group_agrees_anew():
    messages = run_ranks(_different_numbers_in_a_later_world, 2, timeout=60)
    assert all("ranks disagree on number of experts" in message for message in messages)
