"""The encoders of modes "cautious", "standard" and "compact": weights and moments on lattices, all else exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from commcomp.checkpoint.codec.float_tensor import Other
from commcomp.checkpoint.codec.lattice import encode_on_lattice
from commcomp.checkpoint.codec.lossless import Family, LosslessEncoder, Sources, families_of
from commcomp.checkpoint.codec.matrices import matrix_shape, widen
from commcomp.checkpoint.codec.models import Model
from commcomp.checkpoint.codec.native import FAST
from commcomp.checkpoint.coded import CURRENT, PREVIOUS, CodedTensor, HostTensor, Input, Reference, TreeInfo
from commcomp.checkpoint.parallel import ordered_map


@dataclass(frozen=True)
class Quality:
    """Lattice steps: of a weight as a share of its change's standard deviation; of a first moment in units of the root
    of the second; of a second moment in octaves. Components: of the factors of weights and first moments, and of second
    moments."""

    weight: float
    first: float
    second: float
    components: int
    second_components: int


QUALITIES = {
    "cautious": Quality(weight=0.4, first=0.2, second=0.6, components=64, second_components=16),
    "standard": Quality(weight=0.6, first=0.6, second=2.4, components=64, second_components=8),
    "compact": Quality(weight=1.0, first=0.8, second=3.0, components=64, second_components=8),
}

_LEAST_SIDE = 16
"""Smaller matrices, and vectors, are kept exactly."""


class LossyEncoder:
    """A `SnapshotEncoder` within declared bounds. It remembers each weight's step for snapshots without a parent."""

    def __init__(self, quality: Quality, threads: int = 1, coder: str = FAST) -> None:
        self._quality, self._threads, self._coder = quality, threads, coder
        self._exact = LosslessEncoder(threads, coder)
        self._steps: dict[str, float] = {}

    def __call__(
        self, tensors: Mapping[str, HostTensor], tree_info: TreeInfo, previous: Reference | None
    ) -> Iterator[CodedTensor]:
        families = [
            family
            for family in families_of(list(tensors), tensors, tree_info)
            if family.first and family.second and all(_is_matrix(tensors[name]) for name in family.names)
        ]
        lossy = {name for family in families for name in family.names}
        rest = {name: tensor for name, tensor in tensors.items() if name not in lossy}
        yield from self._exact(rest, tree_info, previous)
        for coded in ordered_map(lambda family: self._encode(family, tensors, previous), families, self._threads):
            yield from coded

    def _encode(
        self, family: Family, tensors: Mapping[str, HostTensor], previous: Reference | None
    ) -> list[CodedTensor]:
        assert family.first is not None and family.second is not None
        quality, coder, sources = self._quality, self._coder, Sources(tensors, previous, family.names)
        growth, components = Model("first growth", "growth", "linear", 3), quality.second_components
        second = encode_on_lattice(tensors[family.second], growth, "octaves", quality.second, {}, components, coder)
        assert second.reconstruction is not None
        root = {"second": Other(Input(CURRENT, family.second), second.reconstruction)}
        scatter = Model("none", "root", "linear", 3)
        first = encode_on_lattice(
            tensors[family.first], scatter, "scaled", quality.first, root, quality.components, coder
        )
        coded = [second, first]
        if family.weight is not None:
            coded.append(self._weight(family.weight, family, tensors, sources))
        return coded

    def _weight(
        self, name: str, family: Family, tensors: Mapping[str, HostTensor], sources: Sources
    ) -> CodedTensor:
        tensor = tensors[name]
        others = sources.of(name, previous=(PREVIOUS, name))
        if "previous" in others:
            columns = matrix_shape(tensor.shape)[1]
            count = len(tensor.data) // 4
            with np.errstate(all="ignore"):  # Inf and NaN leave no width
                change = widen(tensor.data, columns, count) - widen(others["previous"].data, columns, count)
                width = float(np.std(change, dtype=np.float64))
            if 0 < width < np.inf:
                self._steps[name] = self._quality.weight * width
                model = Model("previous", "constant", "linear", 3)
                components, step = self._quality.components, self._steps[name]
                return encode_on_lattice(tensor, model, "even", step, others, components, self._coder)
        rate = family.moments.rate if family.moments is not None else None
        step = self._steps.get(name, rate)
        if step is None or not 0 < step < np.inf:
            return self._exact.alone(tensor, sources)
        return encode_on_lattice(tensor, Model("none", "constant", "linear", 3), "even", step, {}, 0, self._coder)


def _is_matrix(tensor: HostTensor) -> bool:
    return tensor.dtype == "float32" and min(matrix_shape(tensor.shape)) >= _LEAST_SIDE
