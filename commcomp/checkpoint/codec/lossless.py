"""The encoder of mode "lossless": fp32 and bf16 tensors by what is known of them from parent and optimizer, others in
planes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from commcomp.checkpoint.codec.adam import fit_adam_step
from commcomp.checkpoint.codec.float_tensor import Candidate, Other, encode_tensor
from commcomp.checkpoint.codec.matrices import FORMATS
from commcomp.checkpoint.codec.models import Model
from commcomp.checkpoint.codec.native import FAST
from commcomp.checkpoint.codec.planes import LEAST_BYTES, encode_planes
from commcomp.checkpoint.coded import (
    CURRENT,
    PREVIOUS,
    CodedTensor,
    HostTensor,
    Input,
    Reference,
    TreeInfo,
)
from commcomp.checkpoint.exact_codec import ExactEncoder
from commcomp.checkpoint.parallel import ordered_map
from commcomp.checkpoint.roles import Moments, find_moments, steps_of

COMPONENTS = 32
"""Of the factors, at the most."""
STEPS_REPLAYED = 1
"""Between snapshots so near each other the optimizer's step itself is the prediction."""


@dataclass(frozen=True)
class Family:
    """Tensors that are coded together: a weight and its moments, or one alone."""

    weight: str | None
    first: str | None = None
    second: str | None = None
    largest: str | None = None
    moments: Moments | None = None

    @property
    def names(self) -> list[str]:
        return [name for name in (self.weight, self.first, self.second, self.largest) if name is not None]


class LosslessEncoder:
    """A `SnapshotEncoder` that keeps every bit, NaN payloads and signs of zeros included."""

    def __init__(self, threads: int = 1, coder: str = FAST) -> None:
        self._threads, self._coder = threads, coder
        self._exact = ExactEncoder(threads)

    def __call__(
        self, tensors: Mapping[str, HostTensor], tree_info: TreeInfo, previous: Reference | None
    ) -> Iterator[CodedTensor]:
        sources = self._exact.sources(tensors, previous)
        modelled = [
            name
            for name, tensor in tensors.items()
            if tensor.dtype in FORMATS and len(tensor.data) and sources[name] is None
        ]
        chosen = set(modelled)
        rest = {name: sources[name] for name in tensors if name not in chosen}
        repeated = {name: source for name, source in rest.items() if source is not None and source.snapshot == CURRENT}
        first = {name: source for name, source in rest.items() if name not in repeated}
        parents = Sources(tensors, previous, ())
        for name, source in first.items():  # before others, which may be coded against them
            tensor = tensors[name]
            if source is None and len(tensor.data) >= LEAST_BYTES:
                yield _plain(tensor, parents.at(PREVIOUS, name), self._exact)
            else:
                yield self._exact.coded(tensor, source)
        work = _Coder(tensors, previous, self._exact, self._coder, first.keys())
        jobs = (job for family in families_of(modelled, tensors, tree_info, previous) for job in work.jobs_of(family))
        yield from ordered_map(work.encode, jobs, self._threads, lambda job: len(tensors[job.name].data))
        for name, source in repeated.items():
            yield self._exact.coded(tensors[name], source)

    def alone(self, tensor: HostTensor, sources: Sources, without_parent: bool) -> CodedTensor:
        """One tensor of no family."""
        candidates, others = _weight(tensor.name, None, None, sources)
        return _encode(tensor, candidates, {} if without_parent else others, self._exact, self._coder)


def families_of(
    names: list[str], tensors: Mapping[str, HostTensor], info: TreeInfo, previous: Reference | None
) -> list[Family]:
    """The named tensors, each in one family."""
    left = dict.fromkeys(names)
    families = []

    def take(name: str | None) -> str | None:
        return None if name is None or left.pop(name, 0) == 0 else name

    for moments in find_moments(tensors, info, None if previous is None else previous.tree_info):
        weight, largest = take(moments.weight), take(moments.largest)
        family = Family(weight, take(moments.first), take(moments.second), largest, moments)
        if family.names:
            families.append(family)
    return families + [Family(name) for name in left]


@dataclass(frozen=True)
class _Job:
    """A tensor that is to be coded, and how to find out against what."""

    name: str
    plan: Callable[[], _Plan]


class _Coder:
    """Codes the families of one snapshot, on several threads. `coded`: names that are coded before all of them."""

    def __init__(
        self,
        tensors: Mapping[str, HostTensor],
        previous: Reference | None,
        exact: ExactEncoder,
        coder: str,
        coded: Collection[str],
    ) -> None:
        self._tensors, self._previous, self._exact, self._coded = tensors, previous, exact, coded
        self._coder = coder

    def jobs_of(self, family: Family) -> list[_Job]:
        """The family's tensors in an order in which each needs earlier ones only."""
        sources = Sources(self._tensors, self._previous, {*self._coded, *family.names})
        passed = sources.steps_passed(family.moments)
        plans = [(family.second, _second), (family.first, _first), (family.largest, _largest), (family.weight, _weight)]
        if passed == STEPS_REPLAYED:
            plans[:2] = reversed(plans[:2])
        return [
            _Job(name, partial(plan, name, family.moments, passed, sources))
            for name, plan in plans
            if name is not None
        ]

    def encode(self, job: _Job) -> CodedTensor:
        """One tensor."""
        return _encode(self._tensors[job.name], *job.plan(), self._exact, self._coder)


def _encode(
    tensor: HostTensor, candidates: list[Candidate], others: dict[str, Other], exact: ExactEncoder, coder: str
) -> CodedTensor:
    usable = [one for one in candidates if all(role in others for role in one.model.inputs)]
    return encode_tensor(tensor, usable, others, coder) or _plain(tensor, others.get("previous"), exact)


def _plain(tensor: HostTensor, parent: Other | None, exact: ExactEncoder) -> CodedTensor:
    """In planes of bytes, or as it is where these are no smaller."""
    previous = None if parent is None else (parent.source, parent.data)
    return encode_planes(tensor, previous, exact.threads) or exact.coded(tensor, None)


class Sources:
    """Other tensors that one may be coded against. `current`: those of this snapshot."""

    def __init__(
        self, tensors: Mapping[str, HostTensor], previous: Reference | None, current: Collection[str]
    ) -> None:
        self._tensors, self._previous, self._current = tensors, previous, current

    def tensor(self, name: str) -> HostTensor:
        """Of this snapshot, whether it may be coded against or not."""
        return self._tensors[name]

    def of(self, like: str, **places: tuple[str, str | None]) -> dict[str, Other]:
        """By role, the floats at each place (snapshot, name); left out is what is not there, or shaped otherwise."""
        found: dict[str, Other] = {}
        for role, (where, name) in places.items():
            other = self.at(where, name)
            tensor = None if name is None else self._tensors.get(name)
            alike = tensor is not None and tensor.dtype in FORMATS and tensor.shape == self._tensors[like].shape
            if other is not None and alike:
                found[role] = other
        return found

    def at(self, where: str, name: str | None) -> Other | None:
        """One tensor's bytes; of the parent's only of dtype and shape that it has now."""
        tensor = None if name is None else self._tensors.get(name)
        if tensor is None or name is None:
            return None
        wide = tensor.dtype == "float32"
        if where == CURRENT:
            return Other(Input(CURRENT, name), tensor.data, wide) if name in self._current else None
        header = None if self._previous is None else self._previous.header(name)
        if header is None or self._previous is None or (header.dtype, header.shape) != (tensor.dtype, tensor.shape):
            return None
        return Other(Input(PREVIOUS, name), self._previous.read(name), wide)

    def count(self, moments: Moments, where: str) -> float | None:
        """How many steps a parameter has taken."""
        step = moments.step if where == CURRENT else moments.step_before
        if not isinstance(step, str):
            return step
        if where == CURRENT:
            return steps_of(self._tensors[step].data, self._tensors[step].dtype)
        header = None if self._previous is None else self._previous.header(step)
        if header is None or self._previous is None or header.num_values != 1:
            return None
        return steps_of(self._previous.read(step), header.dtype)

    def steps_passed(self, moments: Moments | None) -> float | None:
        """Steps between the snapshots; None where that is not known or not forward."""
        now, before = (None if moments is None else self.count(moments, where) for where in (CURRENT, PREVIOUS))
        return now - before if now is not None and before is not None and now > before else None


_Plan = tuple[list[Candidate], dict[str, Other]]


def _second(name: str, moments: Moments | None, passed: float | None, sources: Sources) -> _Plan:
    """A second moment grows by squares of gradients, which rows and columns tell most of."""
    assert moments is not None
    others = sources.of(name, previous=(PREVIOUS, name))
    candidates = [Candidate(Model("first growth", "growth", "linear", 3), COMPONENTS // 2)]
    if passed is not None:
        decay = _numbers(decay=moments.beta2**passed)
        candidates.append(Candidate(Model("growth", "growth", "linear", 3, decay), COMPONENTS // 2))
    if passed == STEPS_REPLAYED:
        others |= sources.of(name, **{"first": (CURRENT, moments.first), "previous first": (PREVIOUS, moments.first)})
        numbers = _numbers(decay=moments.beta2, rest=1 - moments.beta1, rest2=1 - moments.beta2)
        candidates.append(Candidate(Model("squared", "constant", "relative", 0, numbers), 0))
    return candidates, others


def _first(name: str, moments: Moments | None, passed: float | None, sources: Sources) -> _Plan:
    """A first moment is of low rank, and scatters as the root of the second."""
    assert moments is not None
    others = sources.of(name, **{"previous": (PREVIOUS, name), "previous second": (PREVIOUS, moments.second)})
    candidates = [Candidate(Model("none", "constant", "linear", 3), COMPONENTS)]
    if passed == STEPS_REPLAYED:
        decay = _numbers(decay=moments.beta1)
        candidates.append(Candidate(Model("decayed", "previous_root", "linear", 3, decay), COMPONENTS))
        return candidates, others
    others |= sources.of(name, second=(CURRENT, moments.second))
    candidates.append(Candidate(Model("none", "root", "linear", 3), COMPONENTS))
    if passed is not None:
        decay = _numbers(decay2=moments.beta2**passed)
        candidates.append(Candidate(Model("none", "growth_root", "linear", 3, decay), COMPONENTS))
    return candidates, others


def _largest(name: str, moments: Moments | None, passed: float | None, sources: Sources) -> _Plan:
    """Amsgrad's largest second moment so far: what it was or the second moment, or a little more."""
    assert moments is not None
    others = sources.of(name, previous=(PREVIOUS, name), second=(CURRENT, moments.second))
    candidates = [
        Candidate(Model("first growth", "growth", "linear", 3), COMPONENTS // 2),
        Candidate(Model("second", "growth", "linear", 3), 0),
        Candidate(Model("largest", "growth", "linear", 3), 0),
    ]
    return candidates, others


def _weight(name: str, moments: Moments | None, passed: float | None, sources: Sources) -> _Plan:
    """A weight, or any other float: it moves little, and by a change of low rank; one step of Adam is known."""
    others = sources.of(name, previous=(PREVIOUS, name))
    candidates = [
        Candidate(Model("none", "constant", "linear", 3), COMPONENTS),
        Candidate(Model("previous", "constant", "linear", 3), COMPONENTS),
    ]
    if passed != STEPS_REPLAYED or moments is None:
        return candidates, others
    divisor = moments.second if moments.largest is None else moments.largest  # whose root the step is divided by
    others |= sources.of(name, first=(CURRENT, moments.first), second=(CURRENT, divisor))
    own, count = sources.at(CURRENT, name), sources.count(moments, CURRENT)
    if own is None or count is None or len(others) < 3:
        return candidates, others
    arrays = [own.values(), *(others[role].values() for role in ("previous", "first", "second"))]
    step = fit_adam_step(arrays, count, moments.beta2, moments.epsilon)
    if step is not None:
        cut, resolution = ("relative", 0) if own.is_wide else ("linear", 3)
        candidates.append(Candidate(Model("adam", "constant", cut, resolution, _numbers(**vars(step))), COMPONENTS))
    return candidates, others


def _numbers(**values: float) -> dict[str, float]:
    """As fp32 has them, so that what is coded with is what is decoded with."""
    return {key: float(np.float32(value)) for key, value in values.items()}
