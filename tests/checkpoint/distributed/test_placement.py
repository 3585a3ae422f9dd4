"""What several ranks have goes to one of them, a weight with its moments, about equally many bytes to each."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from commcomp.checkpoint.distributed.placement import keep_families_together


def _item(name: str, size: int, offset: int = 0) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size([offset]), torch.Size([size]))
    data = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size([1000]))
    return WriteItem(MetadataIndex(name, [offset]), WriteItemType.SHARD, tensor_data=data)


def _family(name: str, size: int) -> list[WriteItem]:
    names = (f"model.{name}", f"optim.state.{name}.exp_avg", f"optim.state.{name}.exp_avg_sq")
    return [_item(each, size) for each in names]


def _names(plan: SavePlan) -> set[str]:
    return {item.index.fqn for item in plan.items}


def test_families_stay_together_and_are_spread() -> None:
    families = {name: _family(name, size) for name, size in (("a", 60), ("b", 50), ("c", 40), ("d", 20))}
    items = [item for members in families.values() for item in members]
    everything = {item.index for item in items}
    plans = [SavePlan(items[0::2]), SavePlan(items[1::2])]
    placed = keep_families_together(plans, [everything, everything])
    assert sorted(item.index.fqn for plan in placed for item in plan.items) == sorted(i.index.fqn for i in items)
    for members in families.values():
        assert {item.index.fqn for item in members} <= _names(placed[0]) or not (
            {item.index.fqn for item in members} & _names(placed[0])
        )
    loads = [sum(item.tensor_data.chunk.sizes[0] for item in plan.items if item.tensor_data) for plan in placed]
    assert max(loads) <= 270
    assert [_names(plan) for plan in keep_families_together(plans, [everything, everything])] == list(
        map(_names, placed)
    )


def test_items_stay_where_only_one_rank_has_them() -> None:
    mine, yours, shared = _item("model.w", 10), _item("model.w", 10, 10), _item("optim.state.w.step", 1)
    plans = [SavePlan([mine]), SavePlan([yours, shared])]
    has = [{mine.index, shared.index}, {yours.index, shared.index}]
    placed = keep_families_together(plans, has)
    assert mine in placed[0].items and yours in placed[1].items
    assert sum(shared in plan.items for plan in placed) == 1


def test_plans_for_the_lowest_rank_stay() -> None:
    items = _family("a", 10) + _family("b", 10)
    everything = {item.index for item in items}
    plans = [SavePlan(items), SavePlan([])]
    assert keep_families_together(plans, [everything, everything]) == plans
