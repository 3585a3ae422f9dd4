"""Where matrices are found in flat buffers; no DeepSpeed is needed for that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from commcomp.deepspeed.flat_buffers import Buffer, FlatBuffers, Fragment


def engine_of(module: nn.Module, optimizer: Any) -> Any:
    return SimpleNamespace(module=module, optimizer=optimizer)


def test_whole_rows_are_cut_out_and_all_values_are_covered() -> None:
    buffer = Buffer(1000, (Fragment(0, 95, 25, 10), Fragment(95, 7, 0, 1), Fragment(110, 800, 0, 100)))
    assert buffer.cut(1000) == [(5, 1), (90, 10), (15, 1), (800, 100), (90, 1)]
    assert buffer.cut(910) == [(5, 1), (90, 10), (15, 1), (800, 100)]


def test_partitions_begin_and_end_within_a_parameter() -> None:
    """As ZeRO-2 on two ranks has them: the first one's end and the second one's start lie in `up`."""
    module = nn.ModuleDict({"down": nn.Linear(30, 8), "up": nn.Linear(20, 50, bias=False)})
    total = (240 + 8 + 1000) // 2
    for rank, expected in ((0, [(240, 30), (8, 1), (360, 20), (16, 1)]), (1, [(4, 1), (620, 20)])):
        mapping = {}
        at = 0
        for name, value in module.named_parameters():
            start, stop = max(at, rank * total), min(at + value.numel(), (rank + 1) * total)
            if start < stop:
                mapping[name] = SimpleNamespace(start=start - rank * total, numel=stop - start)
            at += value.numel()
        group = torch.zeros(total)
        optimizer = SimpleNamespace(_param_slice_mappings=[mapping], single_partition_of_fp32_groups=[group])
        cuts = FlatBuffers(engine_of(module, optimizer)).cut(total)
        assert cuts == expected and sum(values for values, _ in cuts) == total


def test_what_is_not_known_is_left_whole() -> None:
    for optimizer in (None, SimpleNamespace(), SimpleNamespace(_param_slice_mappings=[{"other": 3}]), torch.zeros(2)):
        assert FlatBuffers(engine_of(nn.Linear(2, 2), optimizer)).cut(100) == []
    module = nn.Linear(20, 50, bias=False)
    mapping = {"weight": SimpleNamespace(start=0, numel=1000)}
    optimizer = SimpleNamespace(_param_slice_mappings=[mapping], single_partition_of_fp32_groups=[torch.zeros(1000)])
    buffers = FlatBuffers(engine_of(module, optimizer))
    assert buffers.cut(1000) == [(1000, 20)] and buffers.cut(999) == [] and buffers.cut(1001) == []
