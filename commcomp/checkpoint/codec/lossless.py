"""The encoder of mode "lossless": fp32 and bf16 tensors by what is known of them from parent and optimizer, others in
planes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import isfinite

from commcomp.checkpoint.codec.families import Family, families_of, with_averages
from commcomp.checkpoint.codec.float_tensor import Candidate, Other, encode_tensor
from commcomp.checkpoint.codec.matrices import FORMATS
from commcomp.checkpoint.codec.native import FAST
from commcomp.checkpoint.codec.planes import LEAST_BYTES, encode_planes
from commcomp.checkpoint.codec.plans import (
    STEPS_REPLAYED,
    Plan,
    plan_average,
    plan_first,
    plan_largest,
    plan_second,
    plan_weight,
)
from commcomp.checkpoint.codec.sources import Sources
from commcomp.checkpoint.coded import CURRENT, PREVIOUS, CodedTensor, HostTensor, Reference, TreeInfo
from commcomp.checkpoint.exact_codec import ExactEncoder
from commcomp.checkpoint.parallel import ordered_map


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
        families = with_averages(families_of(modelled, tensors, tree_info, previous), modelled, tree_info)
        jobs = (job for family in families for job in work.jobs_of(family))
        yield from ordered_map(work.encode, jobs, self._threads, lambda job: len(tensors[job.name].data))
        for name, source in repeated.items():
            yield self._exact.coded(tensors[name], source)

    def alone(self, tensor: HostTensor, sources: Sources, without_parent: bool) -> CodedTensor:
        """One tensor of no family."""
        candidates, others = plan_weight(tensor.name, None, None, sources)
        return _encode(tensor, candidates, {} if without_parent else others, self._exact, self._coder)


@dataclass(frozen=True)
class _Job:
    """A tensor that is to be coded, and how to find out against what."""

    name: str
    plan: Callable[[], Plan]


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
        plans = [
            (family.second, plan_second),
            (family.first, plan_first),
            (family.largest, plan_largest),
            (family.weight, plan_weight),
        ]
        if passed == STEPS_REPLAYED:
            plans[:2] = reversed(plans[:2])
        plans += [(name, partial(plan_average, family.weight)) for name in family.averages]
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
    usable = [
        one
        for one in candidates
        if all(role in others for role in one.model.inputs) and all(map(isfinite, one.model.numbers.values()))
    ]
    return encode_tensor(tensor, usable, others, coder) or _plain(tensor, others.get("previous"), exact)


def _plain(tensor: HostTensor, parent: Other | None, exact: ExactEncoder) -> CodedTensor:
    """In planes of bytes, or as it is where these are no smaller."""
    previous = None if parent is None else (parent.source, parent.data)
    return encode_planes(tensor, previous, exact.threads) or exact.coded(tensor, None)
