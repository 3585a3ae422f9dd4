"""Which reduction takes a bucket through the steps, with which parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from commcomp.bucket_part import BucketPart, DensePart, Place
from commcomp.coded_part import CodedPart
from commcomp.compressors.wire import RowFormat
from commcomp.error_feedback import ParameterStore
from commcomp.layout import Entry, cut_bucket, wire_dtype
from commcomp.low_rank_part import LowRankPart
from commcomp.reduction import CompressedReduction, Count, DenseReduction, Reduction
from commcomp.synchronised_model import SynchronisedModel


class GradientGroup(Protocol):
    """Parameters whose gradients FSDP hands over in one go, as a bucket [W, S]."""

    @property
    def gradient_dtype(self) -> torch.dtype:
        """In which torch reduces them."""

    @property
    def place(self) -> Place:
        """Which row this rank needs."""

    @property
    def dense_place(self) -> Place:
        """The same where the whole bucket travels as it is; W may then be another one, over the same memory."""

    @property
    def scattered(self) -> bool:
        """Whether torch would send a reduce-scatter, half of an all-reduce."""

    def entries(self) -> list[Entry]:
        """Where the parameters lie in a row."""


class BucketPlanner:
    """Makes and keeps the reductions of one `GradientSync`."""

    def __init__(
        self,
        model: SynchronisedModel,
        store: ParameterStore,
        group: dist.ProcessGroup,
        count: Count,
        *,
        find_unused: bool,
    ) -> None:
        self._model, self._store = model, store
        self._group, self._count, self._find_unused = group, count, find_unused
        self._reductions: dict[tuple[int, ...], Reduction] = {}

    def has_bucket(self, parameters: Sequence[Tensor], *, started: bool) -> bool:
        """Whether there is a reduction for a DDP bucket of these parameters already."""
        return (int(started), *map(id, parameters)) in self._reductions

    def of_bucket(
        self, buffer: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor], *, started: bool
    ) -> Reduction:
        """For a DDP bucket; a new one takes over the residuals of its parameters, wherever they were."""
        key = (int(started), *map(id, parameters))
        if key not in self._reductions:
            members = set(key[1:])
            self._reductions = {old: value for old, value in self._reductions.items() if members.isdisjoint(old[1:])}
            entries = self._entries(buffer, parameters, gradients)
            places = (Place(), Place())
            self._reductions[key] = self._make(buffer.numel(), buffer.dtype, entries, places, buffer.device, started)
        return self._reductions[key]

    def of_group(self, rows: Tensor, group: GradientGroup, *, started: bool, again: bool) -> Reduction:
        """For the bucket rows, [W, S], of one group of a sharded model; `again`: its second bucket in a step."""
        key = (int(started), id(group), int(again))
        if key not in self._reductions:
            places = (group.place, group.dense_place)
            # The first bucket carries the residual; the second one goes whole, so that it has none.
            compress = started and not again
            self._reductions[key] = self._make(
                rows.numel(), group.gradient_dtype, group.entries(), places, rows.device, compress
            )
        return self._reductions[key]

    def _entries(
        self, buffer: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> list[Entry]:
        if buffer.is_sparse:
            raise ValueError(
                "a gradient bucket is sparse (an embedding with sparse=True); set sparse=False on that layer"
            )
        entries = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            name = self._model.name_of(parameter)
            if buffer.dtype != (dtype := self._model.gradient_dtypes[name]):
                raise ValueError(
                    f"the gradient of {name!r} is {buffer.dtype}; it was {dtype} when GradientSync was constructed: "
                    "construct it after converting the model"
                )
            offset = int(gradient.storage_offset() - buffer.storage_offset())
            entries.append(Entry(name, offset, self._model.shapes[name]))
        return entries

    def _make(
        self,
        numel: int,
        dtype: torch.dtype,
        entries: Sequence[Entry],
        places: tuple[Place, Place],
        device: torch.device,
        started: bool,
    ) -> Reduction:
        group, count = self._group, self._count
        place, dense_place = places
        length = numel // dense_place.num_rows
        if not started:  # whole, in the gradient's own format
            return DenseReduction(length, RowFormat(wire_dtype("fp32", dtype)), dense_place, group, device, count)
        layout = cut_bucket(entries, self._model.effective)
        if not layout.batches and not layout.coded and len(layout.dense) == 1:
            return DenseReduction(length, layout.dense[0].format, dense_place, group, device, count)
        config, store = self._model.config, self._store
        residual_dtype = config.residual_dtype
        parts: list[BucketPart] = [
            LowRankPart(batch, store, place, residual_dtype=residual_dtype, seed=config.seed, device=device)
            for batch in layout.batches
        ]
        parts += [
            CodedPart(spans, store, place, residual_dtype=residual_dtype, device=device) for spans in layout.coded
        ]
        parts += [DensePart(spans, place) for spans in layout.dense]
        return CompressedReduction(parts, group, device, count, find_unused=self._find_unused)
