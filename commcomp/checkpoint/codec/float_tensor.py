"""One tensor of fp32 or bf16 values, exactly: the model that suits it, its side data, its chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from commcomp.checkpoint.codec.factors import WITHOUT_FACTORS, Aim
from commcomp.checkpoint.codec.fitting import fit
from commcomp.checkpoint.codec.matrices import FORMATS, matrix_shape, rows_per_chunk, widen
from commcomp.checkpoint.codec.models import Model, Side, known_from, look, model_of, unpack_side
from commcomp.checkpoint.codec.native import FAST, Array, Known, columns_for, decode_floats, encode_floats
from commcomp.checkpoint.coded import CodedTensor, HostTensor, Input, SideData, TensorHeader

METHOD = "floats"
_SAMPLE_VALUES = 1 << 13
_HEADER_BYTES = 300
"""What a tensor's entry in the directory takes over one that is stored as it is."""


@dataclass(frozen=True)
class Other:
    """Another tensor that a model may use: where it is, and its raw bytes."""

    source: Input
    data: Array
    is_wide: bool = True
    """fp32, not bf16."""

    def values(self) -> Array:
        """fp32, flat."""
        return widen(self.data, 1, len(self.data) // (4 if self.is_wide else 2)).ravel()


@dataclass(frozen=True)
class Candidate:
    """A model, and how many components its factors may have."""

    model: Model
    most_components: int


def encode_tensor(
    tensor: HostTensor, candidates: Sequence[Candidate], others: Mapping[str, Other], coder: str = FAST
) -> CodedTensor | None:
    """The tensor by the candidate that suits a sample of its rows best; None if it is no smaller than its bytes.

    `others`: by role (models.CENTERS, models.REFERENCES), all that any candidate needs. `coder`: one of CODERS.
    """
    rows, columns = matrix_shape(tensor.shape)
    values = widen(tensor.data, columns, rows * columns)
    matrices = {role: widen(other.data, columns, rows * columns) for role, other in others.items()}
    best = candidates[0] if len(candidates) == 1 else _best(tensor, values, candidates, matrices)
    side, known = _fitted(best.model, values, matrices, Aim(best.most_components))
    step = rows_per_chunk(columns)
    if step >= rows:
        chunks = [encode_floats(FORMATS[tensor.dtype], tensor.data, known, columns_for(coder, columns))]
    else:
        del known
        parts = (slice(start, min(start + step, rows)) for start in range(0, rows, step))
        chunks = [_encode_rows(tensor, values, best.model, side, matrices, part, coder) for part in parts]
    packed = side.pack()
    if len(packed) + sum(map(len, chunks)) + _HEADER_BYTES >= len(tensor.data):
        return None
    return CodedTensor(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        method=METHOD,
        settings=best.model.to_settings(),
        inputs=tuple(others[role].source for role in best.model.inputs),
        chunk_values=min(step * columns, rows * columns),
        side=packed,
        chunks=chunks,
    )


def decode_chunk(
    header: TensorHeader, side: bytes, payload: bytes, start: int, count: int, inputs: Sequence[Array]
) -> Array:
    """The codec registry's decoder of `METHOD`."""
    format = FORMATS.get(header.dtype)
    if format is None:
        raise ValueError(f"dtype {header.dtype} is not coded by this method")
    model = model_of(header.settings)
    rows, others = rows_and_inputs(header, model.inputs, start, count, inputs)
    known = look(model, unpacked(side, matrix_shape(header.shape)), rows, others)
    return decode_floats(format, payload, count, known)


def unpacked(side: bytes, shape: tuple[int, int]) -> Side:
    """`unpack_side`, once for all chunks of a tensor."""
    if not isinstance(side, SideData):
        return unpack_side(side, shape)
    if side.unpacked is None:
        side.unpacked = unpack_side(side, shape)
    found: Side = side.unpacked
    return found


def rows_and_inputs(
    header: TensorHeader, roles: Sequence[str], start: int, count: int, inputs: Sequence[Array]
) -> tuple[slice, dict[str, Array]]:
    """Which rows the values [start, start + count) are, and by role the same rows of the inputs. ValueError if none."""
    if len(inputs) != len(roles):
        raise ValueError(f"{len(inputs)} inputs; the settings ask for {', '.join(roles) or 'none'}")
    rows, columns = matrix_shape(header.shape)
    if header.chunk_values != min(rows_per_chunk(columns), rows) * columns:
        raise ValueError(f"chunks of {header.chunk_values} values in rows of {columns} are not of this method")
    if start % columns or count % columns:
        raise ValueError(f"values {start} to {start + count} are no whole rows of {columns}")
    others = {role: widen(data, columns, count) for role, data in zip(roles, inputs, strict=True)}
    return slice(start // columns, (start + count) // columns), others


def _fitted(model: Model, values: Array, matrices: Mapping[str, Array], aim: Aim) -> tuple[Side, Known]:
    """Side data, and what is known of all rows with it."""
    side, predictions, reference = fit(model, values, matrices, aim)
    return side, known_from(model, side, slice(0, len(values)), predictions, reference)


def _encode_rows(
    tensor: HostTensor,
    values: Array,
    model: Model,
    side: Side,
    matrices: Mapping[str, Array],
    rows: slice,
    coder: str,
) -> bytes:
    known = look(model, side, rows, {role: matrices[role][rows] for role in model.inputs})
    width = len(tensor.data) // values.size
    columns = values.shape[1]
    data = tensor.data[rows.start * columns * width : rows.stop * columns * width]
    return encode_floats(FORMATS[tensor.dtype], data, known, columns_for(coder, columns))


def _best(
    tensor: HostTensor, values: Array, candidates: Sequence[Candidate], matrices: Mapping[str, Array]
) -> Candidate:
    """By the bytes of a few rows from the middle, without factors."""
    rows, columns = values.shape
    num = min(rows, max(1, _SAMPLE_VALUES // columns))
    sample = slice((rows - num) // 2, (rows - num) // 2 + num)
    width = len(tensor.data) // values.size
    part = HostTensor(
        tensor.name,
        tensor.dtype,
        (num, columns),
        tensor.data[sample.start * columns * width : sample.stop * columns * width],
    )
    few = {role: matrix[sample] for role, matrix in matrices.items()}

    def size(candidate: Candidate) -> int:
        known = _fitted(candidate.model, values[sample], few, WITHOUT_FACTORS)[1]
        return len(encode_floats(FORMATS[tensor.dtype], part.data, known))

    return min(candidates, key=size)
