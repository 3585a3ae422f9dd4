"""What is known of a matrix of floats before it is read: a center that they lie near, and a reference for how near.

Every operation is one correctly rounded IEEE operation or integer arithmetic, so that all machines decode alike.

| center    | prediction                                             | from                                   |
|-----------|--------------------------------------------------------|----------------------------------------|
| none      | L, a low-rank matrix (factors.py)                      |                                        |
| previous  | x0 + L                                                 | the values in the parent snapshot, x0  |
| decayed   | c x0 + L                                               | x0                                     |
| growth    | c x0 + G, log G = row + column + L                     | x0, or nothing (c = 0)                 |
| adam      | Adam's step from x0                                    | x0, moments after it                   |
| squared   | b2 x0 + (1 - b2) g^2, g from both first moments        | x0, first moment after and before      |

| reference     | scatter in proportion to                               |
|---------------|--------------------------------------------------------|
| constant      | 1                                                      |
| root          | sqrt(v), v the second moment                           |
| growth_root   | sqrt(v - c v0): what v has grown by                    |
| previous_root | sqrt(v0)                                               |
| growth        | G; with second and largest what they predict           |

All times a factor for each row and each column (spread.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from commcomp.checkpoint.codec.blocks import join_blocks, pack_int16, split_blocks, unpack_int16
from commcomp.checkpoint.codec.factors import Factors, no_factors, unpack_factors
from commcomp.checkpoint.codec.keys import value_of
from commcomp.checkpoint.codec.native import Array, Known
from commcomp.checkpoint.codec.spread import Spread, unpack_spread

CENTERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "previous": ("previous",),
    "decayed": ("previous",),
    "growth": ("previous",),
    "first growth": (),
    "adam": ("previous", "first", "second"),
    "squared": ("previous", "first", "previous first"),
    "second": ("second",),
    "largest": ("previous", "second"),
    "average": ("previous", "weight", "previous weight"),
}
"""By center, which other tensors it is made from."""
REFERENCES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "root": ("second",),
    "growth_root": ("second", "previous second"),
    "previous_root": ("previous second",),
    "growth": (),
}
"""By reference, which other tensors it is made from."""

GROWTH_UNIT = 1 << 17
"""Rows and columns of growth are in 64ths of an octave."""
_KEY_LIMIT = 1 << 28


@dataclass(frozen=True)
class Model:
    """One way of knowing a matrix, with its numbers (fp32 values)."""

    center: str
    reference: str
    cut: str
    resolution: int
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Which other tensors it needs, in order."""
        return tuple(dict.fromkeys((*CENTERS[self.center], *REFERENCES[self.reference])))

    def to_settings(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "center": self.center,
            "reference": self.reference,
            "cut": self.cut,
            "resolution": self.resolution,
            "numbers": dict(self.numbers),
        }


def model_of(settings: Mapping[str, Any]) -> Model:
    """Back. ValueError naming what is wrong."""
    try:
        center, reference, cut = (str(settings[key]) for key in ("center", "reference", "cut"))
        resolution = int(settings["resolution"])
        numbers = {str(key): float(np.float32(value)) for key, value in dict(settings["numbers"]).items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the settings of a float tensor are not as expected: {error!r}") from error
    if center not in CENTERS or reference not in REFERENCES:
        raise ValueError(f"center {center!r} with reference {reference!r} is not known to this version")
    if not 0 <= resolution <= 22:
        raise ValueError(f"the resolution is {resolution}; expected 0 to 22")
    return Model(center, reference, cut, resolution, numbers)


@dataclass(frozen=True)
class Side:
    """What belongs to the whole matrix."""

    spread: Spread
    factors: Factors
    growth_rows: Array
    growth_columns: Array

    def pack(self) -> bytes:
        """As bytes."""
        growth = [pack_int16(self.growth_rows), pack_int16(self.growth_columns)] if self.growth_rows.size else []
        return join_blocks([self.spread.pack(), self.factors.pack(), join_blocks(growth)])


def unpack_side(data: bytes, shape: tuple[int, int]) -> Side:
    """Back. ValueError where it is nothing that `pack` made for a matrix of this shape."""
    spread, factors, growth = split_blocks(data, 3)
    rows, columns = (np.zeros(0, np.int32),) * 2
    if growth:
        parts = split_blocks(growth, 2)
        rows, columns = (unpack_int16(part, size) for part, size in zip(parts, shape, strict=True))
    return Side(unpack_spread(spread, shape), unpack_factors(factors, shape), rows, columns)


def look(model: Model, side: Side, rows: slice, others: Mapping[str, Array]) -> Known:
    """What is known of some rows. `others`: by role, the same rows of other tensors, fp32 [rows, m]."""
    predictions, growth = predict(model, side, rows, others)
    return known_from(model, side, rows, predictions, refer(model, others, growth))


def known_from(
    model: Model, side: Side, rows: slice, predictions: Array | None, reference: Array | float
) -> Known:
    """What `predict` and `refer` found of some rows, as the coder takes it."""
    scales = side.spread.times(reference, rows)
    flat = None if predictions is None else np.ascontiguousarray(predictions).ravel()
    return Known(model.cut, flat, np.ascontiguousarray(scales).ravel(), 1.0, model.resolution)


def predict(model: Model, side: Side, rows: slice, others: Mapping[str, Array]) -> tuple[Array | None, Array | None]:
    """The center, fp32 [rows, m] or None for zeros, and what the reference "growth" is with it, where it goes with it:
    what v has grown by, or what is predicted of amsgrad's largest v."""
    number = {key: np.float32(value) for key, value in model.numbers.items()}
    with np.errstate(all="ignore"):
        if model.center in ("growth", "first growth"):
            growth = grown(side, rows)
            if model.center == "first growth":
                return growth, growth
            return others["previous"] * number["decay"] + growth, growth
        if model.center in ("second", "largest"):
            second = others["second"]
            if model.center == "largest":
                second = np.where(others["previous"] > second, others["previous"], second)
            return second, second
        if model.center == "adam":
            denominator = np.sqrt(others["second"])
            denominator /= number["correction"]
            denominator += number["epsilon"]
            step = others["first"] / denominator
            step *= number["step"]
            step += others["previous"] * number["decay"]
            return step, None
        if model.center == "squared":
            gradient = others["first"] - others["previous first"]
            gradient /= number["rest"]
            gradient += others["previous first"]
            squares = gradient * number["rest2"]
            squares *= gradient
            squares += others["previous"] * number["decay"]
            return squares, None
        return _around(side, rows, _near(model.center, number, others)), None


def _near(center: str, number: Mapping[str, np.float32], others: Mapping[str, Array]) -> Array | None:
    """What low-rank factors are added to; None for zeros."""
    if center == "none":
        return None
    previous = others["previous"]
    if center == "decayed":
        return previous * number["decay"]
    if center == "average":
        near = others["weight"] - previous
        near *= number["rate"]
        near += previous
        near += (others["previous weight"] - previous) * number["rate_before"]
        return near
    return previous


def _around(side: Side, rows: slice, near: Array | None) -> Array | None:
    if not side.factors.left.shape[1]:
        return near
    low_rank = side.factors.product(rows)
    if near is not None:
        low_rank += near
    return low_rank


def grown(side: Side, rows: slice) -> Array:
    """What a second moment has grown by, as rows, columns and factors say: fp32 [rows, m]."""
    row, column = (
        np.clip(keys.astype(np.int64) * GROWTH_UNIT, -_KEY_LIMIT * 3, _KEY_LIMIT * 3).astype(np.int32)
        for keys in (side.growth_rows[rows], side.growth_columns)
    )
    column = np.clip(column, -_KEY_LIMIT, _KEY_LIMIT)
    keys: Array = row[:, None] + column[None, :]
    if side.factors.left.shape[1]:
        moved = side.factors.product(rows)
        np.rint(moved, out=moved)
        np.clip(moved, -_KEY_LIMIT, _KEY_LIMIT, out=moved)
        keys += moved.astype(np.int32)
    return value_of(keys)


def refer(model: Model, others: Mapping[str, Array], growth: Array | None) -> Array | float:
    """The reference, fp32 [rows, m], or a number that stands for all. `growth`: as `predict` gave it."""
    if model.reference == "growth" and growth is not None:
        return growth
    if model.reference == "constant":
        return float(np.float32(model.numbers.get("scale", 1.0)))
    with np.errstate(all="ignore"):
        if model.reference == "previous_root":
            return np.sqrt(others["previous second"])
        if model.reference == "root":
            return np.sqrt(others["second"])
        if model.reference == "growth_root":
            growth = others["previous second"] * np.float32(-model.numbers["decay2"])
            growth += others["second"]
            np.maximum(growth, others["second"] * np.float32(2.0**-20), out=growth)
            return np.sqrt(growth, out=growth)
    raise ValueError(f"reference {model.reference!r} does not go with center {model.center!r}")


def empty_side(shape: tuple[int, int]) -> Side:
    """Of a matrix about which nothing is known yet."""
    nothing = np.zeros(0, np.int32)
    spread = Spread(np.zeros(shape[0], np.int32), np.zeros(shape[1], np.int32))
    return Side(spread, no_factors(shape), nothing, nothing)
