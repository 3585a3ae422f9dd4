"""A small model, whole or sharded by FSDP1 or fully_shard, whose gradients are collected as full tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import commcomp
import commcomp.fsdp
from commcomp import GradientSync
from commcomp.module_tree import plain_name

WIDTH, HIDDEN = 18, 33
"""Odd sizes: nothing divides evenly among 2 or 3 ranks."""

Gradients = dict[str, Tensor]


class Block(nn.Module):
    """Two matrices, their biases and a convolution-like weight of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, values: Tensor) -> Tensor:
        mixed = self.mix(values.unsqueeze(-1)).squeeze(-1)
        return values + self.narrow(torch.tanh(self.wide(mixed)))


class Net(nn.Module):
    """Three blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, values: Tensor) -> Tensor:
        for block in self.blocks:
            values = block(values)
        return self.head(values)


class SpoiledNet(Net):
    """One element of the head's gradients can be made Inf: `spoil` is (parameter, row), None leaves them alone."""

    spoil: tuple[str, int] | None = None

    def forward(self, values: Tensor) -> Tensor:
        out = super().forward(values)
        if self.spoil is None:
            return out
        name, row = self.spoil
        return _Spoil.apply(out, getattr(self.head, name), row)


class _Spoil(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, parameter: Tensor, row: int) -> Tensor:
        ctx.row, ctx.shape = row, parameter.shape
        return out.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        spoiled = torch.zeros(ctx.shape)
        spoiled[ctx.row].fill_(float("inf")) if spoiled.dim() == 1 else spoiled[ctx.row, :1].fill_(float("inf"))
        return gradient, spoiled, None


def mesh_of(parallel: str) -> DeviceMesh:
    """fsdp2: all ranks in a row; hsdp: two replicas of half of them."""
    size = dist.get_world_size()
    if parallel == "hsdp":
        return init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replica", "shard"))
    return init_device_mesh("cpu", (size,), mesh_dim_names=("shard",))


def shard(model: Any, parallel: str, **options: Any) -> Any:
    """fully_shard on every block (or on what the model's `parts` are) and the whole."""
    mesh = mesh_of(parallel)
    for part in getattr(model, "parts", model.blocks):
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def flatten(model: nn.Module, *inner: nn.Module, **options: Any) -> FullyShardedDataParallel:
    """FSDP1 on the modules `inner` and the whole; FULL_SHARD unless said otherwise."""
    options = {"device_id": torch.device("cpu"), **options}
    for name, module in list(model.named_modules()):
        if any(module is one for one in inner):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, FullyShardedDataParallel(module, **options))
    return FullyShardedDataParallel(model, **options)
def hook(model: nn.Module, method: Any, **settings: Any) -> GradientSync:
    """Register a hook on a sharded model."""
    state = GradientSync(model, method, **settings)
    commcomp.fsdp.register_comm_hook(model, state)
    return state


def wrap(
    parallel: str, method: Any = None, *, model: Any = None, fsdp: dict[str, Any] | None = None, **settings: Any
) -> tuple[nn.Module, GradientSync | None]:
    """A model under ddp, fsdp1, fsdp2 or hsdp, with a hook if there is a method."""
    net = model or Net()
    if parallel in ("ddp", "fsdp1"):
        wrapped = DistributedDataParallel(net) if parallel == "ddp" else flatten(net, *net.blocks, **(fsdp or {}))
        if method is None:
            return wrapped, None
        state = GradientSync(wrapped, method, **settings)
        wrapped.register_comm_hook(state, commcomp.comm_hook)
        return wrapped, state
    sharded = shard(net, parallel, **(fsdp or {}))
    return sharded, None if method is None else hook(sharded, method, **settings)


def said(action: Callable[[], Any], *errors: type[Exception]) -> str:
    """What is said to `action` by one of `errors` (by default ValueError), or "accepted"."""
    expected = errors or (ValueError,)
    try:
        action()
    except expected as error:
        return str(error)
    return "accepted"


def local(value: Any) -> Tensor:
    """This rank's piece of a DTensor; any other tensor itself."""
    return value.to_local() if isinstance(value, DTensor) else value


def inputs(rank: int, step: int) -> Tensor:
    """A rank's batch of one step."""
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1000 * step + rank))


def backward(model: nn.Module, rank: int, step: int, *, bad: float | None = None) -> None:
    """One backward pass; with `bad` the rank's gradients become such."""
    loss = model(inputs(rank, step)).float().square().sum()
    (loss if bad is None else loss * bad).backward()


def gradients(model: nn.Module) -> Gradients:
    """Every parameter's gradient as a full tensor, by plain name. A collective for a sharded model."""
    if isinstance(model, FullyShardedDataParallel):
        return _flat_gradients(model)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            value = parameter.grad
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[plain_name(name.removeprefix("module."))] = whole.detach().float().clone()
    return found


def _flat_gradients(model: FullyShardedDataParallel) -> Gradients:
    """From what an optimizer would see on the ranks: pieces of parameters, or of flat parameters."""
    found: Gradients = {}
    for path, module in model.named_modules():
        handle = getattr(module, "_handle", None)
        if handle is None:
            continue
        flat, by_name = handle.flat_param, {}
        if flat._params is None:
            whole = _joined(handle, flat.grad)
            parts = [] if whole is None else whole[: sum(flat._numels_with_padding)].split(flat._numels_with_padding)
            by_name = dict(zip(flat._fqns, parts))
        else:
            by_name = {name: _joined(handle, value.grad) for name, value in zip(flat._fqns, flat._params)}
        for (name, value), shape in zip(by_name.items(), flat._shapes):
            if value is not None and value.numel():
                plain = f"{path}.{name}".replace("_fsdp_wrapped_module.", "").replace("_fsdp_wrapped_module", "")
                found[plain.replace("..", ".").strip(".")] = value.view(shape)
    return found


def _joined(handle: Any, gradient: Tensor | None) -> Tensor | None:
    """All ranks' pieces of a gradient in their order, None if no rank has one."""
    if not handle.uses_sharded_strategy:
        return None if gradient is None else gradient.detach().float().flatten().clone()
    pieces: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, None if gradient is None else gradient.detach().float().flatten().clone())
    present = [piece for piece in pieces if piece is not None]
    return torch.cat(present) if present else None


def train(model: nn.Module, rank: int, *steps: int) -> list[Gradients]:
    """The gradients of some steps at constant weights."""
    seen = []
    for step in steps:
        model.zero_grad()
        backward(model, rank, step)
        seen.append(gradients(model))
    return seen


def run(parallel: str, rank: int, method: Any = None, *, steps: int = 3, **settings: Any) -> list[Gradients]:
    """The averaged gradients of some steps at constant weights."""
    model, _ = wrap(parallel, method, **settings)
    return train(model, rank, *range(steps))


def true_mean(num_ranks: int, step: int) -> Gradients:
    """The mean over ranks of the gradients, computed without any communication."""
    total: Gradients = {}
    for rank in range(num_ranks):
        model = Net()
        backward(model, rank, step)
        for name, value in gradients(model).items():
            total[name] = total.get(name, 0) + value / num_ranks
    return total


def difference(left: Gradients, right: Gradients) -> float:
    """The largest |left - right| / |right| over parameters."""
    assert left.keys() == right.keys()
    return max(float((left[name] - value).norm() / value.norm().clamp_min(1e-12)) for name, value in right.items())


def conservation_error(seen: list[Gradients], state: GradientSync, true: list[Gradients]) -> float:
    """The largest |decoded + mean residual - gradients| over |gradients|, all summed over the steps. A collective."""
    worst, saved = 0.0, state.state_dict()
    for name in seen[0]:
        decoded, total = (sum(step.get(name, torch.zeros(())) for step in steps) for steps in (seen, true))
        key = f"rank_{state.rank}/residual/{name}"
        owed = torch.zeros(())
        if key in saved:  # else it travels whole
            own = saved[key]
            whole = own.full_tensor() if isinstance(own, DTensor) else own.clone()
            owed = whole.float() / state.num_ranks
            dist.all_reduce(owed, group=state.sharded.process_group if state.sharded else None)
        worst = max(worst, float((decoded + owed - total).norm() / total.norm()))
    return worst
