"""How a bucket is cut: views lie where the gradients lie, everything is covered once, and factors must pay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commcomp import Dense, LowRank
from commcomp.compressors.wire import RowFormat, Section
from commcomp.layout import BucketLayout, Entry, Spans, cut_bucket, effective_method, wire_dtype

FACTOR_ALL = LowRank(rank=2, min_ratio=0)


def place(shapes: dict[str, tuple[int, ...]], gaps: dict[str, int] | None = None, start: int = 0) -> list[Entry]:
    """Entries one after another; `gaps` leaves elements free before a parameter."""
    entries, offset = [], start
    for name, shape in shapes.items():
        offset += (gaps or {}).get(name, 0)
        entries.append(Entry(name, offset, shape))
        offset += torch.Size(shape).numel()
    return entries


def cut(entries: list[Entry], method=FACTOR_ALL, dtype: torch.dtype = torch.float32) -> BucketLayout:
    methods = method if isinstance(method, dict) else {entry.name: method for entry in entries}
    effective = {entry.name: effective_method(methods[entry.name], entry.shape, dtype) for entry in entries}
    return cut_bucket(entries, effective)


def factor_rank(method: LowRank, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """The rank with which a matrix is factored, 0 where it travels dense."""
    effective = effective_method(method, shape, dtype)
    return effective.rank if isinstance(effective, LowRank) else 0


def assert_covers(layout: BucketLayout, entries: list[Entry], *, storage_offset: int = 3) -> None:
    """Writing through the layout reaches each parameter's own elements, each once, and no other element."""
    length = max((entry.offset + entry.numel for entry in entries), default=0) + 5
    flat = torch.zeros(storage_offset + length)[storage_offset:]
    expected = torch.zeros(length)
    codes = {entry.name: float(index + 1) for index, entry in enumerate(entries)}
    for entry in entries:
        expected[entry.offset : entry.offset + entry.numel] += codes[entry.name]
    for batch in layout.batches:
        view = batch.view(flat)
        assert view.shape == (len(batch.names), batch.rows, batch.columns)
        for matrix, name in zip(view, batch.names, strict=True):
            matrix += codes[name]
    for spans in layout.dense:
        values = [torch.full((entry.numel,), codes[entry.name]) for entry in spans.entries]
        block = torch.cat(values)
        assert block.shape == (spans.section.length,)
        spans.scatter(flat, block + spans.gather(flat))
        assert torch.equal(spans.gather(flat), block)
    assert torch.equal(flat, expected)


def test_equal_shapes_at_equal_distance_are_one_batch():
    entries = place({"a": (4, 6), "a.bias": (4,), "b": (4, 6), "b.bias": (4,), "c": (4, 6), "c.bias": (4,)})
    layout = cut(entries)
    assert [batch.names for batch in layout.batches] == [("a", "b", "c")]
    assert layout.batches[0].stride == 28
    assert [[entry.name for entry in spans.entries] for spans in layout.dense] == [["a.bias", "b.bias", "c.bias"]]
    assert_covers(layout, entries)


def test_unequal_distances_are_cut_into_runs():
    shapes = {name: (3, 5) for name in "abcdef"}
    entries = place(shapes, gaps={"c": 7, "d": 7, "f": 1})
    layout = cut(entries)
    assert sorted(name for batch in layout.batches for name in batch.names) == list("abcdef")
    assert 2 <= len(layout.batches) < 6
    assert_covers(layout, entries)


def test_a_batch_view_holds_the_matrix_in_row_order():
    entries = place({"x": (2,), "a": (2, 3), "b": (2, 3)}, start=4)
    (batch,) = cut(entries).batches
    flat = torch.arange(40.0)[10:]
    expected = torch.stack([flat[offset : offset + 6].view(2, 3) for offset in (6, 12)])
    assert torch.equal(batch.view(flat), expected)
    assert batch.view(flat).data_ptr() == flat[6:].data_ptr()


def test_convolutions_fold_to_first_by_rest_and_join_matrices_of_that_shape():
    entries = place({"conv": (4, 3, 2, 2), "linear": (4, 12), "depthwise": (8, 1, 3)})
    layout = cut(entries)
    assert {batch.names: (batch.rows, batch.columns) for batch in layout.batches} == {
        ("conv", "linear"): (4, 12),
        ("depthwise",): (8, 3),
    }
    assert_covers(layout, entries)
    flat = torch.arange(100.0)
    assert torch.equal(layout.batches[0].view(flat)[0], flat[:48].view(4, 3, 2, 2).flatten(1))


def test_rank_is_cut_to_the_smaller_side_and_rows_and_columns_may_be_one():
    entries = place({"wide": (1, 9), "tall": (9, 1), "small": (3, 2), "large": (20, 30), "one": (1, 1)})
    layout = cut(entries, LowRank(rank=8, min_ratio=0))
    assert {batch.names[0]: batch.rank for batch in layout.batches} == {
        "wide": 1,
        "tall": 1,
        "small": 2,
        "large": 8,
        "one": 1,
    }
    assert_covers(layout, entries)
    for batch in layout.batches:
        assert batch.section(7) == Section(len(batch.names) * batch.rank, 7, RowFormat("fp32"))


def test_vectors_scalars_and_empty_tensors_travel_dense():
    entries = place({"vector": (5,), "scalar": (), "empty": (0,), "no rows": (0, 4), "no columns": (4, 0), "m": (6, 7)})
    layout = cut(entries)
    assert [batch.names for batch in layout.batches] == [("m",)]
    assert [entry.name for entry in layout.dense[0].entries] == ["vector", "scalar", "empty", "no rows", "no columns"]
    assert layout.dense[0].section.length == 6
    assert_covers(layout, entries)


def test_an_empty_bucket_and_a_bucket_of_empty_tensors():
    assert cut([]) == BucketLayout()
    layout = cut(place({"a": (0,), "b": (0, 3)}))
    assert not layout.batches
    flat = torch.empty(0)
    assert layout.dense[0].gather(flat).shape == (0,)
    layout.dense[0].scatter(flat, torch.empty(0))


def test_methods_and_formats_part_the_bucket():
    entries = place({"a": (9, 9), "b": (9, 9), "c": (9, 9), "d": (9, 9), "e": (9,), "f": (9,)})
    one, two = LowRank(rank=1), LowRank(rank=1, dense_dtype="bf16")
    layout = cut(entries, {"a": one, "b": two, "c": one, "d": Dense("bf16"), "e": one, "f": two})
    assert [(batch.names, batch.method) for batch in layout.batches] == [(("a", "c"), one), (("b",), two)]
    assert {spans.format.dtype: [entry.name for entry in spans.entries] for spans in layout.dense} == {
        "bf16": ["d", "f"],
        "fp32": ["e"],
    }
    assert_covers(layout, entries)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_bucket_is_covered_exactly_once(data):
    shape = st.sampled_from([(3, 5), (5, 3), (3, 5), (2, 2, 2), (4,), (), (0, 3), (1, 6), (15,)])
    shapes = {f"p{index}": value for index, value in enumerate(data.draw(st.lists(shape, max_size=10)))}
    gaps = {name: data.draw(st.integers(0, 2)) for name in shapes}
    methods = {name: data.draw(st.sampled_from([FACTOR_ALL, LowRank(rank=1), Dense("bf16")])) for name in shapes}
    entries = place(shapes, gaps, start=data.draw(st.integers(0, 3)))
    layout = cut(entries, methods)
    assert_covers(layout, entries)
    for batch in layout.batches:
        assert batch.rank == factor_rank(methods[batch.names[0]], shapes[batch.names[0]], torch.float32)
        assert len({methods[name] for name in batch.names}) == 1


@pytest.mark.parametrize(
    ("method", "dtype", "largest_paying"),
    [
        # n x n pays at rank r while r (n + n) items of the wire's size are fewer bytes than n n of the dense format
        # (fp16 has its scale on top).
        (LowRank(rank=99), torch.float32, 31),
        (LowRank(rank=99, factor_dtype="bf16"), torch.float32, 63),
        (LowRank(rank=99), torch.bfloat16, 15),
        (LowRank(rank=99, dense_dtype="bf16"), torch.float32, 15),
        (LowRank(rank=99, factor_dtype="bf16", dense_dtype="fp16"), torch.float32, 32),
        (LowRank(rank=99, min_ratio=2), torch.float32, 15),
        (LowRank(rank=99, min_ratio=0.5), torch.float32, 63),
    ],
)
def test_a_matrix_is_factored_only_where_factors_are_fewer_bytes(method, dtype, largest_paying):
    ranks = [
        rank for rank in range(1, 65) if factor_rank(LowRank(**{**vars(method), "rank": rank}), (64, 64), dtype) == rank
    ]
    assert ranks == list(range(1, largest_paying + 1))


def test_int8_scales_count_when_it_is_decided_what_pays():
    # 8 x 8 at rank r in int8: r (8 + 8) bytes of codes and 2 r scales of 4 bytes against 256 bytes.
    ranks = [
        rank for rank in range(1, 9) if factor_rank(LowRank(rank=rank, factor_dtype="int8"), (8, 8), torch.float32)
    ]
    assert ranks == [rank for rank in range(1, 9) if rank * 16 + 2 * 4 * rank < 256]
    assert factor_rank(LowRank(rank=4, min_ratio=0), (1, 5), torch.float32) == 1
    assert factor_rank(LowRank(rank=1), (1, 5), torch.float32) == 0


def test_sixteen_bit_gradients_are_never_widened():
    for requested in ("fp32", "fp16", "bf16"):
        assert wire_dtype(requested, torch.float32) == requested
        assert wire_dtype(requested, torch.float16) == "fp16"
        assert wire_dtype(requested, torch.bfloat16) == "bf16"


def resnet18_shapes() -> dict[str, tuple[int, ...]]:
    """ResNet18 for CIFAR10: 3 x 3 first convolution, 10 classes; 11,173,962 parameters."""
    shapes: dict[str, tuple[int, ...]] = {"conv1": (64, 3, 3, 3), "bn1.weight": (64,), "bn1.bias": (64,)}
    before = 64
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            prefix = f"layer{stage + 1}.{block}"
            inputs = before if block == 0 else width
            shapes[f"{prefix}.conv1"], shapes[f"{prefix}.conv2"] = (width, inputs, 3, 3), (width, width, 3, 3)
            if inputs != width:
                shapes[f"{prefix}.shortcut"] = (width, inputs, 1, 1)
            for norm in ("bn1", "bn2") + (("bn3",) if inputs != width else ()):
                shapes[f"{prefix}.{norm}.weight"] = shapes[f"{prefix}.{norm}.bias"] = (width,)
        before = width
    return {**shapes, "linear.weight": (10, 512), "linear.bias": (10,)}


@pytest.mark.parametrize(("rank", "times_smaller"), [(1, 243), (2, 136), (4, 72)])
def test_resnet18_volume_is_the_papers(rank, times_smaller):
    shapes = resnet18_shapes()
    dense_bytes = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    assert dense_bytes == 4 * 11_173_962
    layout = cut(place(shapes), LowRank(rank=rank, min_ratio=0))
    assert all(len(shapes[entry.name]) == 1 for spans in layout.dense for entry in spans.entries)
    sent = sum(
        batch.section(batch.rows).encoded_bytes() + batch.section(batch.columns).encoded_bytes()
        for batch in layout.batches
    )
    sent += sum(spans.section.encoded_bytes() for spans in layout.dense)
    assert round(dense_bytes / sent) == times_smaller


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_with_what_is_owed_is_formed_where_it_can_be(gap, rows, dtype):
    entries = (Entry("a", 2, (3, 4)), Entry("b", 14 + gap, (5,)))
    spans = Spans(entries, RowFormat("bf16"))
    bucket = torch.randn(rows, 30, generator=torch.Generator().manual_seed(0))
    owed = torch.randn(rows, 17, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = bucket.clone()
    expected = spans.gather(bucket) + owed
    assert torch.equal(spans.take(bucket, owed), expected)
    assert torch.equal(bucket, before) == (gap > 0)
    if not gap:
        assert torch.equal(spans.gather(bucket), expected)
        bucket[:, 2:19] = before[:, 2:19]
        assert torch.equal(bucket, before)
