"""How a kept residual lies in memory and how it is saved: always in its parameter's own shape, so that a checkpoint of
DDP can be read under FSDP or HSDP, and the other way round."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from commcomp.module_tree import memory_order

if TYPE_CHECKING:
    from commcomp.sharded_model import ShardedModel, ShardedParameter


class SavedForm(ABC):
    """Converts residuals between the store's [W, ...] (see bucket_part.py) and what a state dict holds."""

    @abstractmethod
    def kept_shape(self, name: str) -> tuple[int, ...]:
        """The residual's shape in the store."""

    @abstractmethod
    def full_shape(self, name: str) -> tuple[int, ...]:
        """The parameter's own shape, in which the residual is saved."""

    @abstractmethod
    def to_saved(self, name: str, kept: Tensor) -> Tensor:
        """From the store to the state dict; a view where that is possible."""

    def to_whole(self, name: str, kept: Tensor) -> Tensor:
        """As `to_saved`, of the parameter's whole shape; a collective where ranks keep pieces."""
        return self.to_saved(name, kept)

    @abstractmethod
    def from_saved(self, name: str, saved: Tensor) -> Tensor:
        """Back, as `kept_shape`."""

    def template(self, name: str, dtype: torch.dtype) -> Tensor:
        """What to read a saved residual into."""
        return torch.empty(self.full_shape(name), dtype=dtype)

    def factor_name(self, name: str) -> str:
        """The name under which a parameter's warm start is saved."""
        return name


class WholeForm(SavedForm):
    """DDP and FSDP1: the whole residual, its dimensions in the order of memory."""

    def __init__(self, parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._parameters, self._shapes = parameters, shapes

    def kept_shape(self, name: str) -> tuple[int, ...]:
        return (1, *self._shapes[name])

    def full_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._parameters[name].shape)

    def to_saved(self, name: str, kept: Tensor) -> Tensor:
        parameter = self._parameters[name]
        order = memory_order(parameter)
        return kept.reshape(self._shapes[name]).permute([order.index(dim) for dim in range(parameter.dim())])

    def from_saved(self, name: str, saved: Tensor) -> Tensor:
        return saved.permute(memory_order(self._parameters[name])).reshape(self.kept_shape(name))


class RowsForm(SavedForm):
    """FSDP on a 1-D mesh: the whole residual as one piece a rank, the last ones filled up with rows of zeros."""

    def __init__(self, sharded: ShardedModel) -> None:
        self._parameters, self._num_rows = sharded.parameters, sharded.place.num_rows

    def kept_shape(self, name: str) -> tuple[int, ...]:
        return (self._num_rows, *self._parameters[name].chunk)

    def full_shape(self, name: str) -> tuple[int, ...]:
        return self._parameters[name].shape

    def to_saved(self, name: str, kept: Tensor) -> Tensor:
        parameter = self._parameters[name]
        rows = kept.reshape(self._num_rows * parameter.chunk[0], *parameter.chunk[1:])
        return rows[: parameter.shape[0]]

    def from_saved(self, name: str, saved: Tensor) -> Tensor:
        missing = self._num_rows * self._parameters[name].chunk[0] - len(saved)
        return _with_rows(saved, missing).reshape(self.kept_shape(name))


class PieceForm(SavedForm):
    """HSDP: each rank of the shard group keeps its own rows; saved as a DTensor sharded like the parameter."""

    def __init__(self, sharded: ShardedModel) -> None:
        self._parameters, self._group, self._device = sharded.parameters, sharded.shard_group, sharded.device
        self._size, self._rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        self._mesh = dist.device_mesh.DeviceMesh.from_group(self._group, self._device.type)

    def kept_shape(self, name: str) -> tuple[int, ...]:
        return (1, *self._parameters[name].chunk)

    def full_shape(self, name: str) -> tuple[int, ...]:
        return self._parameters[name].shape

    def to_saved(self, name: str, kept: Tensor) -> Tensor:
        parameter = self._parameters[name]
        local = kept.reshape(parameter.chunk)[: parameter.owned_rows(self._rank)]
        return self._distributed(local, parameter)

    def to_whole(self, name: str, kept: Tensor) -> Tensor:
        parameter = self._parameters[name]
        own = kept.reshape(parameter.chunk).contiguous()
        pieces = [torch.empty_like(own) for _ in range(self._size)]
        dist.all_gather(pieces, own, group=self._group)
        return torch.cat(pieces)[: parameter.shape[0]]

    def from_saved(self, name: str, saved: Tensor) -> Tensor:
        parameter = self._parameters[name]
        if hasattr(saved, "to_local"):
            own = saved.to_local()
            if len(own) != parameter.owned_rows(self._rank):
                raise ValueError(
                    f"the residual of {name!r} holds {len(own)} rows; rank {self._rank} of {self._size} shards owns "
                    f"{parameter.owned_rows(self._rank)}: use state.restore(checkpoint_id), or save "
                    "state_dict(mean_residual=True)"
                )
        else:
            start = self._rank * parameter.chunk[0]
            own = saved[start : start + parameter.chunk[0]]
        return _with_rows(own, parameter.chunk[0] - len(own)).reshape(self.kept_shape(name))

    def template(self, name: str, dtype: torch.dtype) -> Tensor:
        parameter = self._parameters[name]
        local = torch.empty(parameter.owned_rows(self._rank), *parameter.shape[1:], dtype=dtype, device=self._device)
        return self._distributed(local, parameter)

    def factor_name(self, name: str) -> str:
        return f"{name}/piece_{self._rank}_of_{self._size}"

    def _distributed(self, local: Tensor, parameter: ShardedParameter) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard

        strides = tuple(math.prod(parameter.shape[dim + 1 :]) for dim in range(len(parameter.shape)))
        return DTensor.from_local(
            local, self._mesh, [Shard(0)], run_check=False, shape=torch.Size(parameter.shape), stride=strides
        )


def _with_rows(values: Tensor, missing: int) -> Tensor:
    return pad(values, (0, 0) * (values.dim() - 1) + (0, missing)) if missing else values
