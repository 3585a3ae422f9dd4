"""What a 1-D mesh keeps of the gradients while the backward pass goes on."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from commcomp import LowRank, Quantized
from commcomp.config import Method
from tests import fsdp_training as f
from tests.ranks import run_ranks


def _kept_at_the_end(rank: int, method: Method) -> list[bool]:
    """Of every group in turn: whether its bucket was still in memory when the last one was on its way."""
    model, state = f.wrap("fsdp2", method, residual_dtype="none", measure_every=0)
    assert state is not None
    seen: list[StorageWeakRef] = []
    kept: list[bool] = []
    reduce_rows, finish_rows = state.reduce_rows, state.finish_rows

    def reduce(rows: Tensor, *others, **flags) -> None:
        seen.append(StorageWeakRef(rows.untyped_storage()))
        reduce_rows(rows, *others, **flags)

    def finish() -> None:
        state.stats()  # waits until all buckets are begun
        kept.extend(not bucket.expired() for bucket in seen)
        finish_rows()

    state.reduce_rows, state.finish_rows = reduce, finish
    f.train(model, rank, 0)
    return kept


@pytest.mark.parametrize(("method", "kept"), [(Quantized(bits=8), False), (LowRank(rank=2, min_ratio=0), True)])
def test_without_residuals_coded_buckets_are_let_go(method, kept):
    """Low rank reads a bucket again for its second factor."""
    for found in run_ranks(_kept_at_the_end, 2, method):
        assert found == [kept] * 4
