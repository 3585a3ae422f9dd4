"""The numbers by which a moving average of weights went on between two snapshots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from commcomp.checkpoint.codec.native import Array

_SAMPLE = 1 << 17


def fit_average(arrays: Sequence[Array]) -> tuple[float, float] | None:
    """Rates a and b of e1 = e0 + a (w1 - e0) + b (w0 - e0), by least squares on a sample; None where there are none.

    `arrays`: the average after and before, e1 and e0, the weight after and before, w1 and w0; flat, equally long.
    """
    if len({len(array) for array in arrays}) != 1:
        return None
    stride = max(1, len(arrays[0]) // _SAMPLE)
    after, before, weight, weight_before = (array[::stride].astype(np.float64) for array in arrays)
    with np.errstate(all="ignore"):
        system = np.stack([weight - before, weight_before - before], axis=1)
        normal = system.T @ system
        if not np.isfinite(normal).all() or np.linalg.matrix_rank(normal) < 2:
            return None
        rate, rate_before = np.linalg.solve(normal, system.T @ (after - before))
    return (float(rate), float(rate_before)) if np.isfinite([rate, rate_before]).all() else None
