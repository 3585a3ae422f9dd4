"""One fp32 tensor as whole numbers of steps, within half a step: for weights that nothing is known of.

The numbers may be as large as they like, which those of a lattice (lattice.py) may not: around 0 a step that is far
smaller than the values would leave most of them out of reach. They are coded in planes (planes.py).
"""

from __future__ import annotations

import numpy as np

from commcomp.checkpoint.codec.matrices import widen
from commcomp.checkpoint.codec.planes import CHUNK_VALUES, METHOD, encode_words
from commcomp.checkpoint.codec.words import words_of
from commcomp.checkpoint.coded import CodedTensor, HostTensor

_MOST_STEPS = 1 << 20
"""Further out a unit in the last place is no small part of a step."""
_ROUNDING = 2.0**-23


def encode_in_steps(tensor: HostTensor, step: float) -> CodedTensor | None:
    """`tensor`: fp32 with values; None where it has Inf, NaN or values that many steps are not enough for.

    Raises ValueError naming the tensor where the bound does not hold, which would be a defect.
    """
    values, step = widen(tensor.data, 1, len(tensor.data) // 4).ravel(), float(np.float32(step))
    if not step > 0 or not np.abs(values).max() <= step * _MOST_STEPS:
        return None
    kind = words_of("int32")
    reconstruction = np.empty(len(values), np.float32)
    chunks = []
    for start in range(0, len(values), CHUNK_VALUES):
        part = slice(start, start + CHUNK_VALUES)
        numbers = np.rint(values[part] / np.float64(step)).astype(np.int32)
        reconstruction[part] = numbers.astype(np.float32) * np.float32(step)
        error = np.abs(values[part] - reconstruction[part].astype(np.float64))
        if not (error <= (0.5 + 1e-5) * step + _ROUNDING * np.abs(values[part])).all():
            raise ValueError(f"tensor {tensor.name!r}: a value is off by more than half of {step}; save 'lossless'")
        chunks.append(encode_words(kind, "none", numbers.view(np.uint32), None))
    return CodedTensor(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        method=METHOD,
        settings={"base": "none", "step": step},
        inputs=(),
        chunk_values=min(CHUNK_VALUES, len(values)),
        side=b"",
        chunks=chunks,
        bound={"kind": "even", "error": 0.5 * step},
        reconstruction=reconstruction.view(np.uint8),
    )
