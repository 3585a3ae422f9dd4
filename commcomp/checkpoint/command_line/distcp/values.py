"""What an optimizer's settings and step counts are, as far as they tell how its moments and weights move."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np

from commcomp.checkpoint.command_line.distcp import archive
from commcomp.checkpoint.command_line.distcp.metadata import Item
from commcomp.checkpoint.roles import steps_of

_SETTINGS = ("lr", "betas", "eps")
_MOST_BYTES = 64 << 10  # of an item that may be a number


def is_setting(item: Item) -> bool:
    """By its name, and since it is no tensor."""
    return item.offset is None and "param_groups." in item.name and item.name.rpartition(".")[2] in _SETTINGS


def value_of(folder: str, item: Item) -> Any:
    """A number, or what else a setting is; None where it is not as torch writes it."""
    if item.length > _MOST_BYTES or item.transforms:
        return None
    with contextlib.suppress(ValueError, OSError):
        with open(os.path.join(folder, item.file), "rb") as file:
            file.seek(item.start)
            data = np.frombuffer(file.read(item.length), np.uint8)
        if item.offset is None:
            return archive.plain_value_in(data)
        saved = archive.tensor_in(data)
        return saved and steps_of(item.name, data[saved.start : saved.stop].copy(), saved.dtype)
    return None
