"""The sketch: linear, exact below its load, honest above it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commcomp.compressors.sketch import SAFE_LOAD, SketchShape, decode, encode


def sparse_ranks(length: int, density: float, ranks: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.where(torch.rand(length, generator=generator) < density, torch.randn(length, generator=generator), 0.0)
        for _ in range(ranks)
    ]


def sketch_of(values: torch.Tensor, shape: SketchShape) -> torch.Tensor:
    positions = values.nonzero().view(-1)
    return encode(values[positions], positions, shape)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.3])
def test_the_sum_of_sketches_decodes_to_the_sum_at_a_safe_load(ranks, density):
    length = 200_000
    values = sparse_ranks(length, density, ranks, seed=ranks)
    union = torch.stack([value != 0 for value in values]).any(dim=0).nonzero().view(-1)
    shape = SketchShape(length, round(len(union) / SAFE_LOAD), seed=1)
    decoded, known = decode(sum(sketch_of(value, shape) for value in values), union, shape)
    assert known.float().mean() > 0.999
    exact = torch.stack(values).double().sum(dim=0)[union]
    assert (decoded[known] - exact[known]).abs().max() < 1e-4
    assert (decoded[~known] == 0).all()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_called_decoded_is_right_at_any_load(data):
    length = data.draw(st.integers(1, 5000))
    cells = data.draw(st.integers(1, 3000))
    values = sparse_ranks(length, data.draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])), 1, data.draw(st.integers(0, 99)))[
        0
    ]
    positions = values.nonzero().view(-1)
    superfluous = torch.full((data.draw(st.integers(0, 3)),), length)
    shape = SketchShape(length, cells, seed=data.draw(st.integers(0, 5)))
    decoded, known = decode(sketch_of(values, shape), torch.cat((positions, superfluous)), shape)
    assert not known[len(positions) :].any()
    known, decoded = known[: len(positions)], decoded[: len(positions)]
    assert torch.allclose(decoded[known], values[positions][known], atol=1e-3)
    assert (decoded[~known] == 0).all()


def test_positions_that_nobody_used_decode_to_nought():
    shape = SketchShape(1000, 600)
    values = torch.zeros(1000)
    values[[5, 500]] = torch.tensor([2.0, -3.0])
    positions = torch.arange(0, 1000, 5)
    decoded, known = decode(sketch_of(values, shape), positions, shape)
    assert known.all()
    assert torch.equal(decoded.nonzero().view(-1), torch.tensor([1, 100]))


def test_overload_is_told_not_guessed():
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    shape = SketchShape(20_000, 10_000)
    _, known = decode(sketch_of(values, shape), torch.arange(20_000), shape)
    assert known.float().mean() < 0.2


def test_tables_are_reproducible_and_differ_by_seed():
    positions = torch.arange(0, 5000, 7)
    cells, signs = SketchShape(5000, 900, seed=4).places(positions)
    again, _ = SketchShape(5000, 900, seed=4).places(positions)
    other, _ = SketchShape(5000, 900, seed=5).places(positions)
    assert torch.equal(cells, again) and not torch.equal(cells, other)
    shape = SketchShape(5000, 900)
    thirds = cells // shape.third
    assert torch.equal(thirds, torch.tensor([[0], [1], [2]]).expand_as(thirds))  # never twice in one cell
    assert abs(float(signs.mean())) < 0.2 and shape.numel >= 900
