"""Descriptions in which one thing stands in very many places: no memory or time for each."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from commcomp.checkpoint.command_line.distcp import metadata
from tests.checkpoint.command_line.distcp.odd_folders import saved

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
COUNT = 3000


def _described(folder: Path, change: Callable[[Any, Any], object]) -> Path:
    """Many items that share what says where they lie, and what they are."""
    saved(folder, {"w": torch.ones(3, 4)})
    path = folder / ".metadata"
    described = pickle.loads(path.read_bytes())
    ((index, where),) = described.storage_data.items()
    kind = described.state_dict_metadata["w"]
    where.length = 0
    change(where, kind)
    described.storage_data = {MetadataIndex(f"w{number}", index.offset): where for number in range(COUNT)}
    described.state_dict_metadata = {f"w{number}": kind for number in range(COUNT)}
    path.write_bytes(pickle.dumps(described))
    return path


def test_items_may_share_what_is_said_of_them(tmp_path: Path) -> None:
    path = _described(tmp_path / "saved", lambda where, kind: None)
    assert [item.number for item in metadata.read(str(path))] == list(range(COUNT))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda where, kind: vars(where).update(transform_descriptors=["x"] * COUNT), "transforms that are not a few"),
        (lambda where, kind: vars(where).update({f"f{number}": 0 for number in range(COUNT)}), "_StorageInfo with 300"),
        (lambda where, kind: vars(kind).update({f"f{number}": 0 for number in range(COUNT)}), "Metadata with 300"),
        (lambda where, kind: vars(where).update(relative_path="x" * 100_000 + ".distcp"), "a file of the same folder"),
    ],
)
def test_what_is_shared_is_small(tmp_path: Path, change: Callable[[Any, Any], object], message: str) -> None:
    path = _described(tmp_path / "saved", change)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            metadata.read(str(path))
        assert tracemalloc.get_traced_memory()[1] < 100 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_transforms_are_shown_in_part(tmp_path: Path) -> None:
    def change(where: Any, kind: Any) -> None:
        where.transform_descriptors = ["y" * 100_000]

    path = _described(tmp_path / "saved", change)
    assert {item.transforms for item in metadata.read(str(path))} == {("y" * 100,)}
