"""The fused passes: equal to the plain formulas on every instruction set, for any shape, stride and thread count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commcomp import _native
from commcomp.compressors import native
from commcomp.compressors.native import fused_batch
from commcomp.compressors.wire import RowFormat, Section

SETS = _native.instruction_sets()
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 1), (3, 17, 33, 3), (1, 64, 64, 4), (2, 100, 7, 5), (2, 9, 130, 9), (1, 70, 200, 16)]


def batch_of(count: int, rows: int, columns: int, rank: int, gap: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Gradient and residual as views into larger memory, `gap` values apart, and factors."""
    generator = torch.Generator().manual_seed(seed)

    def matrices() -> torch.Tensor:
        step = rows * columns + gap
        flat = torch.randn(3 + count * step, generator=generator)
        return flat[3:].as_strided((count, rows, columns), (step, columns, 1), 3)

    return {
        "gradient": matrices(),
        "residual": matrices(),
        "left": torch.randn(count, rank, rows, generator=generator),
        "right": torch.randn(count, rank, columns, generator=generator),
    }


def passes(values: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Every pass in turn; what each gave."""
    gradient, residual, left, right = (values[key] for key in ("gradient", "residual", "left", "right"))
    fused = fused_batch(gradient, residual, left.shape[1])
    assert fused is not None
    gave = {"P": fused.left_factor(right, scale), "Q": fused.right_factor(left, scale, form=False)}
    gave["untouched"] = residual.clone()
    gave["Q formed"] = fused.right_factor(left, scale, form=True)
    gave["M"] = residual.clone()
    fused.subtract(left, right)
    gave["kept"] = residual.clone()
    fused.reconstruct(left, right)
    gave["decoded"] = gradient.clone()
    return gave


def expected(values: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    gradient, residual, left, right = (values[key].double() for key in ("gradient", "residual", "left", "right"))
    total, product = gradient + scale * residual, left.mT @ right
    return {
        "P": right @ total.mT,
        "Q": left @ total,
        "untouched": residual,
        "Q formed": left @ total,
        "M": total,
        "kept": total - product,
        "decoded": product,
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gap", [0, 5])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_passes_are_the_formulas(instruction_set, shape, gap, scale):
    values = batch_of(*shape, gap=gap)
    exact = expected(values, scale)
    around = {key: values[key].untyped_storage().tolist() for key in ("gradient", "residual")} if gap else {}
    gave = passes(values, scale)
    for key, value in gave.items():
        assert torch.allclose(value.double(), exact[key], atol=1e-4, rtol=1e-4), key
    for key, before in around.items():  # nothing between the matrices was written
        view, flat = values[key], torch.tensor(before, dtype=torch.uint8)
        touched = torch.zeros(len(before) // 4, dtype=torch.bool).as_strided(view.shape, view.stride(), 3).fill_(True)
        outside = ~touched.as_strided((len(before) // 4,), (1,), 0)
        now = torch.tensor(view.untyped_storage().tolist(), dtype=torch.uint8).view(-1, 4)
        assert torch.equal(now[outside], flat.view(-1, 4)[outside])


@pytest.mark.parametrize("shape", SHAPES)
def test_threads_change_no_bit(instruction_set, three_threads, shape):
    threaded = passes(batch_of(*shape), 0.5)
    torch.set_num_threads(1)
    for key, value in passes(batch_of(*shape), 0.5).items():
        assert torch.equal(value, threaded[key]), key


def test_many_threads_and_long_matrices_are_cut_right(three_threads):
    values = batch_of(2, 700, 900, 3)
    exact = expected(values, 1.0)
    for key, value in passes(values, 1.0).items():
        assert torch.allclose(value.double(), exact[key], atol=1e-3), key


@pytest.mark.skipif("avx512" not in SETS, reason="needs AVX2 and AVX-512")
def test_ranks_with_different_vectors_decode_the_same_bits():
    decoded = []
    for name in ("avx2", "avx512"):
        _native.use(name)
        decoded.append(passes(batch_of(2, 33, 70, 7), 1.0)["decoded"])
    assert torch.equal(*decoded)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_stay_in_their_row_and_column(instruction_set, bad):
    values = batch_of(2, 20, 40, 3)
    values["gradient"][1, 4, 7] = bad
    fused = fused_batch(values["gradient"], values["residual"], 3)
    left, right = fused.left_factor(values["right"], 1.0), fused.right_factor(values["left"], 1.0, form=False)
    assert not left[1, :, 4].isfinite().any() and not right[1, :, 7].isfinite().any()
    assert left[0].isfinite().all() and right[0].isfinite().all()
    assert left[1, :, :4].isfinite().all() and right[1, :, 8:].isfinite().all()


def test_what_is_not_plain_fp32_is_left_to_torch():
    values = torch.zeros(2, 4, 6)
    assert fused_batch(values, values.clone(), 2) is not None
    assert fused_batch(values.bfloat16(), values, 2) is None
    assert fused_batch(values, values.double(), 2) is None
    assert fused_batch(values.mT, values.mT, 2) is None
    assert fused_batch(values, torch.zeros(2, 4, 5), 2) is None


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (torch.zeros(2, 3, 6), r"\(2, 3, 6\).*expected \(2, 2, 6\)"),
        (torch.zeros(2, 2, 6).double(), "float64.*expected"),
        (torch.zeros(2, 6, 2).mT, "strides.*contiguous"),
    ],
)
def test_wrong_factors_are_named(factor, message):
    fused = fused_batch(torch.zeros(2, 4, 6), torch.zeros(2, 4, 6), 2)
    with pytest.raises(ValueError, match=message):
        fused.left_factor(factor, 1.0)


def test_unknown_instruction_sets_are_refused():
    with pytest.raises(ValueError, match="'mmx' is not usable"):
        _native.use("mmx")


def test_small_batches_start_no_thread(three_threads, monkeypatch):
    monkeypatch.setattr(native, "VALUES_A_THREAD", 1000)
    assert [fused_batch(*torch.zeros(2, 1, size, 10), 1)._threads() for size in (10, 199, 200, 900)] == [1, 1, 2, 3]


def test_without_it_torch_serves(monkeypatch):
    monkeypatch.setattr(native, "available", False)
    assert fused_batch(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), 1) is None
    assert native.arithmetic(torch.device("cpu")) == "torch"


@pytest.mark.parametrize("payload", [torch.zeros(2, 27, dtype=torch.uint8), torch.zeros(2, 28, dtype=torch.int8)])
def test_payloads_of_other_sizes_and_dtypes_are_refused(payload):
    """[2, 10] int8 rows: 20 bytes of codes, 8 of scales."""
    with pytest.raises(ValueError, match=r"\[2, 10\] take 28"):
        native.decode_int8_rows(payload, 2, 10, 20, mean=True)
    with pytest.raises(ValueError, match=r"\[2, 10\] take 28"):
        native.encode_int8_rows(payload[0], torch.zeros(2, 10), 20)
    with pytest.raises(ValueError, match="stride 2"):
        native.encode_int8_rows(torch.zeros(56, dtype=torch.uint8)[::2], torch.zeros(2, 10), 20)
    with pytest.raises(ValueError, match="float64"):
        native.encode_int8_rows(torch.zeros(28, dtype=torch.uint8), torch.zeros(2, 10).double(), 20)


def wire_results(values: torch.Tensor) -> list[torch.Tensor]:
    """Payloads of [N, rows, length], what they decode to, and their mean."""
    ranks, rows, length = values.shape
    section = Section(rows, length, RowFormat("int8"))
    payloads = torch.zeros(ranks, section.encoded_bytes(), dtype=torch.uint8)
    for payload, block in zip(payloads, values, strict=True):
        section.encode_into(payload, block)
    decoded = [section.decode(payload) for payload in payloads]
    return [payloads, *decoded, section.decode_mean(payloads)]


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_int8_rows_are_those_of_torchs_operations_to_the_bit(data):
    ranks, rows, length = (data.draw(st.integers(1, high)) for high in (3, 3, 40))
    seed, size = data.draw(st.integers(0, 1000)), data.draw(st.sampled_from([1e-42, 1e-37, 1.0, 1e30, 3e38]))
    values = torch.randn(ranks, rows, length, generator=torch.Generator().manual_seed(seed)) * size
    special = data.draw(st.lists(st.floats(width=32), max_size=3))
    for place, number in enumerate(special):
        values.view(-1)[place * 7 % values.numel()] = number
    halves = data.draw(st.booleans())
    if halves:  # whole and half steps, where rounding to even shows
        values = torch.randint(-254, 255, values.shape, generator=torch.Generator().manual_seed(seed)) / 2.0
        values[..., 0] = 127.0
    native_results = wire_results(values)
    before, native.available = native.available, False
    try:
        torch_results = wire_results(values)
    finally:
        native.available = before
    for ours, theirs in zip(native_results, torch_results, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(0.0), theirs.nan_to_num(0.0))
