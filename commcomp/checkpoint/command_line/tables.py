"""Tables by what tensors are: weights, moments, other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from commcomp.checkpoint.coded import HostTensor, TensorHeader, TreeInfo
from commcomp.checkpoint.container import StoredTensor
from commcomp.checkpoint.dtypes import TORCH_DTYPES
from commcomp.checkpoint.roles import find_moments

WEIGHTS, FIRST, SECOND, OTHER = "weights", "first moments", "second moments", "other"
CLASSES = (WEIGHTS, FIRST, SECOND, OTHER)


def classes_of(headers: Mapping[str, TensorHeader], info: TreeInfo) -> dict[str, str]:
    """Of each tensor, what it is: moments as an optimizer's state tells them, floats outside of it are weights."""
    nothing = np.empty(0, np.uint8)
    tensors = {name: HostTensor(name, header.dtype, header.shape, nothing) for name, header in headers.items()}
    found = {}
    for name, header in headers.items():
        in_optimizer = any("state" in path or "state." in str(path[0]) for path in info.paths.get(name, ()) if path)
        is_float = TORCH_DTYPES[header.dtype].is_floating_point
        found[name] = WEIGHTS if is_float and not in_optimizer and header.num_values > 1 else OTHER
    for moments in find_moments(tensors, info):
        found.update({name: FIRST for name in (moments.first,) if name})
        found.update({name: SECOND for name in (moments.second,) if name})
    return found


@dataclass
class Sizes:
    """Of one class: tensors, values, their bytes, stored bytes, and the largest error where there is one."""

    tensors: int = 0
    values: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    largest_error: float | None = None
    lossy: int = 0

    def add(self, stored: StoredTensor, error: float | None) -> None:
        self.tensors += 1
        self.values += stored.header.num_values
        self.raw_bytes += stored.header.num_bytes
        self.stored_bytes += stored.stored_bytes
        self.lossy += stored.header.bound is not None
        if error is not None:
            self.largest_error = max(self.largest_error or 0.0, error)


def sizes_by_class(
    stored: Mapping[str, StoredTensor], info: TreeInfo, errors: Mapping[str, float], into: dict[str, Sizes]
) -> None:
    """Add a file's tensors to `into`."""
    classes = classes_of({name: tensor.header for name, tensor in stored.items()}, info)
    for name, tensor in stored.items():
        into.setdefault(classes[name], Sizes()).add(tensor, errors.get(name))


def size_table(sizes: Mapping[str, Sizes], file_bytes: int, *, with_errors: bool) -> str:
    """Lines for people. The total counts whole files, headers and directories too."""
    head = ["", "tensors", "values", "bytes", "stored", "bits a value", "ratio", "lossy"]
    rows = [_size_row(name, sizes[name]) for name in CLASSES if name in sizes]
    total = Sizes(*(sum(getattr(one, key) for one in sizes.values()) for key in ("tensors", "values", "raw_bytes")))
    total.stored_bytes, total.lossy = file_bytes, sum(one.lossy for one in sizes.values())
    rows.append(_size_row("whole files", total))
    if with_errors:
        head.append("largest error")
        found = [sizes[name].largest_error for name in CLASSES if name in sizes]
        for row, error in zip(rows, [*found, None]):
            row.append("" if error is None else f"{error:.3g}")
    return text_table(head, rows)


def _size_row(name: str, sizes: Sizes) -> list[str]:
    bits = f"{8 * sizes.stored_bytes / sizes.values:.2f}" if sizes.values else ""
    ratio = f"{sizes.raw_bytes / sizes.stored_bytes:.2f}" if sizes.stored_bytes else ""
    counts = (sizes.tensors, sizes.values, sizes.raw_bytes, sizes.stored_bytes)
    return [name, *(f"{count:,}" for count in counts), bits, ratio, str(sizes.lossy or "no")]


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they must be, numbers to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )
