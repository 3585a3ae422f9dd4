"""Ways in which people write a step of an engine, and models that are not plain; each gives one loss a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.deepspeed import engines

STEPS = 3
Body = Callable[[Any, int], float]


class Model(engines.Model):
    """`middle` makes it special: called with the model, the hidden state and the number of the pass."""

    def __init__(self, middle: Callable[[Model, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.extra, self.other = nn.Linear(engines.WIDTH, engines.WIDTH), nn.Linear(engines.WIDTH, engines.WIDTH)
        self.middle, self.passes = middle, 0

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = self.middle(self, self.embedding(tokens), self.passes)
        self.passes += 1
        logits = self.head(self.norm(self.odd(nn.functional.gelu(self.first(hidden)))))
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def in_first_micro_batch(model: Model, hidden: Tensor, passes: int) -> Tensor:
    """Two parameters are used in every other pass."""
    return hidden + model.extra(hidden) if passes % 2 == 0 else hidden


def on_one_rank(model: Model, hidden: Tensor, passes: int) -> Tensor:
    """Two parameters are used by rank 0 only."""
    return hidden + model.extra(hidden) if dist.get_rank() == 0 else hidden


def reentrant(model: Model, hidden: Tensor, passes: int) -> Tensor:
    """Two layers are computed again in the backward pass, which runs there as a pass of its own."""
    for layer in (model.extra, model.other):
        hidden = checkpoint(layer, hidden, use_reentrant=True)
    return hidden


def special(middle: Callable[[Model, Tensor, int], Tensor]) -> Model:
    """The same on every rank."""
    torch.manual_seed(0)
    return Model(middle)


def tied() -> nn.Module:
    """One weight in two places."""
    model = engines.make_model()
    model.head.weight = model.embedding.weight
    return model


def partly_frozen() -> nn.Module:
    """A bias without a gradient."""
    model = engines.make_model()
    model.first.bias.requires_grad_(False)
    return model


def backward(engine: Any, step: int, micro: int = 0) -> float:
    """One pass."""
    loss = engine(*engines.batch(step, dist.get_rank(), micro))
    engine.backward(loss)
    return float(loss.detach())


def simple(engine: Any, step: int) -> float:
    """As in DeepSpeed's own examples; as many micro-batches as the engine is set to."""
    losses = []
    for micro in range(engine.gradient_accumulation_steps()):
        losses.append(backward(engine, step, micro))
        engine.step()
    return sum(losses)


def no_sync(engine: Any, step: int) -> float:
    with engine.no_sync():
        first = backward(engine, step)
    second = backward(engine, step, 1)
    engine.step()
    return first + second


def coalesced(engine: Any, step: int) -> float:
    with engine.coalesce_grad_reduction():
        losses = backward(engine, step) + backward(engine, step, 1)
    engine.step()
    return losses


def until_step(engine: Any, step: int) -> float:
    """managed_gradient_accumulation: false; not always as many."""
    losses = [backward(engine, step, micro) for micro in range(2 + step % 2)]
    engine.step()
    return sum(losses)


def two_backwards(engine: Any, step: int) -> float:
    losses = backward(engine, step) + backward(engine, step, 1)
    engine.step()
    return losses


def two_forwards(engine: Any, step: int) -> float:
    """One backward pass through two forward passes."""
    first, second = (engine(*engines.batch(step, dist.get_rank(), micro)) for micro in (0, 1))
    engine.backward(first + second)
    engine.step()
    return float((first + second).detach())


def as_in_torch(engine: Any, step: int) -> float:
    """loss.backward() in place of engine.backward(loss)."""
    loss = engine(*engines.batch(step, dist.get_rank()))
    loss.backward()
    engine.step()
    return float(loss.detach())


def boundaries(engine: Any, step: int) -> float:
    """As accelerate does."""
    total = 0.0
    for micro, is_last in enumerate((False, True)):
        engine.set_gradient_accumulation_boundary(is_last)
        total += backward(engine, step, micro)
    engine.step()
    return total


def run(engine: Any, body: Body) -> dict[str, Any]:
    """Losses, whether ranks agree, and, of a compressed engine, steps and ratio."""
    losses = [engines.mean(body(engine, step)) for step in range(STEPS)]
    made: dict[str, Any] = {"losses": losses, "same": engines.same_on_all_ranks(engine)}
    if hasattr(engine, "commcomp"):
        made.update(engine.commcomp.stats()["gradient"])
    return made


def copied(engine: Any, step: int) -> float:
    """A copy of the module is made between steps, as for an average of weights."""
    loss = simple(engine, step)
    twin = copy.deepcopy(engine.module)
    assert sum(value.numel() for value in twin.parameters()) == sum(
        value.numel() for value in engine.module.parameters()
    )
    return loss
