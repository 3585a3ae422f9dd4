"""The encoders of modes "cautious", "standard" and "compact": weights and moments on lattices, all else exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from commcomp.checkpoint.codec.families import Family, families_of
from commcomp.checkpoint.codec.float_tensor import Other
from commcomp.checkpoint.codec.kept_exactly import is_matrix, tell
from commcomp.checkpoint.codec.kept_rows import find_kept_rows
from commcomp.checkpoint.codec.lattice import encode_on_lattice
from commcomp.checkpoint.codec.lossless import LosslessEncoder
from commcomp.checkpoint.codec.matrices import widen
from commcomp.checkpoint.codec.models import Model
from commcomp.checkpoint.codec.native import FAST, Array
from commcomp.checkpoint.codec.sources import Sources
from commcomp.checkpoint.codec.steps import encode_in_steps
from commcomp.checkpoint.coded import CURRENT, PREVIOUS, CodedTensor, HostTensor, Input, Reference, TreeInfo
from commcomp.checkpoint.parallel import ordered_map


@dataclass(frozen=True)
class Quality:
    """Lattice steps: of a weight as a share of its change's standard deviation; of a first moment in units of the root
    of the second, or of SGD's momentum as a share of its standard deviation; of a second moment in octaves. Components:
    of the factors of weights and first moments, and of second moments."""

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

_SAMPLE = 1 << 17
_MOST_OF_WEIGHT = 0.05
"""Of a weight's root mean square: its step where no parent tells how far it moves."""
_FINER_LARGEST = 4
"""Of a second moment's step: amsgrad's largest one has this part."""
_MOST_CHANGE = 1 / 3
"""Of a weight's root mean square: what its change counts for at the most."""


class LossyEncoder:
    """A `ComparingEncoder` within declared bounds."""

    def __init__(self, quality: Quality, threads: int = 1, coder: str = FAST) -> None:
        self._quality, self._threads, self._coder = quality, threads, coder
        self._exact = LosslessEncoder(threads, coder)

    def __call__(
        self, tensors: Mapping[str, HostTensor], tree_info: TreeInfo, previous: Reference | None
    ) -> Iterator[CodedTensor]:
        return self._code(tensors, tree_info, previous, previous)

    def keyframe(
        self, tensors: Mapping[str, HostTensor], tree_info: TreeInfo, earlier: Reference
    ) -> Iterator[CodedTensor]:
        """Without parent: `earlier` tells by how much the weights change from snapshot to snapshot."""
        return self._code(tensors, tree_info, None, earlier)

    def _code(
        self,
        tensors: Mapping[str, HostTensor],
        tree_info: TreeInfo,
        previous: Reference | None,
        earlier: Reference | None,
    ) -> Iterator[CodedTensor]:
        found = families_of(list(tensors), tensors, tree_info, None)
        families = [
            family
            for family in found
            if _is_whole(family) and _are_matrices([tensors[name] for name in family.names])
        ]
        tell(found, families, tensors)
        lossy = {name for family in families for name in family.names}
        rest = {name: tensor for name, tensor in tensors.items() if name not in lossy}
        yield from self._exact(rest, tree_info, previous)

        def size_of(family: Family) -> int:
            return sum(len(tensors[name].data) for name in family.names)

        work = partial(self._encode, tensors=tensors, is_alone=previous is None, earlier=earlier)
        for coded in ordered_map(work, families, self._threads, size_of):
            yield from coded

    def _encode(
        self, family: Family, tensors: Mapping[str, HostTensor], is_alone: bool, earlier: Reference | None
    ) -> list[CodedTensor]:
        sources = Sources(tensors, earlier, family.names)
        one = _OfFamily(self._quality, self._coder, self._exact, family, sources, is_alone)
        return [_in_place_of(earlier, coded) for coded in one.encode()]


class _OfFamily:
    """Codes a weight and its moments. `is_alone`: the parent may be looked at, not coded against."""

    def __init__(
        self,
        quality: Quality,
        coder: str,
        exact: LosslessEncoder,
        family: Family,
        sources: Sources,
        is_alone: bool,
    ) -> None:
        self._quality, self._coder, self._exact = quality, coder, exact
        self._family, self._sources, self._is_alone = family, sources, is_alone
        positive = (family.second, family.largest)
        self._kept = None if is_alone else find_kept_rows(family.names, sources, positive)

    def encode(self) -> list[CodedTensor]:
        """All of them, each after those that it needs."""
        family = self._family
        coded = self._moments() if family.second is not None else [self._momentum()]
        return coded if family.weight is None else [*coded, self._weight(family.weight)]

    def _on_lattice(
        self, name: str, model: Model, kind: str, step: float, others: dict[str, Other], components: int
    ) -> CodedTensor:
        if self._kept is not None:
            others = others | self._sources.of(name, previous=(PREVIOUS, name))
        tensor = self._sources.tensor(name)
        return encode_on_lattice(tensor, model, kind, step, others, components, self._coder, self._kept)

    def _momentum(self) -> CodedTensor:
        """SGD's, around factors; exactly where it has no width."""
        name = self._family.first
        assert name is not None
        tensor = self._sources.tensor(name)
        with np.errstate(all="ignore"):
            step = self._quality.first * float(np.std(widen(tensor.data, 1, len(tensor.data) // 4), dtype=np.float64))
        if not _is_usable(step):
            return self._exact.alone(tensor, self._sources, self._is_alone)
        model = Model("none", "constant", "linear", 3)
        return self._on_lattice(name, model, "even", step, {}, self._quality.components)

    def _moments(self) -> list[CodedTensor]:
        """Adam's second moment, then the first in units of what is decoded of its root, then amsgrad's largest."""
        family, quality = self._family, self._quality
        assert family.first is not None and family.second is not None
        growth = Model("first growth", "growth", "linear", 3)
        second = self._on_lattice(family.second, growth, "octaves", quality.second, {}, quality.second_components)
        assert second.reconstruction is not None
        root = {"second": Other(Input(CURRENT, family.second), second.reconstruction)}
        scatter = Model("none", "root", "linear", 3)
        first = self._on_lattice(family.first, scatter, "scaled", quality.first, root, quality.components)
        return [second, first] if family.largest is None else [second, first, self._largest(family.largest, root)]

    def _largest(self, name: str, root: dict[str, Other]) -> CodedTensor:
        """The largest second moment so far, which most often is what it was in the parent. Finer than the second
        moment: that forgets its errors in time, this one does not."""
        others, model = root, Model("second", "growth", "linear", 3)
        previous = {} if self._is_alone else self._sources.of(name, previous=(PREVIOUS, name))
        if previous:
            others, model = previous, Model("previous", "constant", "linear", 3)
        return self._on_lattice(name, model, "octaves", self._quality.second / _FINER_LARGEST, others, 0)

    def _weight(self, name: str) -> CodedTensor:
        """Against the parent where that is of use, else in steps of what a delta's would be, else exactly."""
        tensor, others = self._sources.tensor(name), self._sources.of(name, previous=(PREVIOUS, name))
        if "previous" in others:
            # Of a change as large as the weight itself a share of it would be too much.
            width = min(_change(tensor, others["previous"].data), _MOST_CHANGE * _size(tensor))
        else:
            width = _last_step(self._family, self._sources)
        step = self._quality.weight * width
        if _is_usable(step):
            if not self._is_alone and "previous" in others:
                model = Model("previous", "constant", "linear", 3)
                return self._on_lattice(name, model, "even", step, others, self._quality.components)
            # Rates are no measure of a weight for optimizers that scale them themselves, as Prodigy does.
            coded = encode_in_steps(tensor, min(step, _MOST_OF_WEIGHT * _size(tensor)))
            if coded is not None:
                return coded
        return self._exact.alone(tensor, self._sources, self._is_alone)


def _change(tensor: HostTensor, previous: Array) -> float:
    """The standard deviation of a weight's change; not finite where values are not."""
    count = len(tensor.data) // 4
    with np.errstate(all="ignore"):
        change = widen(tensor.data, 1, count) - widen(previous, 1, count)
        return float(np.std(change, dtype=np.float64))


def _last_step(family: Family, sources: Sources) -> float:
    """The same of the optimizer's last step, as a sample of moments and the learning rate tell; 0 where they do not."""
    moments = family.moments
    if moments is None or moments.rate is None or family.first is None:
        return 0.0
    if family.second is None:
        with np.errstate(all="ignore"):
            return float(moments.rate * np.sqrt(np.mean(np.square(_sampled(sources.tensor(family.first))))))
    count = sources.count(moments, CURRENT) or np.inf
    divisor = family.second if family.largest is None else family.largest
    first, second = (_sampled(sources.tensor(name)) for name in (family.first, divisor))
    with np.errstate(all="ignore"):
        root = np.sqrt(second / (1 - moments.beta2**count)) + moments.epsilon
        change = moments.rate * first / (1 - moments.beta1**count) / root
        change = change[np.isfinite(change)]
        return float(np.sqrt(np.mean(np.square(change)))) if change.size else 0.0


def _sampled(tensor: HostTensor) -> Array:
    """Some of its values, fp64."""
    values = widen(tensor.data, 1, len(tensor.data) // 4).ravel()
    return values[:: max(1, len(values) // _SAMPLE)].astype(np.float64)


def _in_place_of(earlier: Reference | None, coded: CodedTensor) -> CodedTensor:
    """The reconstruction in the memory of the earlier snapshot's tensor, which nobody needs any more."""
    memory = None if earlier is None else earlier.release(coded.name)
    made = coded.reconstruction
    if memory is None or made is None or memory.shape != made.shape:
        return coded
    np.copyto(memory, made)
    return replace(coded, reconstruction=memory)


def _size(tensor: HostTensor) -> float:
    """The root mean square of a sample."""
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.mean(np.square(_sampled(tensor)))))


def _is_usable(step: float) -> bool:
    """As a step of fp32 numbers."""
    with np.errstate(all="ignore"):
        return bool(0 < np.float32(step) < np.inf)


def _is_whole(family: Family) -> bool:
    """Whether all is there that its weight's error is measured by, each tensor in one role."""
    if len(set(family.names)) < len(family.names):
        return False
    is_momentum = family.moments is not None and family.moments.is_momentum
    return family.first is not None and (family.second is not None or is_momentum)


def _are_matrices(tensors: Sequence[HostTensor]) -> bool:
    """All of one shape, as a weight and its moments are."""
    return all(is_matrix(tensor) and tensor.shape == tensors[0].shape for tensor in tensors)
