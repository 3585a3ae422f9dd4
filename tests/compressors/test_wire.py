"""Number formats on the wire: sizes, round trips, error bounds, and what is not finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commcomp.compressors.wire import RowFormat, Section

DTYPES = ("fp32", "fp16", "bf16", "fp8", "int8")
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1}
RELATIVE_ERROR = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8, "fp8": 2.0**-4 * 1.001}
SMALLEST_STEP = {"fp32": 0.0, "fp16": 2.0**-36, "bf16": 0.0, "fp8": 0.0}
"""Relative to the largest value: what lies below fp16's own exponents."""


def round_trip(values: torch.Tensor, dtype: str, filler: int = 0) -> torch.Tensor:
    rows, length = values.shape[-2:]
    section = Section(rows, length, RowFormat(dtype))
    data = torch.full((*values.shape[:-2], section.encoded_bytes()), filler, dtype=torch.uint8)
    section.encode_into(data, values)
    return section.decode(data)


@st.composite
def blocks(draw) -> torch.Tensor:
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,)]))
    rows, length = draw(st.integers(0, 4)), draw(st.integers(0, 9))
    count = torch.Size((*batch, rows, length)).numel()
    number = st.floats(-60000.0, 60000.0, width=32, allow_subnormal=False)
    return torch.tensor(draw(st.lists(number, min_size=count, max_size=count)), dtype=torch.float32).view(
        *batch, rows, length
    )


@pytest.mark.parametrize("dtype", DTYPES)
@given(values=blocks())
@settings(max_examples=80, deadline=None)
def test_round_trip_is_within_the_formats_rounding(dtype, values):
    decoded = round_trip(values, dtype)
    assert decoded.shape == values.shape and decoded.dtype == torch.float32
    error = (decoded - values).abs()
    if dtype == "int8":
        step = values.abs().amax(dim=-1, keepdim=True) / 127 if values.shape[-1] else values
        bound = step * (0.5 + 1e-4) + 1e-36
    else:
        largest = values.abs().amax() if values.numel() else 0.0
        bound = values.abs() * RELATIVE_ERROR[dtype] + SMALLEST_STEP[dtype] * largest + 1e-36
        if dtype == "fp16" and values.shape[-1]:  # its smallest step goes with the row's largest value
            bound = bound + values.abs().amax(dim=-1, keepdim=True) * 2.0**-38
        if dtype == "fp8" and values.shape[-1]:  # half of 2^-9, with 448 for the row's largest value
            bound = bound + values.abs().amax(dim=-1, keepdim=True) * 2.0**-10 / 448 * 1.001
    assert (error <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(values=blocks())
@settings(max_examples=40, deadline=None)
def test_decoding_reads_only_what_encoding_wrote(dtype, values):
    assert torch.equal(round_trip(values, dtype, filler=0), round_trip(values, dtype, filler=255))


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(0, 5), length=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_encoding_stays_within_encoded_bytes_and_needs_them(dtype, rows, length):
    section = Section(rows, length, RowFormat(dtype))
    size = section.encoded_bytes()
    exact = rows * length * ITEM_BYTES[dtype]
    scales = 4 * rows if dtype in ("int8", "fp8", "fp16") else 0
    assert size % 4 == 0 and exact + scales <= size < exact + scales + 4
    values = torch.arange(1.0, 1 + rows * length).view(rows, length)
    data = torch.full((8 + size + 8,), 77, dtype=torch.uint8)
    section.encode_into(data[8 : 8 + size], values)
    assert (data[:8] == 77).all() and (data[8 + size :] == 77).all()
    assert torch.allclose(section.decode(data[8 : 8 + size]), values, rtol=0.07 if dtype == "fp8" else 0.01, atol=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_encodes_as_its_members_do(dtype):
    values = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    decoded = round_trip(values, dtype)
    for i in range(3):
        for j in range(2):
            assert torch.equal(decoded[i, j], round_trip(values[i, j], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_stay_non_finite_and_in_their_row(dtype, bad):
    values = torch.arange(1.0, 16.0).view(3, 5)
    clean = round_trip(values, dtype)
    values[1, 2] = bad
    decoded = round_trip(values, dtype)
    assert torch.equal(decoded[[0, 2]], clean[[0, 2]])
    assert not decoded[1, 2].isfinite()
    if dtype in ("int8", "fp8"):
        assert not decoded[1].isfinite().any()
    else:
        assert torch.equal(decoded[1, [0, 1, 3, 4]], clean[1, [0, 1, 3, 4]])


def test_int8_keeps_zero_rows_zero_and_the_largest_value_of_a_row():
    values = torch.tensor([[0.0, 0.0, 0.0], [3.0, -1.0, 0.5], [-1e-20, 1e-21, 0.0], [3e38, -3e38, 1.0]])
    decoded = round_trip(values, "int8")
    assert (decoded[0] == 0).all()
    assert torch.allclose(decoded[:, 0], values[:, 0], rtol=1e-6)
    assert decoded.isfinite().all()


def test_int8_codes_have_no_bias():
    values = torch.rand(1, 200_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    error = round_trip(values, "int8") - values
    assert abs(float(error.mean())) < 3 * float(error.std()) / 200_000**0.5


@given(values=st.lists(st.floats(-(2.0**-120), 2.0**-120, width=32), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_int8_of_denormal_rows_is_never_worse_than_sending_nothing(values):
    row = torch.tensor([values])
    assert ((round_trip(row, "int8") - row).abs() <= row.abs().max()).all()


@pytest.mark.parametrize("units", [129, 160, 190])
def test_int8_of_a_denormal_row_keeps_its_sign(units):
    value = units * torch.tensor(2.0**-149)  # the scale, value / 127, rounds to one unit
    decoded = round_trip(value.view(1, 1), "int8")
    assert 0 <= float(decoded) <= 2 * float(value)


@pytest.mark.parametrize("largest", [1e5, 1e30, 3e38])
def test_no_format_overflows(largest):
    values = torch.tensor([[largest, -largest, 1.0]])
    for dtype in DTYPES:
        assert torch.allclose(round_trip(values, dtype), values, rtol=0.01, atol=1e-5 * largest)


def test_an_infinity_in_a_float_format_stays_alone():
    values = torch.tensor([[1.0, float("inf"), -2.0, float("nan")]])
    for dtype in ("fp32", "fp16", "bf16"):
        assert torch.equal(round_trip(values, dtype).isfinite(), values.isfinite())
        assert torch.equal(round_trip(values, dtype)[:, ::2], values[:, ::2])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("exponent", [-100, -60, -24, 0, 17, 60, 100])
def test_what_the_format_holds_crosses_exactly_at_any_scale(dtype, exponent):
    """fp16 rows are scaled by a power of two, which rounds nothing."""
    values = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    values = values.to(torch.float16 if dtype == "fp16" else torch.bfloat16).float() * 2.0**exponent
    assert torch.equal(round_trip(values, dtype), values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_magnitude_that_fp32_holds_stays_finite(dtype):
    values = (10.0 ** torch.arange(-44.0, 38.5, 0.5).double()).float().view(-1, 1) * torch.tensor([[1.0, -0.5, 0.25]])
    decoded = round_trip(values, dtype)
    assert decoded.isfinite().all()
    normal = values[:, 0] > 1e-34
    assert torch.allclose(decoded[normal], values[normal], rtol=0.02)
