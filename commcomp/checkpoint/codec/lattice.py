"""One fp32 tensor on a lattice around what is known of it, within a declared bound.

A value becomes the number q of lattice steps that it lies from its prediction; what lies within a step of it becomes 0,
which is the likeliest and takes a fraction of a bit. At the same mean square error that takes a tenth fewer bits than
the nearest point. Three kinds of lattice:

| kind     | reconstruction                              | error at most                          |
|----------|---------------------------------------------|----------------------------------------|
| even     | prediction + q step                         | step                                   |
| scaled   | prediction + q step sqrt(v), v as decoded   | step sqrt(v)                           |
| octaves  | prediction times about 2^(q step), above 0  | step octaves, by keys.key_of           |

What lies too far out, and Inf and NaN, is kept as it is. Rows that are told to be the parent's are taken from there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from commcomp.checkpoint.codec.blocks import join_blocks, split_blocks
from commcomp.checkpoint.codec.factors import Aim
from commcomp.checkpoint.codec.fitting import fit
from commcomp.checkpoint.codec.float_tensor import Other, rows_and_inputs, unpacked
from commcomp.checkpoint.codec.keys import OCTAVE
from commcomp.checkpoint.codec.matrices import matrix_shape, rows_per_chunk, widen
from commcomp.checkpoint.codec.models import Model, Side, model_of, predict, refer
from commcomp.checkpoint.codec.native import FAST, Array, coders, columns_for, decode_symbols, encode_symbols
from commcomp.checkpoint.coded import CodedTensor, HostTensor, TensorHeader

METHOD = "lattice"
KINDS = ("even", "scaled", "octaves")
_ESCAPE = 255
_CONTEXTS = 16
LEAST = np.float32(2.0**-126)
"""Of what comes from octaves."""
_TOLERATED = 0.05
"""Of a step's square: what factors need not explain."""
_NOISE = 0.1
"""Of factors, over what they leave."""


@dataclass(frozen=True)
class Lattice:
    """`kind` and `step` as above; `base`: the sum of a spread's row and column that falls into the middle context;
    `keeps`: whether chunks tell rows that are the parent's."""

    kind: str
    step: float
    base: int = 0
    keeps: bool = False

    def to_settings(self) -> dict[str, Any]:
        """As JSON."""
        return {"kind": self.kind, "step": self.step, "base": self.base, **({"keeps": True} if self.keeps else {})}

    def roles(self, model: Model) -> tuple[str, ...]:
        """Which other tensors are needed, in order."""
        return tuple(dict.fromkeys((*model.inputs, *(("previous",) if self.keeps else ()))))

    def bound(self) -> dict[str, Any]:
        """What is declared in the file."""
        return {"kind": self.kind, "error": self.step}


def encode_on_lattice(
    tensor: HostTensor,
    model: Model,
    kind: str,
    step: float,
    others: Mapping[str, Other],
    most_components: int,
    coder: str = FAST,
    kept: Array | None = None,
) -> CodedTensor:
    """`tensor`: fp32. `others`: by role, what `model` needs. `step`: above 0 as an fp32 number. `kept`: bool [rows], of
    rows that are bit for bit those of `others["previous"]`.

    Values that would come to lie outside the bound are kept as they are.
    """
    shape = matrix_shape(tensor.shape)
    columns, count = shape[1], shape[0] * shape[1]
    values = widen(tensor.data, columns, count)
    matrices = {role: widen(other.data, columns, count) for role, other in others.items()}
    side, predictions, reference = fit(model, values, matrices, _aim(kind, step, matrices, most_components))
    if kept is not None:
        side = replace(side, factors=replace(side.factors, left=np.where(kept[:, None], np.int8(0), side.factors.left)))
    lattice = Lattice(kind, float(np.float32(step)), _base(side), kept is not None)
    reconstruction = values.copy() if kept is not None else np.empty(shape, np.float32)
    chunks, rows_in_chunk = [], rows_per_chunk(columns)
    for start in range(0, shape[0], rows_in_chunk):
        rows = slice(start, min(start + rows_in_chunk, shape[0]))
        of_rows = reference if isinstance(reference, float) else reference[rows]
        known = _Known(lattice, side, rows, None if predictions is None else predictions[rows], of_rows)
        if kept is None:
            chunks.append(join_blocks(known.encode(values[rows], reconstruction[rows], coder)))
            continue
        moved = ~kept[rows]
        made = np.empty((int(moved.sum()), columns), np.float32)
        blocks = known.of(moved).encode(np.ascontiguousarray(values[rows][moved]), made, coder)
        reconstruction[rows][moved] = made
        chunks.append(join_blocks([*blocks, np.packbits(kept[rows], bitorder="little").tobytes()]))
    return CodedTensor(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        method=METHOD,
        settings={**model.to_settings(), "lattice": lattice.to_settings()},
        inputs=tuple(others[role].source for role in lattice.roles(model)),
        chunk_values=min(rows_in_chunk, shape[0]) * columns,
        side=side.pack(),
        chunks=chunks,
        bound=lattice.bound(),
        reconstruction=reconstruction.view(np.uint8).ravel(),
    )


def _aim(kind: str, step: float, matrices: Mapping[str, Array], most_components: int) -> Aim:
    """Of factors, in the units that they have in `fit`."""
    unit = step * OCTAVE if kind == "octaves" else step
    square = unit**2
    if kind == "scaled":
        with np.errstate(all="ignore"):
            square *= float(matrices["second"].mean(dtype=np.float64))
    return Aim(most_components, _TOLERATED * square if 0 < square < np.inf else 0.0, _NOISE)


def decode_chunk(
    header: TensorHeader, side: bytes, payload: bytes, start: int, count: int, inputs: Sequence[Array]
) -> Array:
    """The codec registry's decoder of `METHOD`."""
    model, lattice, shape = model_of(header.settings), _lattice_of(header.settings), matrix_shape(header.shape)
    if header.dtype != "float32":
        raise ValueError(f"dtype {header.dtype} is not coded by this method")
    rows, matrices = rows_and_inputs(header, lattice.roles(model), start, count, inputs)
    known_of_all = unpacked(side, shape)
    predictions, growth = predict(model, known_of_all, rows, matrices)
    reference = refer(model, matrices, growth) if lattice.kind == "scaled" else 1.0
    if lattice.kind == "scaled" and isinstance(reference, float):
        raise ValueError(f"a scaled lattice has the reference {model.reference!r}; expected one for every value")
    known = _Known(lattice, known_of_all, rows, predictions, reference)
    if not lattice.keeps:
        return known.decode(*split_blocks(payload, 2)).view(np.uint8).ravel()
    symbols, escapes, bits = split_blocks(payload, 3)
    count_of_rows = rows.stop - rows.start
    if len(bits) != -(-count_of_rows // 8):
        raise ValueError(f"{len(bits)} bytes tell which of {count_of_rows} rows are the parent's")
    kept = np.unpackbits(np.frombuffer(bits, np.uint8), count=count_of_rows, bitorder="little").astype(bool)
    values = matrices["previous"].copy()
    values[~kept] = known.of(~kept).decode(symbols, escapes)
    return values.view(np.uint8).ravel()


def _lattice_of(settings: Mapping[str, Any]) -> Lattice:
    try:
        given = settings["lattice"]
        keeps = given.get("keeps", False) is True
        lattice = Lattice(str(given["kind"]), float(np.float32(given["step"])), int(given["base"]), keeps)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the settings of a lattice are not as expected: {error!r}") from error
    if lattice.kind not in KINDS or not 0 < lattice.step < np.inf or abs(lattice.base) > 1 << 20:
        raise ValueError(f"a lattice of kind {lattice.kind!r} with step {lattice.step} is none")
    return lattice


def _base(side: Side) -> int:
    """The spread's most common sum of row and column, so that contexts tell rows and columns apart around it."""
    return int(np.median(side.spread.rows) + np.median(side.spread.columns))


class _Known:
    """What encoder and decoder both know of some rows: predictions (or None for 0) and a reference."""

    def __init__(
        self, lattice: Lattice, side: Side, rows: slice, predictions: Array | None, reference: Array | float
    ) -> None:
        self._lattice = lattice
        self._shape = (rows.stop - rows.start, len(side.spread.columns))
        self._octaves = lattice.kind == "octaves"
        self._predictions = None if predictions is None else np.ascontiguousarray(predictions)
        self._reference = np.ascontiguousarray(reference) if lattice.kind == "scaled" else None
        self._contexts = np.empty(self._shape, np.uint8)
        row, column = map(np.ascontiguousarray, (side.spread.rows[rows], side.spread.columns))
        coders().lattice_contexts(row, column, lattice.base, self._contexts)

    def of(self, moved: Array) -> _Known:
        """What is known of those rows alone; bool [rows]."""
        some = copy.copy(self)
        some._shape = (int(moved.sum()), self._shape[1])
        some._predictions = None if self._predictions is None else self._predictions[moved]
        some._reference = None if self._reference is None else self._reference[moved]
        some._contexts = self._contexts[moved]
        return some

    def encode(self, values: Array, reconstruction: Array, coder: str) -> list[bytes]:
        """Symbols, and values that are kept as they are; `reconstruction` is filled, every value of it within the bound
        of the one it is for."""
        symbols = np.empty(self._shape, np.uint8)
        known = (self._octaves, self._predictions, self._reference, self._lattice.step)
        coders().cut_on_lattice(values, *known, symbols, reconstruction)
        escaped = symbols == _ESCAPE
        kept = values[escaped]
        if self._octaves:
            kept = np.where(kept < LEAST, LEAST, kept)  # a second moment of 0 would blow up the next steps
        reconstruction[escaped] = kept
        columns = columns_for(coder, self._shape[1])
        data = encode_symbols(symbols.ravel(), self._contexts.ravel(), _CONTEXTS, columns)
        return [data, np.ascontiguousarray(kept, np.float32).tobytes()]

    def decode(self, symbol_data: bytes, escape_data: bytes) -> Array:
        """Back, fp32 [rows, m]. ValueError where it is nothing that `encode` made."""
        symbols = decode_symbols(symbol_data, self._contexts.size, self._contexts.ravel(), _CONTEXTS)
        symbols = symbols.reshape(self._shape)
        values = np.empty(self._shape, np.float32)
        known = (self._octaves, self._predictions, self._reference, self._lattice.step)
        coders().join_on_lattice(symbols, *known, values)
        escaped = symbols == _ESCAPE
        if len(escape_data) != 4 * int(np.count_nonzero(escaped)):
            raise ValueError(f"{len(escape_data)} bytes of values kept as they are; expected 4 for each such symbol")
        values[escaped] = np.frombuffer(escape_data, np.float32)
        return values
