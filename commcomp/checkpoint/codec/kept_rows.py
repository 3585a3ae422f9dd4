"""Rows that a step left alone, as of an embedding whose tokens did not occur: bit for bit as the parent has them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from commcomp.checkpoint.codec.lattice import LEAST
from commcomp.checkpoint.codec.matrices import matrix_shape, widen
from commcomp.checkpoint.codec.native import Array
from commcomp.checkpoint.codec.sources import Sources
from commcomp.checkpoint.coded import PREVIOUS

_VALUES_AT_ONCE = 1 << 18


def find_kept_rows(names: Sequence[str], sources: Sources, positive: Collection[str | None] = ()) -> Array | None:
    """bool [rows]: where all of these fp32 tensors, of one shape, are what the parent decodes to; None if nowhere.

    Not where one of those named in `positive` is 0: a parent that is kept exactly may have such, a lossy child not.
    """
    kept: Array | None = None
    for name in names:
        previous = sources.of(name, previous=(PREVIOUS, name)).get("previous")
        if previous is None:
            return None
        tensor = sources.tensor(name)
        rows, columns = matrix_shape(tensor.shape)
        one, other = (widen(data, columns, rows * columns).view(np.int32) for data in (tensor.data, previous.data))
        kept = (np.ones(rows, bool) if kept is None else kept) & (one[:, 0] == other[:, 0])
        left = np.flatnonzero(kept)
        if not left.size:
            return None
        step = max(1, _VALUES_AT_ONCE // columns)
        for part in (left[start : start + step] for start in range(0, len(left), step)):
            kept[part] = (one[part] == other[part]).all(axis=1)
            if name in positive:
                kept[part] &= (one[part].view(np.float32) >= LEAST).all(axis=1)
    return kept if kept is not None and kept.any() else None
