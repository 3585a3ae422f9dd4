"""One fp32 tensor on a lattice around what is known of it, within a declared bound.

A value becomes the number q of lattice steps that it lies from its prediction; what lies within `ZONE` of a step
becomes 0, which is the likeliest and takes a fraction of a bit. Three kinds of lattice:

| kind     | reconstruction                              | error at most                          |
|----------|---------------------------------------------|----------------------------------------|
| even     | prediction + q step                         | ZONE step                              |
| scaled   | prediction + q step sqrt(v), v as decoded   | ZONE step sqrt(v)                      |
| octaves  | prediction times about 2^(q step), above 0  | ZONE step octaves, by keys.key_of      |

What lies too far out, and Inf and NaN, is kept as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from commcomp.checkpoint.codec.blocks import join_blocks, split_blocks
from commcomp.checkpoint.codec.fitting import fit
from commcomp.checkpoint.codec.float_tensor import Other, rows_and_inputs
from commcomp.checkpoint.codec.keys import OCTAVE, key_of, value_of
from commcomp.checkpoint.codec.matrices import matrix_shape, rows_per_chunk, widen
from commcomp.checkpoint.codec.models import Model, Side, model_of, predict, refer, unpack_side
from commcomp.checkpoint.codec.native import Array, decode_symbols, encode_symbols
from commcomp.checkpoint.coded import CodedTensor, HostTensor, TensorHeader

METHOD = "lattice"
KINDS = ("even", "scaled", "octaves")
ZONE = 0.6
"""Of a step: what is nearer to the prediction than that becomes it."""
_ESCAPE = 255
_LARGEST = 127
_CONTEXTS = 16
_LEAST = np.float32(2.0**-126)
_ROUNDING = 1e-5
"""By how much fp32 arithmetic may exceed a bound, as a share of it and of the value."""


@dataclass(frozen=True)
class Lattice:
    """`kind` and `step` as above; `base`: the sum of a spread's row and column that falls into the middle context."""

    kind: str
    step: float
    base: int = 0

    def bound(self) -> dict[str, Any]:
        """What is declared in the file."""
        return {"kind": self.kind, "error": ZONE * self.step}


def encode_on_lattice(
    tensor: HostTensor, model: Model, kind: str, step: float, others: Mapping[str, Other], most_components: int
) -> CodedTensor:
    """`tensor`: fp32. `others`: by role, what `model` needs. The reconstruction is checked against the bound.

    Raises ValueError naming the tensor where it does not hold, which would be a defect.
    """
    shape = matrix_shape(tensor.shape)
    columns, count = shape[1], shape[0] * shape[1]
    values = widen(tensor.data, columns, count)
    if kind == "octaves":
        values = np.where(values < _LEAST, _LEAST, values)  # a second moment of 0 would blow up the next steps
    matrices = {role: widen(other.data, columns, count) for role, other in others.items()}
    side = fit(model, values, matrices, most_components)[0]
    lattice = Lattice(kind, float(np.float32(step)), _base(side))
    reconstruction = np.empty(shape, np.float32)
    chunks, rows_in_chunk = [], rows_per_chunk(columns)
    for start in range(0, shape[0], rows_in_chunk):
        rows = slice(start, min(start + rows_in_chunk, shape[0]))
        known = _Known(lattice, model, side, rows, {role: matrices[role][rows] for role in model.inputs})
        steps, escaped = known.steps_of(values[rows])
        reconstruction[rows] = known.values_of(steps)
        reconstruction[rows][escaped] = values[rows][escaped]
        chunks.append(_pack(known, steps, escaped, values[rows][escaped]))
        _require_bound(tensor.name, known, values[rows], reconstruction[rows])
    return CodedTensor(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        method=METHOD,
        settings={**model.to_settings(), "lattice": vars(lattice)},
        inputs=tuple(others[role].source for role in model.inputs),
        chunk_values=min(rows_in_chunk, shape[0]) * columns,
        side=side.pack(),
        chunks=chunks,
        bound=lattice.bound(),
        reconstruction=reconstruction.view(np.uint8).ravel(),
    )


def decode_chunk(
    header: TensorHeader, side: bytes, payload: bytes, start: int, count: int, inputs: Sequence[Array]
) -> Array:
    """The codec registry's decoder of `METHOD`."""
    model, lattice, shape = model_of(header.settings), _lattice_of(header.settings), matrix_shape(header.shape)
    if header.dtype != "float32":
        raise ValueError(f"dtype {header.dtype} is not coded by this method")
    rows, matrices = rows_and_inputs(header, model, start, count, inputs)
    known = _Known(lattice, model, unpack_side(side, shape), rows, matrices)
    symbol_data, escape_data = split_blocks(payload, 2)
    symbols = decode_symbols(symbol_data, count, known.contexts().ravel(), _CONTEXTS).reshape(-1, shape[1])
    escaped = symbols == _ESCAPE
    if len(escape_data) != 4 * int(escaped.sum()):
        raise ValueError(f"{len(escape_data)} bytes of values kept as they are; expected {4 * int(escaped.sum())}")
    values = known.values_of(symbols.astype(np.float32) - np.float32(_LARGEST))
    values[escaped] = np.frombuffer(escape_data, np.float32)
    return np.ascontiguousarray(values).view(np.uint8).ravel()


def _lattice_of(settings: Mapping[str, Any]) -> Lattice:
    try:
        given = settings["lattice"]
        lattice = Lattice(str(given["kind"]), float(np.float32(given["step"])), int(given["base"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the settings of a lattice are not as expected: {error!r}") from error
    if lattice.kind not in KINDS or not 0 < lattice.step < np.inf or abs(lattice.base) > 1 << 20:
        raise ValueError(f"a lattice of kind {lattice.kind!r} with step {lattice.step} is none")
    return lattice


def _base(side: Side) -> int:
    """The spread's most common sum of row and column, so that contexts tell rows and columns apart around it."""
    return int(np.median(side.spread.rows) + np.median(side.spread.columns))


class _Known:
    """What encoder and decoder both know of some rows."""

    def __init__(
        self, lattice: Lattice, model: Model, side: Side, rows: slice, others: Mapping[str, Array]
    ) -> None:
        self.lattice, self._side, self._rows = lattice, side, rows
        predictions, growth = predict(model, side, rows, others)
        self._shape = (rows.stop - rows.start, len(side.spread.columns))
        self._predictions = np.zeros(self._shape, np.float32) if predictions is None else predictions
        with np.errstate(all="ignore"):
            self.width: Array | np.float32 = np.float32(lattice.step)
            if lattice.kind == "scaled":
                self.width = refer(model, others, growth) * self.width

    def contexts(self) -> Array:
        """By how widely the values scatter, in half octaves around the middle: uint8 [rows, m]."""
        row, column = self._side.spread.rows[self._rows], self._side.spread.columns
        sums = (row[:, None] + column[None, :] - self.lattice.base) >> 2
        contexts: Array = np.clip(sums + _CONTEXTS // 2, 0, _CONTEXTS - 1).astype(np.uint8)
        return contexts

    def steps_of(self, values: Array) -> tuple[Array, Array]:
        """Lattice steps, whole numbers in fp32, and which values are to be kept as they are."""
        with np.errstate(all="ignore"):
            if self.lattice.kind == "octaves":
                away = (key_of(values) - key_of(self._predictions)).astype(np.float32) / np.float32(OCTAVE)
                away /= self.width
                escaped = ~(values >= _LEAST) | ~np.isfinite(values)
            else:
                away = (values - self._predictions) / self.width
                escaped = ~np.isfinite(values)
            steps = np.rint(away)
            steps[np.abs(away) <= np.float32(ZONE)] = 0
            escaped |= ~(np.abs(steps) <= _LARGEST) | ~np.isfinite(self.width)
        steps[escaped] = 0
        return steps, escaped

    def values_of(self, steps: Array) -> Array:
        """The reconstruction, fp32."""
        with np.errstate(all="ignore"):
            if self.lattice.kind == "octaves":
                units = np.int64(round(self.lattice.step * OCTAVE))
                return value_of(key_of(self._predictions) + steps.astype(np.int64) * units)
            out: Array = steps * self.width
            out += self._predictions
            return out


def _pack(known: _Known, steps: Array, escaped: Array, kept: Array) -> bytes:
    symbols = (steps + np.float32(_LARGEST)).astype(np.uint8)
    symbols[escaped] = _ESCAPE
    data = encode_symbols(symbols.ravel(), known.contexts().ravel(), _CONTEXTS)
    return join_blocks([data, np.ascontiguousarray(kept, np.float32).tobytes()])


def _require_bound(name: str, known: _Known, values: Array, reconstruction: Array) -> None:
    lattice = known.lattice
    with np.errstate(all="ignore"):
        sound = np.isfinite(values)
        if lattice.kind == "octaves":
            error = np.abs(key_of(values) - key_of(reconstruction).astype(np.int64)) / OCTAVE
            most: Any = ZONE * lattice.step + _ROUNDING
        else:
            error = np.abs(values - reconstruction)
            most = ZONE * known.width * (1 + _ROUNDING) + _ROUNDING * np.abs(values)
        wrong = sound & ~(error <= most)
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"tensor {name!r}: value {place} of a chunk, {values.flat[place]!r}, became "
            f"{reconstruction.flat[place]!r}, outside the bound of its lattice ({lattice}); save in mode 'lossless'"
        )
