"""What the tests of DDP training share: small models, batches by rank and step, and a ledger of what is owed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commcomp
from commcomp import GradientSync, LowRank
from commcomp.config import Method

ONE, MANY = 25, 0.0005
"""bucket_cap_mb for a single bucket, and for about one bucket a parameter."""

WIDTH, CLASSES = 16, 6


class Net(nn.Module):
    """Several matrices of one shape (so that mixing them up goes unnoticed by shapes alone), vectors between them."""

    def __init__(self, seed: int = 0, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(self.norm(x))


class Branches(nn.Module):
    """Two branches of equal shape; which of them run is chosen for each call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, used: tuple[str, ...] = ("first", "second")) -> Tensor:
        for name in used:
            x = x + torch.tanh(getattr(self, name)(x))
        return self.head(x)


def inputs(rank: int, step: int, shape: tuple[int, ...] = (8, WIDTH)) -> Tensor:
    """A batch that differs for every rank and step."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + rank))


def loss_of(output: Tensor) -> Tensor:
    return (output.float() ** 2).mean() + output.float().sin().sum() * 0.1


def wrap(
    module: nn.Module,
    method: Method | None = None,
    *,
    bucket_cap_mb: float = ONE,
    ddp: dict[str, Any] | None = None,
    hook: Callable[..., Any] = commcomp.comm_hook,
    **options: Any,
) -> tuple[DistributedDataParallel, GradientSync]:
    """DDP around `module` with a registered GradientSync (rank 2 unless `method` or a policy is given)."""
    model = DistributedDataParallel(module, bucket_cap_mb=bucket_cap_mb, **(ddp or {}))
    if method is None and "policy" not in options:
        method = LowRank(rank=2)
    state = GradientSync(model, method, **options)
    model.register_comm_hook(state, hook)
    return model, state


def backward(model: nn.Module, x: Tensor, *arguments: Any, context: Any = None, factor: float = 1.0) -> None:
    with context or nullcontext():
        (loss_of(model(x, *arguments)) * factor).backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients by plain name; parameters without one are left out."""
    while True:  # below torch.compile's wrapper and DDP's
        inner = getattr(model, "_orig_mod", model)
        inner = inner.module if isinstance(inner, DistributedDataParallel) else inner
        if inner is model:
            break
        model = inner
    return {
        name.replace("_orig_mod.", ""): parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def residuals(state: GradientSync) -> dict[str, Tensor]:
    """Copies of this rank's residuals by parameter name."""
    start = f"rank_{state.rank}/residual/"
    return {
        key[len(start) :]: value.float().clone() for key, value in state.state_dict().items() if key.startswith(start)
    }


def warm_starts(state: GradientSync) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.state_dict().items() if key.startswith("warm_")}


def train(model: nn.Module, rank: int, steps: int, first: int = 0, lr: float = 0.05) -> list[dict[str, Tensor]]:
    """SGD steps; returns the gradients of every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    history = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, inputs(rank, step))
        history.append(gradients(model))
        optimizer.step()
    return history


class Ledger:
    """Sums of this rank's true gradients and of what reached .grad, in fp64; weights must not change meanwhile."""

    def __init__(self, module: nn.Module) -> None:
        self.reference = copy.deepcopy(module)
        self.true: dict[str, Tensor] = {}
        self.received: dict[str, Tensor] = {}

    def expect(self, x: Tensor, *arguments: Any, factor: float = 1.0) -> dict[str, Tensor]:
        """Book the true gradients of one backward pass of this rank; returns them."""
        self.reference.zero_grad()
        backward(self.reference, x, *arguments, factor=factor)
        own = gradients(self.reference)
        _add(self.true, own)
        return own

    def receive(self, model: nn.Module) -> None:
        """Book what the optimizer would see, then clear it."""
        _add(self.received, gradients(model))
        model.zero_grad(set_to_none=True)

    def account(self, state: GradientSync) -> dict[str, dict[str, Tensor]]:
        return {"true": self.true, "received": self.received, "residual": residuals(state)}


def _add(total: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        total[name] = total.get(name, 0.0) + value.double()


def assert_conserved(accounts: list[dict[str, dict[str, Tensor]]], tolerance: float = 2e-5) -> None:
    """Mean over ranks of true gradients = what every rank received + mean of the residuals, for every parameter."""
    names = set().union(*(account["true"] for account in accounts))
    assert names
    for name in sorted(names):
        true = mean_of([account["true"].get(name) for account in accounts])
        residual = mean_of([account["residual"].get(name) for account in accounts])
        received = [account["received"].get(name) for account in accounts]
        assert all(_equal(value, received[0]) for value in received), f"ranks received different {name}"
        total = (0.0 if received[0] is None else received[0]) + residual.reshape(true.shape if residual.ndim else ())
        error = (total - true).abs().max() / true.abs().max().clamp_min(1e-3)
        assert error < tolerance, f"{name}: delivered + owed is off by {error:.2e} of the true gradient"


def mean_of(values: list[Tensor | None]) -> Tensor:
    return sum((value.double() for value in values if value is not None), torch.zeros((), dtype=torch.float64)) / len(
        values
    )


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    return left is right if left is None or right is None else torch.equal(left, right)


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Equal names, and values equal to `tolerance` of each tensor's largest entry."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        scale = right[name].float().abs().max().clamp_min(1e-6)
        error = (value.float() - right[name].float()).abs().max() / scale
        assert error < tolerance, f"{name} differs by {error:.2e} of its largest value"
