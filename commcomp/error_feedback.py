"""The store of residuals and warm starts: keyed by parameter name, kept in batches of equal shape.

A residual is what this rank has not delivered yet: its gradients so far minus its own share of everything decoded.
(The other definition in use, minus the decoded mean, grows without bound on each rank and is wrong once a rank is
lost, although the mean over ranks is the same.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESIDUAL = "residual"
WARM_LEFT = "warm_left"
WARM_RIGHT = "warm_right"


@dataclass(frozen=True)
class FieldSpec:
    """Shape and dtype of one kept value of a parameter, and its value before the first step (None: zeros)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    initial: Callable[[str], Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the value."""
        return math.prod(self.shape) * self.dtype.itemsize

    def make(self, name: str, device: torch.device) -> Tensor:
        """The value that parameter `name` starts with."""
        if self.initial is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=device)
        return self.initial(name).to(device)


class ParameterStore:
    """Named tensors that can be handed out as batches and handed out anew in another grouping.

    DDP regroups parameters into other buckets after the first step: the batches change, the values by name do not.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], Tensor] = {}

    def batch(
        self,
        field: str,
        names: Sequence[str],
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype,
        device: torch.device,
        initial: Callable[[str], Tensor] | None = None,
    ) -> Tensor:
        """Return [len(names), *shape] holding the present values, else `initial(name)`, else zeros.

        From here on the store's values are views of this batch, so an earlier batch with the same names is stale.
        """
        batch = torch.zeros(len(names), *shape, dtype=dtype, device=device)
        for slot, name in zip(batch, names, strict=True):
            self._adopt(slot, field, name, initial)
        return batch

    def rows(
        self,
        field: str,
        names: Sequence[str],
        num_rows: int,
        shapes: Sequence[tuple[int, ...]],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """`batch` for values of any shapes, side by side in rows: [num_rows, sum of the shapes' numel], first zeros.

        A value is [num_rows, *shape], a view across the rows.
        """
        sizes = [torch.Size(shape).numel() for shape in shapes]
        rows = torch.zeros(num_rows, sum(sizes), dtype=dtype, device=device)
        for part, name, shape in zip(rows.split(sizes, dim=1), names, shapes, strict=True):
            self._adopt(part.unflatten(1, shape) if shape else part.squeeze(1), field, name, None)
        return rows

    def _adopt(self, slot: Tensor, field: str, name: str, initial: Callable[[str], Tensor] | None) -> None:
        """Make `slot` the value, with the present or the initial one in it."""
        present = self._values.get((field, name))
        if present is not None:
            slot.copy_(present.reshape(slot.shape))
        elif initial is not None:
            slot.copy_(initial(name))
        self._values[field, name] = slot

    def get(self, field: str, name: str) -> Tensor | None:
        """The present value (not a copy), or None."""
        return self._values.get((field, name))

    def put(self, field: str, name: str, value: Tensor) -> None:
        """Overwrite a value; a bound batch sees it."""
        present = self._values.get((field, name))
        if present is None:
            self._values[field, name] = value.detach().clone()
        elif present.data_ptr() != value.data_ptr():
            present.copy_(value.reshape(present.shape))

    def num_bytes(self, *fields: str) -> int:
        """Bytes kept in the given fields."""
        return sum(
            value.numel() * value.element_size() for (field, _), value in self._values.items() if field in fields
        )


def resample_over_ranks(
    load: Callable[[int], Tensor | None], old_ranks: int, new_ranks: int, rank: int
) -> Tensor | None:
    """The residual of new rank `rank` such that the mean over new ranks equals the mean over old ones.

    Ranks are seen as equal pieces of the interval [0, 1]; a new rank gets the overlap-weighted mean of the old ranks
    that its piece covers. So equal sizes give every rank its own residual back, 2 -> 4 duplicates, 4 -> 2 averages
    pairs, and a rank reads no more old residuals than it needs. The mean is what the optimizer is still owed.

    `load(i)` returns old rank i's residual or None where there is none; the result is None if all are.
    """
    total: Tensor | None = None
    for old in range(old_ranks):
        overlap = rank_overlap(old, old_ranks, rank, new_ranks)
        value = load(old) if overlap else None
        if value is None:
            continue
        share = value.float() * overlap
        total = share if total is None else total + share
    return total


def rank_overlap(old: int, old_ranks: int, new: int, new_ranks: int) -> float:
    """The share, 0 to 1, of new rank `new`'s piece of [0, 1] that lies in old rank `old`'s piece."""
    common = min((new + 1) * old_ranks, (old + 1) * new_ranks) - max(new * old_ranks, old * new_ranks)
    return max(common, 0) / old_ranks
