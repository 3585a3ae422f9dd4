"""What is different between two states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from commcomp.checkpoint.coded import HostTensor
from commcomp.checkpoint.command_line.file_state import FileState, header_of
from commcomp.checkpoint.command_line.tables import CLASSES, classes_of, text_table
from commcomp.checkpoint.dtypes import TORCH_DTYPES
from commcomp.checkpoint.errors import shown
from commcomp.checkpoint.host_copy import as_tensor
from commcomp.checkpoint.tree_json import to_json

_VALUES_AT_ONCE = 1 << 20
_MOST_NAMES = 20


@dataclass
class _Difference:
    tensors: int = 0
    changed: int = 0
    values: int = 0
    changed_values: int = 0
    largest: float = 0.0
    squares: float = 0.0
    squares_of_first: float = 0.0


def compare(first: FileState, second: FileState) -> tuple[bool, str]:
    """Whether they are the same to the bit, and a text that says what is not."""
    lines, same = [], True
    for one, other in ((first, second), (second, first)):
        names = [
            name
            for name, tensor in one.tensors.items()
            if name not in other.tensors or _kind(tensor) != _kind(other.tensors[name])
        ]
        if names:
            same = False
            some = ", ".join(shown(name, 80) for name in names[:_MOST_NAMES])
            lines.append(f"only {one.path} has {len(names)} tensors of this dtype and shape: {some}")
    classes = classes_of({name: header_of(tensor) for name, tensor in first.tensors.items()}, first.info)
    found: dict[str, _Difference] = {}
    for name, tensor in first.tensors.items():
        partner = second.tensors.get(name)
        if partner is not None and _kind(tensor) == _kind(partner):
            _add(tensor, partner, found.setdefault(classes[name], _Difference()))
    same = same and not any(one.changed for one in found.values())
    if to_json(first.info.skeleton) != to_json(second.info.skeleton):
        same = False
        lines.append("what stands around the tensors (keys, numbers, strings) is different")
    if first.origin.get("header") != second.origin.get("header"):
        same = False
        lines.append("the headers are different")
    head = ["", "tensors", "changed", "values", "changed", "largest difference", "rms difference / rms"]
    lines.append(text_table(head, [_row(name, found[name]) for name in CLASSES if name in found]))
    return same, "\n".join(lines)


def _kind(tensor: HostTensor) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype, tensor.shape


def _row(name: str, found: _Difference) -> list[str]:
    counts = (found.tensors, found.changed, found.values, found.changed_values)
    relative = f"{(found.squares / found.squares_of_first) ** 0.5:.3g}" if found.squares_of_first else ""
    return [name, *(f"{count:,}" for count in counts), f"{found.largest:.3g}", relative]


def _add(one: HostTensor, other: HostTensor, found: _Difference) -> None:
    width = TORCH_DTYPES[one.dtype].itemsize
    before = found.changed_values
    found.tensors += 1
    found.values += len(one.data) // width
    for start in range(0, len(one.data), _VALUES_AT_ONCE * width):
        parts = [tensor.data[start : start + _VALUES_AT_ONCE * width] for tensor in (one, other)]
        found.changed_values += int((parts[0] != parts[1]).reshape(-1, width).any(1).sum())
        for values, others in _numbers(one, parts):
            change = (values - others).nan_to_num(0.0, 0.0, 0.0)
            found.largest = max(found.largest, float(change.abs().max()))
            found.squares += float(change.square().sum())
            found.squares_of_first += float(values.nan_to_num(0.0, 0.0, 0.0).square().sum())
    found.changed += found.changed_values > before


def _numbers(tensor: HostTensor, parts: list[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Floats as doubles; of other dtypes only whether they are equal is told."""
    if TORCH_DTYPES[tensor.dtype].is_floating_point and "float4" not in tensor.dtype:
        header = header_of(tensor)
        one, other = (as_tensor(header, part.copy(), (len(part) // header.item_bytes,)).double() for part in parts)
        yield one, other
