"""What an optimizer's settings are, as far as they tell how its moments and weights move."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np

from commcomp.checkpoint.command_line.distcp import archive
from commcomp.checkpoint.command_line.distcp.metadata import Item

_FIELDS = ("lr", "betas", "eps")
_MOST_BYTES = 64 << 10  # of an item that may be a number


def is_setting(item: Item) -> bool:
    """By its name, and since it is no tensor."""
    return item.offset is None and "param_groups." in item.name and item.name.rpartition(".")[2] in _FIELDS


def setting_in(folder: str, item: Item) -> Any:
    """A number, or what else a setting is; None where it is not as torch writes it."""
    if item.length > _MOST_BYTES or item.transforms:
        return None
    with contextlib.suppress(ValueError, OSError), open(os.path.join(folder, item.file), "rb") as file:
        file.seek(item.start)
        return archive.plain_value_in(np.frombuffer(file.read(item.length), np.uint8))
    return None
