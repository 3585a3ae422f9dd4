"""Residuals kept in int8: what is lost, and that nothing is lost twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commcomp.compressors import native
from commcomp.error_feedback import ParameterStore
from commcomp.residuals import ValueResiduals, for_saving, packed, residual_spec, unpacked

CPU = torch.device("cpu")


def _random(shape: tuple[int, ...], seed: int, exponent: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent


@given(
    rows=st.integers(1, 3), length=st.integers(1, 400), seed=st.integers(0, 99), exponent=st.integers(-120, 100)
)
def test_what_was_rounded_once_is_rounded_no_more(rows, length, seed, exponent):
    shape = (rows, length)
    spec = residual_spec("int8", shape)
    values = _random(shape, seed, exponent)
    kept = packed(values, spec, name="w", step=seed)
    once = unpacked(kept, shape)
    blocks = torch.nn.functional.pad(values, (0, -length % 128)).unflatten(1, (-1, 128))
    scale = (blocks.abs().amax(dim=-1, keepdim=True) / 127).expand_as(blocks).flatten(1)[:, :length]
    assert ((once - values).abs() <= 2 * scale + 1e-44).all()
    saved = for_saving(kept, shape)
    assert saved.dtype == torch.bfloat16 and torch.equal(saved.float(), once)
    again = packed(saved, spec, name="w", step=seed + 1)
    assert torch.equal(unpacked(again, shape), once)


@pytest.mark.parametrize("setting", ["fp32", "bf16", "int8"])
def test_small_pieces_beside_a_large_value_add_up(setting):
    """In every block one value of 1 takes the range; the others grow by less than half a code a step."""
    residuals = ValueResiduals(ParameterStore(), ["w"], 1, [(40, 128)], setting, CPU)
    total = torch.zeros(1, 40 * 128)
    total.view(40, 128)[:, 0] = 1.0
    piece = torch.full_like(total, 1e-3)
    piece.view(40, 128)[:, 0] = 0.0
    residuals.keep(total, True, 0)
    for step in range(1, 101):
        residuals.keep(residuals.values(1.0) + piece, True, step)
    small = residuals.values(1.0).view(40, 128)[:, 1:].float()
    assert float(small.mean()) == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize("with_native", [True, False])
def test_whole_codes_are_never_rounded_up(with_native, monkeypatch):
    if not with_native:
        monkeypatch.setattr(native, "available", False)
    shape = (1, 1 << 21)
    codes = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0)).float()
    codes.view(-1, 128)[:, 0] = 127.0
    spec = residual_spec("int8", shape)
    for seed in range(4):
        assert torch.equal(unpacked(packed(codes, spec, name="w", step=seed), shape), codes)


def test_bytes_and_none():
    assert residual_spec("none", (2, 300)) is None
    spec = residual_spec("int8", (2, 300))
    assert spec.shape == (2, 3 * 128 + 8) and spec.dtype == torch.uint8
