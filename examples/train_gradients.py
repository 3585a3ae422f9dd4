"""How examples/train_gpt.py spreads the model over the ranks, and what its gradients go through."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks, powerSGD_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import commcomp
import commcomp.fsdp

BASELINES = ("none", "torch_fp16", "torch_powersgd", "no_communication")
PARALLEL = ("ddp", "fsdp2", "hsdp")
REPLICAS = 2
"""Of the model under hsdp; each is sharded over half of the ranks."""


def compress_gathers(
    model: nn.Module, parallel: str, bits: int, difference: bool
) -> commcomp.fsdp.GatherCompression | None:
    """Gather a sharded model's parameters, or what they have moved, in 8 or 4 bits; 0: as they are, returns None."""
    if bits and parallel == "ddp":
        raise ValueError(f"gather_bits is {bits}, but parallel=ddp gathers no parameters; expected 0")
    if not bits:
        return None
    return commcomp.fsdp.compress_all_gathers(model, commcomp.Quantized(bits=bits), difference=difference)


def spread(model: nn.Module, parallel: str, *, bucket_cap_mb: float, device: torch.device) -> nn.Module:
    """Wrap the model in DistributedDataParallel, or apply fully_shard to its blocks and to the whole."""
    if parallel == "ddp":
        return DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb)
    return shard(model, mesh_of(parallel, device))


def mesh_of(parallel: str, device: torch.device) -> DeviceMesh:
    """All ranks in a row for fsdp2; for hsdp `REPLICAS` rows, each a replica."""
    world = dist.get_world_size()
    if parallel == "fsdp2":
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    if world % REPLICAS:
        raise ValueError(f"parallel=hsdp makes {REPLICAS} replicas; {world} ranks cannot be divided among them")
    return init_device_mesh(device.type, (REPLICAS, world // REPLICAS), mesh_dim_names=("replica", "shard"))


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Apply fully_shard to the model's blocks and to the whole."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def synchronise_gradients(
    model: nn.Module, parallel: str, gradient: Mapping[str, Any]
) -> commcomp.GradientSync | None:
    """Register what the `gradient` settings ask for; returns None for the baselines."""
    method = gradient.get("method")
    if method not in BASELINES:
        state = commcomp.GradientSync.from_config(model, commcomp.config.GradientConfig.from_dict(gradient))
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(state, commcomp.comm_hook)
        else:
            commcomp.fsdp.register_comm_hook(model, state)
        return state
    if method == "none":
        return None
    if not isinstance(model, DistributedDataParallel):
        raise ValueError(f"gradient={method} is for DistributedDataParallel alone; use parallel=ddp, not {parallel}")
    if method == "torch_fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif method == "torch_powersgd":
        model.register_comm_hook(_torch_powersgd(gradient), powerSGD_hook.powerSGD_hook)
    elif method == "no_communication":
        model.register_comm_hook(None, debugging_hooks.noop_hook)
    return None


def _torch_powersgd(gradient: Mapping[str, Any]) -> powerSGD_hook.PowerSGDState:
    return powerSGD_hook.PowerSGDState(
        process_group=None,
        matrix_approximation_rank=gradient["rank"],
        start_powerSGD_iter=gradient["start_step"],
        use_error_feedback=gradient["use_error_feedback"],
        warm_start=gradient["warm_start"],
        orthogonalization_epsilon=gradient["orthogonalization_epsilon"],
    )


class Traffic:
    """Bytes that this rank has sent for gradients since the object was made.

    Read from `GradientSync.stats()`; for the baselines computed. In a ring all-reduce each of W ranks sends
    2 (W - 1) / W of its input, in a reduce-scatter half of that. With replicas what goes on between them counts.
    """

    def __init__(
        self,
        model: nn.Module,
        parallel: str,
        gradient: Mapping[str, Any],
        state: commcomp.GradientSync | None,
        gathers: commcomp.fsdp.GatherCompression | None,
    ) -> None:
        self._state = state
        self._gathers = gathers
        self._gradient = gradient
        self._shapes = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
        world = dist.get_world_size()
        self._ring = {
            "ddp": 2 * (world - 1) / world,
            "fsdp2": (world - 1) / world,
            "hsdp": 2 * (REPLICAS - 1) / REPLICAS / max(1, world // REPLICAS),
        }[parallel]
        self._steps = 0
        self._wire = self._dense = 0.0
        self._at_start = self._read()

    def step(self) -> None:
        """Count one optimizer step."""
        dense = 4 * self._ring * sum(map(math.prod, self._shapes))
        self._dense += dense
        self._wire += dense * self._baseline_share()
        self._steps += 1

    def totals(self) -> tuple[float, float]:
        """Return (bytes sent, bytes a plain fp32 all-reduce would have sent)."""
        wire, dense = self._read()
        return wire - self._at_start[0], dense - self._at_start[1]

    def of_gathers(self) -> dict[str, float] | None:
        """Bytes a step that compressed parameter gathers sent, held-out passes included; None without them."""
        if self._gathers is None or not self._steps:
            return None
        return {
            "sent": self._gathers.wire_bytes / self._steps,
            "plain": self._gathers.plain_wire_bytes / self._steps,
        }

    def _read(self) -> tuple[float, float]:
        if self._state is None:
            return self._wire, self._dense
        stats = self._state.stats()
        return stats["wire_bytes"], stats["dense_wire_bytes"]

    def _baseline_share(self) -> float:
        method = self._gradient.get("method")
        if method == "torch_powersgd" and self._steps >= self._gradient["start_step"]:
            rank, whole = self._gradient["rank"], sum(map(math.prod, self._shapes))
            return sum(_powersgd_numel(shape, rank) for shape in self._shapes) / whole
        return {"torch_fp16": 0.5, "no_communication": 0.0}.get(str(method), 1.0)


def _powersgd_numel(shape: tuple[int, ...], rank: int) -> int:
    """Values torch's hook sends for a tensor; it compresses where that makes it over 2 times smaller."""
    numel = math.prod(shape)
    if len(shape) < 2:
        return numel
    rows, columns = shape[0], numel // shape[0]
    factors = (rows + columns) * min(rows, columns, rank)
    return factors if 2 * rank * (rows + columns) < numel else numel
