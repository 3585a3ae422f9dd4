"""Block and sparse formats on the wire: sizes, round trips, error bounds, means, and what is not finite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commcomp.compressors import native
from commcomp.compressors.wire import Section
from commcomp.compressors.wire_blocks import BlockFormat
from commcomp.compressors.wire_sparse import SparseFormat

BLOCKS = [BlockFormat(8, 16), BlockFormat(4, 16), BlockFormat(4, 32, rotate=True), BlockFormat(8, 2), BlockFormat(4, 6)]
SPARSE = [SparseFormat(density, values) for density in (0.002, 0.05, 0.4) for values in ("fp32", "bf16", "int8")]
LEVELS = {8: 127, 4: 7}
NUMBERS = st.floats(-1e30, 1e30, width=32)


@pytest.fixture(params=[True, False], ids=["native", "torch"], scope="module", autouse=True)
def passes(request) -> Iterator[None]:
    """Both ways to compute it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "available", request.param)
        yield


def round_trip(section: Section, values: torch.Tensor, filler: int = 0) -> torch.Tensor:
    data = torch.full((*values.shape[:-2], section.encoded_bytes() + 16), filler, dtype=torch.uint8)
    inside = data[..., 8:-8]
    section.encode_into(inside, values)
    assert (data[..., :8] == filler).all() and (data[..., -8:] == filler).all()
    return section.decode(inside)


@st.composite
def rows(draw) -> torch.Tensor:
    shape = draw(st.sampled_from([(1, 1), (1, 40), (3, 17), (2, 64), (1, 300)]))
    kind = draw(st.sampled_from(["any", "one huge", "zeros", "denormal"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    values = torch.randn(shape, generator=generator)
    if kind == "any":
        values *= 10.0 ** draw(st.integers(-30, 30))
    elif kind == "one huge":
        values.view(-1)[draw(st.integers(0, values.numel() - 1))] = 1e30
    elif kind == "zeros":
        values.zero_()
    else:
        values *= 1e-39
    return values


@pytest.mark.parametrize("form", BLOCKS, ids=str)
@given(values=rows())
@settings(max_examples=60, deadline=None)
def test_blocks_err_by_half_a_step_at_most(form, values):
    section = Section(*values.shape, form)
    decoded = round_trip(section, values)
    assert decoded.shape == values.shape and decoded.isfinite().all()
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % form.block)).unflatten(1, (-1, form.block)).double()
    if form.rotate:
        step = padded.norm(dim=-1, keepdim=True) / LEVELS[form.bits] * form.block**0.5
    else:
        step = padded.abs().amax(dim=-1, keepdim=True) / LEVELS[form.bits]
    bound = (step * (0.5 * 1.01) + 1e-37).expand_as(padded).flatten(1)[:, : values.shape[1]]
    assert ((decoded.double() - values.double()).abs() <= bound).all()


@pytest.mark.parametrize("form", [*BLOCKS, *SPARSE], ids=str)
@given(values=rows())
@settings(max_examples=25, deadline=None)
def test_decoding_reads_only_what_encoding_wrote(form, values):
    section = Section(*values.shape, form)
    assert torch.equal(round_trip(section, values, 0), round_trip(section, values, 255))


@pytest.mark.parametrize("form", [*BLOCKS, *SPARSE], ids=str)
def test_batches_encode_as_their_members_and_means_are_means(form):
    values = torch.randn(3, 2, 90, generator=torch.Generator().manual_seed(0))
    section = Section(2, 90, form)
    data = torch.zeros(3, section.encoded_bytes(), dtype=torch.uint8)
    section.encode_into(data, values)
    single = torch.stack([round_trip(section, one) for one in values])
    assert torch.equal(section.decode(data), single)
    assert torch.allclose(section.decode_mean(data), single.mean(dim=0), atol=1e-6)


@pytest.mark.parametrize("form", BLOCKS, ids=str)
def test_bytes_of_blocks(form):
    for length in (1, 15, 16, 100, 1000):
        count = 3 * -(-length // form.block)
        exact = count * form.block * form.bits / 8 + 2 * count
        assert exact <= Section(3, length, form).encoded_bytes() < exact + 8


def test_stochastic_rounding_has_no_bias_and_takes_its_own_numbers():
    form = BlockFormat(4, 32, stochastic=True)
    section, values = Section(1, 64, form), torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    data = torch.zeros(section.encoded_bytes(), dtype=torch.uint8)
    generator, total, results = torch.Generator().manual_seed(1), torch.zeros(1, 64), []
    for _ in range(2000):
        section.encode_into(data, values, generator)
        results.append(section.decode(data))
        total += results[-1]
    step = values.abs().max() / 7
    assert ((total / 2000 - values).abs() < 5 * step / 2000**0.5).all()
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", BLOCKS, ids=str)
def test_a_bad_number_stays_in_its_block(form, bad):
    values = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    section = Section(2, 100, form)
    clean = round_trip(section, values)
    values[1, 40] = bad
    decoded, block = round_trip(section, values), 40 // form.block
    inside = slice(block * form.block, (block + 1) * form.block)
    assert not decoded[1, inside].isfinite().any()
    decoded[1, inside] = clean[1, inside]
    assert torch.equal(decoded, clean)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [1, 5000])
@pytest.mark.parametrize("form", SPARSE, ids=str)
def test_bad_numbers_show_in_their_row_however_many(form, bad, count):
    values = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    section = Section(2, 5000, form)
    clean = round_trip(section, values)
    values[1, -count:] = bad
    decoded = round_trip(section, values)
    assert decoded[1].isnan().any()
    assert torch.equal(decoded[0], clean[0])


@pytest.mark.parametrize("form", SPARSE, ids=str)
@given(seed=st.integers(0, 99), length=st.sampled_from([1, 7, 256, 257, 5000, 70_001]))
@settings(max_examples=15, deadline=None)
def test_the_largest_values_cross_and_nothing_else(form, seed, length):
    values = torch.randn(1, length, generator=torch.Generator().manual_seed(seed))
    decoded = round_trip(Section(1, length, form), values)
    sent = decoded != 0
    count = int(sent.sum())
    assert count <= form.capacity(length)
    assert torch.allclose(decoded[sent], values[sent], rtol={"fp32": 0, "bf16": 2**-8, "int8": 0.5}[form.values])
    if form.values == "int8":
        assert (decoded[sent] - values[sent]).abs().max() <= values.abs().max() / 127
    if length >= 5000:
        assert count >= 0.8 * form.density * length
        # What did not cross is smaller than what did, but for the few that found no place.
        missed = int((values.abs()[~sent] > values.abs()[sent].median()).sum())
        assert missed <= 0.25 * count


@pytest.mark.parametrize("density", [0.05, 1.0])
def test_full_density_is_lossless_and_equal_values_all_find_a_place(density):
    values = torch.zeros(1, 4096)
    values[0, 1000:1200] = 2.0  # all of the same size, in one block
    form = SparseFormat(density, "fp32")
    assert torch.equal(round_trip(Section(1, 4096, form), values), values)
    dense = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    if density == 1.0:
        assert torch.equal(round_trip(Section(1, 4096, form), dense), dense)


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_the_mean_goes_back_in_a_format_that_holds_every_ranks_choice(num_ranks):
    length = 40_000
    form = SparseFormat(0.01, "fp32")
    mean = torch.zeros(1, length)
    for rank in range(num_ranks):  # disjoint choices
        mean[0, rank :: num_ranks * 100] = 1.0 + rank
    section = Section(1, length, form.of_mean(num_ranks))
    assert torch.equal(round_trip(section, mean), mean)
    assert SparseFormat(0.5, "bf16").of_mean(4).encoded_bytes(1, length) == 2 * length  # whole, where that is smaller
