"""No token sees a later one: later tokens are changed, and what earlier ones get stays the same to the bit.

Experts here work row by row, so that the number of rows in a matrix product cannot show in the last bit.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commcomp.moe import LSH, MoELayer, Quantized, TokenCompressor
from tests.moe.layers import PUBLISHED, RowByRow, clustered, lsh, ready
from tests.ranks import run_ranks

BATCH, LENGTH, WIDTH, EXPERTS = 3, 24, 16, 4

SAFE = [
    (lsh(),),
    (lsh(compensate="both"),),
    (lsh(compensate="none", farthest=1.5),),
    (lsh(search="hash", coords=8),),
    (lsh(search="hash", coords=8, farthest=None, compensate="both"),),
    (lsh(), Quantized()),
    (Quantized(dtype="int4", block=8),),
]


def _layer(methods: tuple[LSH | Quantized, ...], **arguments: float) -> MoELayer:
    torch.manual_seed(0)
    compressor = ready(TokenCompressor(*methods), EXPERTS, WIDTH)
    layer = MoELayer(WIDTH, 8, EXPERTS, 2, compressor=compressor, **arguments)
    for name in layer.experts:
        layer.experts[name] = RowByRow(WIDTH)
    torch.nn.init.normal_(layer.gate.weight)
    return layer


def _outputs(layer: MoELayer, tokens: torch.Tensor) -> torch.Tensor:
    """One pass from the state that `_layer` left."""
    state = layer.compressor.get_extra_state()
    made = layer(tokens)[0].detach()
    layer.compressor.set_extra_state(state)
    return made


def _changed(tokens: torch.Tensor, at: int, seed: int, everywhere: bool) -> torch.Tensor:
    """Other tokens from position `at` on, in all sequences or in the last one."""
    other = clustered(tuple(tokens.shape), seed=seed + 1, noise=0.4)
    changed = tokens.clone()
    if everywhere:
        changed[:, at:] = other[:, at:]
    else:
        changed[-1, at:] = other[-1, at:]
    return changed


@pytest.mark.parametrize("methods", SAFE, ids=str)
@given(seed=st.integers(0, 1 << 20), at=st.integers(1, LENGTH - 1), everywhere=st.booleans())
@settings(max_examples=15, deadline=None)
def test_earlier_outputs_stay_the_same_to_the_bit(methods, seed, at, everywhere):
    layer = _layer(methods)
    tokens = clustered((BATCH, LENGTH, WIDTH), seed=seed, noise=0.3)
    before = _outputs(layer, tokens)
    after = _outputs(layer, _changed(tokens, at, seed, everywhere))
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.equal(before[-1, at:], after[-1, at:])


@pytest.mark.parametrize("methods", [(PUBLISHED,), (lsh(centroid="mean"),)], ids=str)
def test_means_let_later_tokens_be_seen(methods):
    """What the settings for encoders are not safe from; the test above would find it."""
    layer = _layer(methods)
    tokens = clustered((BATCH, LENGTH, WIDTH), seed=3, noise=0.3)
    before, after = _outputs(layer, tokens), _outputs(layer, _changed(tokens, 12, 3, True))
    assert not torch.equal(before[:, :12], after[:, :12])


@pytest.mark.parametrize("capacity_factor", [0.5, 4.0])
def test_capacity_drops_the_last_in_time(capacity_factor):
    layer = _layer((lsh(),), capacity_factor=capacity_factor)
    tokens = clustered((BATCH, LENGTH, WIDTH), seed=4, noise=0.3)
    before, after = _outputs(layer, tokens), _outputs(layer, _changed(tokens, 12, 4, True))
    assert torch.equal(before[:, :12], after[:, :12])
    assert (_outputs(layer, tokens) == 0).all(-1).any() == (capacity_factor < 1)


def _on_ranks(rank: int) -> bool:
    layer = _layer((lsh(), Quantized()))
    tokens = clustered((BATCH, LENGTH, WIDTH), seed=rank, noise=0.3)
    before = _outputs(layer, tokens)
    after = _outputs(layer, _changed(tokens, 9, rank, True))
    return torch.equal(before[:, :9], after[:, :9]) and not torch.equal(before, after)


def test_on_several_ranks_too():
    assert run_ranks(_on_ranks, 2) == [True, True]
