"""Native blocks and sparse rows: bytes and values of torch's operations, on every instruction set and any threads."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commcomp import _native
from commcomp.compressors import native
from commcomp.compressors.native_codecs import BlockCode, SparseCode
from commcomp.compressors.wire import Format, Section
from commcomp.compressors.wire_blocks import BlockFormat
from commcomp.compressors.wire_sparse import SparseFormat
from tests.reference.given_gradients import same_bits

SETS = _native.instruction_sets()
EXACT = [BlockFormat(8, 16), BlockFormat(4, 16), BlockFormat(8, 2), BlockFormat(4, 6), BlockFormat(8, 100)]
SPARSE = [SparseFormat(density, values) for density in (0.004, 0.05, 0.4) for values in ("fp32", "bf16", "int8")]
ROTATED = [BlockFormat(bits, block, rotate=True) for bits in (8, 4) for block in (2, 8, 32, 1024)]
RANDOM = [BlockFormat(8, 64, stochastic=True), BlockFormat(4, 48, stochastic=True)]


@contextmanager
def torchs_operations():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "available", False)
        yield


def results(form: Format, values: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """The payloads of [N, rows, length], what they decode to, their mean, and what is left after subtracting them."""
    section = Section(*values.shape[1:], form)
    payloads = torch.full((len(values), section.encoded_bytes()), 77, dtype=torch.uint8)
    section.encode_into(payloads, values, torch.Generator().manual_seed(seed))
    total, inside = values * 1.5, values * 1.5
    rest = torch.empty_like(total)
    section.subtract_decoded(rest, total, payloads)
    section.subtract_decoded(inside, inside, payloads)
    assert torch.equal(rest.nan_to_num(), inside.nan_to_num())
    return [payloads, section.decode(payloads), section.decode_mean(payloads), rest]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def batches(draw, longest: int) -> torch.Tensor:
    """[ranks, rows, length] of any size, with zero rows, denormals, single huge and bad values, and halves of steps."""
    shape = [draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, longest))]
    size = draw(st.sampled_from([0.0, 1e-44, 1e-39, 3e-37, 1e-36, 1.0, 1e30, 3e38]))
    values = normal(*shape, seed=draw(st.integers(0, 999))).clamp(-1, 1) * size
    if draw(st.booleans()):  # where rounding to even shows
        values = torch.randint(-254, 255, shape, generator=torch.Generator().manual_seed(shape[2])) / 2.0
        values[..., 0] = 127.0
    for _ in range(draw(st.integers(0, 3))):
        values.view(-1)[draw(st.integers(0, values.numel() - 1))] = draw(st.floats(width=32))
    return values


def require_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor], section: Section, bad: bool) -> None:
    """To the bit; but not which NaN it is, in values or in scales."""
    for left, right in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(left.isnan(), right.isnan())
        assert same_bits(left.nan_to_num(0.0, 1e38, -1e38), right.nan_to_num(0.0, 1e38, -1e38))
    if not bad:
        assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("form", EXACT, ids=str)
@given(values=batches(130))
@settings(max_examples=100, deadline=None)
def test_blocks_are_those_of_torchs_operations(instruction_set, form, values):
    ours = results(form, values)
    with torchs_operations():
        theirs = results(form, values)
    require_equal(ours, theirs, Section(*values.shape[1:], form), not values.isfinite().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", EXACT, ids=str)
def test_a_bad_block_has_the_scale_nan_and_codes_of_nought(instruction_set, form, bad):
    values = normal(1, 2, 200)
    values[0, 1, 57] = bad
    (payload,), *_ = results(form, values)
    blocks = -(-200 // form.block)
    number, block_bytes = blocks + 57 // form.block, form.block * form.bits // 8
    scales = payload[-(-2 * blocks * block_bytes // 4) * 4 :][: 4 * blocks].view(torch.bfloat16)
    assert scales.isnan().nonzero().flatten().tolist() == [number]
    assert not payload[number * block_bytes : (number + 1) * block_bytes].any()


@pytest.mark.parametrize("form", SPARSE, ids=str)
@given(values=batches(900), equal=st.booleans())
@settings(max_examples=40, deadline=None)
def test_sparse_rows_are_those_of_torchs_operations(instruction_set, form, values, equal):
    if equal and values.shape[-1] > 300:  # whole blocks of values that all reach the threshold, more than find places
        values[..., :300] = 3.0
    ours = results(form, values)
    with torchs_operations():
        theirs = results(form, values)
    require_equal(ours, theirs, Section(*values.shape[1:], form), not values.isfinite().all())


@pytest.mark.parametrize("form", [SparseFormat(0.01, "fp32"), SparseFormat(0.3, "fp32")], ids=str)
def test_any_bytes_decode_as_with_torchs_operations(instruction_set, form):
    generator = torch.Generator().manual_seed(0)
    section = Section(2, 700, form)
    for _ in range(50):
        data = torch.randint(0, 256, (3, section.encoded_bytes()), dtype=torch.uint8, generator=generator)
        data[:, 3::4] &= 0x3F  # values that are numbers
        ours = [section.decode(data), section.decode_mean(data)]
        with torchs_operations():
            theirs = [section.decode(data), section.decode_mean(data)]
        assert all(torch.equal(left, right) for left, right in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("form", ROTATED, ids=str)
@given(values=batches(300))
@settings(max_examples=30, deadline=None)
def test_rotated_blocks_are_those_of_torch_to_rounding(instruction_set, form, values):
    if not values.isfinite().all() or values.abs().max() > 1e30:
        values = normal(*values.shape)
    ours = results(form, values)
    with torchs_operations():
        theirs = results(form, values)
    values, one, other = values.double(), ours[1].double(), theirs[1].double()
    norm = values.norm(dim=-1, keepdim=True)
    step = norm / {8: 127, 4: 7}[form.bits]  # codes may differ by one where a value lies between two
    assert ((one - other).abs() <= 3 * step + 1e-5 * norm + 1e-35).all()
    assert (one - values).norm() <= 1.05 * (other - values).norm() + 0.05 * step.norm() + 1e-35


@pytest.mark.parametrize("block", [2, 4, 16, 64, 512])
def test_the_transform_is_sylvesters_matrix(instruction_set, block):
    """A unit vector's 8-bit codes are the signs of its row: all of one size."""
    code = BlockCode(block, block, block, 8, block * block, torch.ones(block))
    data = torch.zeros(block * block + 2 * block, dtype=torch.uint8)
    assert code.encode(data, torch.eye(block), 0xFFFF, None, random=False)
    codes = data[: block * block].view(torch.int8).view(block, block).long()
    parity = torch.tensor([[(row & column).bit_count() % 2 for column in range(block)] for row in range(block)])
    assert torch.equal(codes.sign(), 1 - 2 * parity) and codes.abs().unique().numel() == 1
    assert torch.allclose(code.decode(data), torch.eye(block), atol=1 / 64)


@pytest.mark.parametrize("form", [*EXACT, *ROTATED, *RANDOM, *SPARSE], ids=str)
def test_instruction_sets_give_the_same_bits(form):
    everyone = []
    for name in SETS:
        _native.use(name)
        everyone.append(results(form, normal(2, 3, 1111), seed=5))
    assert all(same_bits(one, first) for own in everyone for one, first in zip(own, everyone[0], strict=True))


@pytest.mark.parametrize("length", [100, 70_001, 90_000])
@pytest.mark.parametrize("form", [EXACT[1], ROTATED[2], RANDOM[0], *SPARSE], ids=str)
def test_threads_change_no_bit(instruction_set, three_threads, form, length):
    values = normal(2, 2, length)
    values[1, 0, : length // 2] = 3.0  # more values reach the threshold than find places
    threaded = results(form, values)
    torch.set_num_threads(1)
    assert all(same_bits(one, other) for one, other in zip(threaded, results(form, values), strict=True))


@pytest.mark.parametrize("form", [*EXACT, *ROTATED, *SPARSE], ids=str)
def test_views_with_gaps_code_as_their_copies(form):
    wide = normal(4, 3, 400)
    values = wide.transpose(0, 1)[:, :2, 7:350]
    section = Section(2, 343, form)
    data = torch.zeros(3, section.encoded_bytes() + 12, dtype=torch.uint8)
    section.encode_into(data[:, 4:-8], values)
    plain = torch.zeros(3, section.encoded_bytes(), dtype=torch.uint8)
    section.encode_into(plain, values.contiguous())
    assert torch.equal(data[:, 4:-8], plain)
    assert not data[:, :4].any() and not data[:, -8:].any()
    assert torch.equal(section.decode(data[:, 4:-8]), section.decode(plain))
    assert torch.equal(section.decode_mean(data[:, 4:-8]), section.decode_mean(plain))
    expected = values - section.decode(plain)
    section.subtract_decoded(values, values, data[:, 4:-8])
    assert torch.equal(values, expected)
    assert torch.equal(wide[..., :7], normal(4, 3, 400)[..., :7])


@pytest.mark.parametrize("form", RANDOM, ids=str)
def test_random_rounding_has_the_right_expectation(instruction_set, form):
    """Means of 4000 are within 5 standard errors, for members of a batch and for calls alike."""
    values, steps = normal(1, 70), []
    section, generator = Section(1, 70, form), torch.Generator().manual_seed(3)
    data = torch.zeros(400, section.encoded_bytes(), dtype=torch.uint8)
    decoded = []
    for _ in range(10):
        section.encode_into(data, values.expand(400, 1, 70), generator)
        decoded.append(section.decode(data))
    everything = torch.cat(decoded)
    for start in range(0, 70, form.block):
        largest = values[:, start : start + form.block].abs().max() / {8: 127, 4: 7}[form.bits]
        steps.append(largest.expand(min(form.block, 70 - start)))
    step = torch.cat(steps) * (1 + 2**-7)  # the scale is rounded up
    error = everything - values
    assert (error.abs() <= step).all()
    assert (error.mean(dim=0).abs() <= 5 * 0.5 * step / 4000**0.5).all()
    # Neighbours, members and calls round independently.
    for left, right in [(error[:-1], error[1:]), (error[..., :-1], error[..., 1:]), (error[:400], error[400:800])]:
        products = (left / step[: left.shape[-1]]) * (right / step[: right.shape[-1]])
        assert products.mean().abs() <= 5 * 0.25 / products.numel() ** 0.5


def test_random_rounding_is_fixed_by_the_generator_and_takes_one_draw():
    section, values = Section(2, 100, RANDOM[0]), normal(2, 100)
    data = torch.zeros(2, section.encoded_bytes(), dtype=torch.uint8)
    generator, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    section.encode_into(data[0], values, generator)
    section.encode_into(data[1], values, other)
    assert torch.equal(data[0], data[1])
    section.encode_into(data[1], values, other)
    assert not torch.equal(data[0], data[1])
    once = torch.Generator().manual_seed(1)
    torch.randint(torch.iinfo(torch.int64).max, (), generator=once)
    assert torch.equal(generator.get_state(), once.get_state())


@pytest.mark.parametrize("mask", [0xFFFF, 0xFFFFF, 0x7FFFFF])
def test_scales_are_rounded_up_to_the_bits_that_the_mask_leaves(instruction_set, mask):
    values = normal(1, 640).abs() + 1e-3
    code = BlockCode(1, 640, 64, 8, 640, None)
    data = torch.zeros(640 + 20, dtype=torch.uint8)
    assert code.encode(data, values, mask, None, random=False)
    scales = data[640:].view(torch.bfloat16).float()
    exact = values.view(10, 64).amax(dim=1) / 127
    assert not (scales.view(torch.int32) & mask).any()
    assert (scales >= exact).all() and (scales < exact * (1 + (mask + 1) / 2**23)).all()


@pytest.mark.parametrize("form", [EXACT[0], *SPARSE[3:5]], ids=str)
def test_what_is_not_plain_is_left_to_torch(form):
    values = normal(2, 600).T.contiguous().T  # values of a row lie apart
    section = Section(2, 600, form)
    data, plain = (torch.zeros(section.encoded_bytes(), dtype=torch.uint8) for _ in range(2))
    section.encode_into(data, values)
    section.encode_into(plain, values.contiguous())
    assert torch.equal(data, plain)
    rest = torch.empty(2, 600, dtype=torch.bfloat16)
    section.subtract_decoded(rest, values, data)
    assert torch.equal(rest, (values - section.decode(data)).bfloat16())
    assert not BlockCode(2, 600, 16, 8, 1200, None).encode(data, values, 0xFFFF, None, random=False)
    assert BlockCode(2, 600, 16, 8, 1200, None).decode(data.int()) is None


def test_wrong_sizes_are_named():
    code = BlockCode(2, 10, 4, 8, 24, None)
    with pytest.raises(ValueError, match=r"\[2, 10\] take 36 bytes; here are 35"):
        code.decode(torch.zeros(35, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(3, 10\); expected \(2, 10\)"):
        code.encode(torch.zeros(36, dtype=torch.uint8), torch.zeros(3, 10), 0xFFFF, None, random=False)
    sparse = SparseCode(600, 20, 3)
    with pytest.raises(ValueError, match="take 23 bytes; here are 22"):
        sparse.select(torch.zeros(22, dtype=torch.uint8), torch.zeros(600), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"\(599,\); expected \(600,\)"):
        sparse.select(torch.zeros(23, dtype=torch.uint8), torch.zeros(599), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"\(1, 19\).*expected \(1, 20\)"):
        sparse.decode(torch.zeros(600), torch.zeros(1, 23, dtype=torch.uint8), torch.zeros(1, 19), None)
