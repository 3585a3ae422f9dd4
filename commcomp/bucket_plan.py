"""Which reduction takes a bucket through the steps, with which parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from commcomp.bucket_part import BucketPart, DensePart, Place
from commcomp.coded_part import CodedPart
from commcomp.compressors.wire import RowFormat
from commcomp.config import GradientConfig, Method
from commcomp.error_feedback import ParameterStore
from commcomp.layout import Entry, cut_bucket, wire_dtype
from commcomp.low_rank_part import LowRankPart
from commcomp.reduction import CompressedReduction, Count, DenseReduction, Reduction


class BucketPlanner:
    """Makes the reductions of one `GradientSync`: same settings, store of residuals, group and counters."""

    def __init__(
        self,
        config: GradientConfig,
        methods: Mapping[str, Method],
        store: ParameterStore,
        group: dist.ProcessGroup,
        count: Count,
        *,
        find_unused: bool,
    ) -> None:
        self._config, self._methods, self._store = config, methods, store
        self._group, self._count, self._find_unused = group, count, find_unused

    def dense(self, length: int, dtype: torch.dtype, place: Place) -> Reduction:
        """For bucket rows of `length` before compression starts: whole, in the gradient's own format."""
        return DenseReduction(length, RowFormat(wire_dtype("fp32", dtype)), place, self._group, self._count)

    def by_methods(self, length: int, entries: Sequence[Entry], place: Place, device: torch.device) -> Reduction:
        """For bucket rows of `length` with these entries, by the methods of their parameters."""
        layout = cut_bucket(entries, self._methods)
        if not layout.batches and not layout.coded and len(layout.dense) == 1:
            return DenseReduction(length, layout.dense[0].format, place, self._group, self._count)
        config, store, residual_dtype = self._config, self._store, self._config.residual_dtype
        parts: list[BucketPart] = [
            LowRankPart(batch, store, place, residual_dtype=residual_dtype, seed=config.seed, device=device)
            for batch in layout.batches
        ]
        parts += [
            CodedPart(spans, store, place, residual_dtype=residual_dtype, device=device) for spans in layout.coded
        ]
        parts += [DensePart(spans, place) for spans in layout.dense]
        return CompressedReduction(parts, place, self._group, self._count, find_unused=self._find_unused)
