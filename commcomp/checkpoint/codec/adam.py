"""The numbers of the one Adam step between two snapshots, found from weights and moments: rates change after a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from commcomp.checkpoint.codec.native import Array

_SAMPLE = 1 << 17


@dataclass(frozen=True)
class AdamStep:
    """w1 = decay w0 + step m / (sqrt(v) / correction + epsilon), in torch's order of operations."""

    decay: float
    step: float
    correction: float
    epsilon: float


def fit_adam_step(arrays: Sequence[Array], count: float, beta2: float, epsilon: float) -> AdamStep | None:
    """By least squares on a sample; None where that has no answer.

    `arrays`: the weight after the step and before, the moments after it; flat, of the same number of values.
    """
    if len({len(array) for array in arrays}) != 1 or not 0 < beta2 < 1 or count < 1:
        return None
    stride = max(1, len(arrays[0]) // _SAMPLE)
    after, before, mean, square = (array[::stride].astype(np.float64) for array in arrays)
    correction = float(np.sqrt(1 - beta2**count))
    with np.errstate(all="ignore"):
        direction = mean / (np.sqrt(square) / correction + epsilon)
        system = np.stack([direction, before], axis=1)
        normal = system.T @ system
        if not np.isfinite(normal).all() or np.linalg.matrix_rank(normal) < 2:
            return None
        step, shrink = np.linalg.solve(normal, system.T @ (after - before))
    return AdamStep(decay=1 + float(shrink), step=float(step), correction=correction, epsilon=epsilon)
