"""By which models a tensor may be coded losslessly, by its role: the candidates, and the tensors that they need."""

from __future__ import annotations

import numpy as np

from commcomp.checkpoint.codec.adam import fit_adam_step
from commcomp.checkpoint.codec.average import fit_average
from commcomp.checkpoint.codec.float_tensor import Candidate, Other
from commcomp.checkpoint.codec.models import Model
from commcomp.checkpoint.codec.sources import Sources
from commcomp.checkpoint.coded import CURRENT, PREVIOUS
from commcomp.checkpoint.roles import Moments

COMPONENTS = 32
"""Of the factors, at the most."""
STEPS_REPLAYED = 1
"""Between snapshots so near each other the optimizer's step itself is the prediction."""

Plan = tuple[list[Candidate], dict[str, Other]]


def plan_second(name: str, moments: Moments | None, passed: float | None, sources: Sources) -> Plan:
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


def plan_first(name: str, moments: Moments | None, passed: float | None, sources: Sources) -> Plan:
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


def plan_largest(name: str, moments: Moments | None, passed: float | None, sources: Sources) -> Plan:
    """Amsgrad's largest second moment so far: what it was or the second moment, or a little more."""
    assert moments is not None
    others = sources.of(name, previous=(PREVIOUS, name), second=(CURRENT, moments.second))
    candidates = [
        Candidate(Model("first growth", "growth", "linear", 3), COMPONENTS // 2),
        Candidate(Model("second", "growth", "linear", 3), 0),
        Candidate(Model("largest", "growth", "linear", 3), 0),
    ]
    return candidates, others


def plan_weight(name: str, moments: Moments | None, passed: float | None, sources: Sources) -> Plan:
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


def plan_average(
    weight: str | None, name: str, moments: Moments | None, passed: float | None, sources: Sources
) -> Plan:
    """A moving average goes on towards the weight; without a parent it is near the weight."""
    candidates, others = plan_weight(name, None, None, sources)
    if "previous" not in others:
        alike = weight is not None and sources.tensor(weight).dtype == sources.tensor(name).dtype
        return candidates, sources.of(name, previous=(CURRENT, weight)) if alike else {}
    others |= sources.of(name, **{"weight": (CURRENT, weight), "previous weight": (PREVIOUS, weight)})
    own = sources.at(CURRENT, name)
    if own is None or len(others) < 3:
        return candidates, others
    rates = fit_average(
        [own.values(), *(others[role].values() for role in ("previous", "weight", "previous weight"))]
    )
    if rates is not None:
        numbers = _numbers(rate=rates[0], rate_before=rates[1])
        candidates += [
            Candidate(Model("average", "constant", "linear", 3, numbers), COMPONENTS),
            Candidate(Model("average", "constant", "relative", 0, numbers), 0),
        ]
    return candidates, others


def _numbers(**values: float) -> dict[str, float]:
    """As fp32 has them, so that what is coded with is what is decoded with; too large ones are Inf."""
    with np.errstate(over="ignore"):
        return {key: float(np.float32(value)) for key, value in values.items()}
