"""Finds a model's side data for a matrix: factors, growth and spread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from commcomp.checkpoint.codec.factors import Aim, fit_factors
from commcomp.checkpoint.codec.keys import OCTAVE, key_of
from commcomp.checkpoint.codec.models import (
    GROWTH_UNIT,
    Model,
    Side,
    empty_side,
    predict,
    refer,
)
from commcomp.checkpoint.codec.native import Array
from commcomp.checkpoint.codec.spread import fit_spread, means

_TINY = np.float32(1e-37)


def fit(
    model: Model, values: Array, others: Mapping[str, Array], aim: Aim
) -> tuple[Side, Array | None, Array | float]:
    """The side data for `values`, fp32 [n, m], with predictions and reference of all of them (`predict` and `refer` of
    models.py); `others` as there."""
    side = empty_side(values.shape)
    everything = slice(0, values.shape[0])
    if model.center in ("growth", "first growth"):
        side = _fit_growth(model, values, others, aim)
    elif model.center in ("none", "previous", "decayed", "average") and aim.most_components:
        rest = _distance(values, predict(model, side, everything, others)[0])
        side = replace(side, factors=fit_factors(rest, aim))
    predictions, growth = predict(model, side, everything, others)
    reference = refer(model, others, growth)
    with np.errstate(all="ignore"):
        # In units of the reference: what has none counts as 0.
        error = _distance(values, predictions) / (np.float32(reference) if isinstance(reference, float) else reference)
        np.abs(error, out=error)
    return replace(side, spread=fit_spread(error)), predictions, reference


def _distance(values: Array, predictions: Array | None) -> Array:
    with np.errstate(all="ignore"):
        return values if predictions is None else values - predictions


def _fit_growth(model: Model, values: Array, others: Mapping[str, Array], aim: Aim) -> Side:
    side = empty_side(values.shape)
    with np.errstate(all="ignore"):
        if model.center == "growth":
            growth = others["previous"] * np.float32(-model.numbers["decay"])
            growth += values
            np.maximum(growth, values * np.float32(2.0**-16), out=growth)
            np.maximum(growth, _TINY, out=growth)
        else:
            growth = np.maximum(values, _TINY)
    keys = key_of(growth).astype(np.float32)
    # Values that never grew would pull their rows and columns down with them.
    np.maximum(keys, np.float32(np.median(keys[:: max(1, len(keys) // 64)]) - 24 * OCTAVE), out=keys)
    rows, columns = means(keys)
    columns -= rows.mean(dtype=np.float64)
    side = replace(side, growth_rows=_rounded(rows), growth_columns=_rounded(columns))
    if aim.most_components:
        keys -= (side.growth_rows * GROWTH_UNIT).astype(np.float32)[:, None]
        keys -= (side.growth_columns * GROWTH_UNIT).astype(np.float32)
        side = replace(side, factors=fit_factors(keys, aim))
    return side


def _rounded(keys: Array) -> Array:
    return np.rint(keys / GROWTH_UNIT).astype(np.int32)
