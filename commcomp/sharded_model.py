"""What fully_shard (FSDP2) made of a model: its parameter groups, who owns which piece, over which ranks to compress.

On a 1-D mesh the ranks of the shard group average a whole group's gradients and each keeps its piece: a bucket with one
row a rank. On a 2-D mesh (HSDP) torch averages within the shard group, in full precision, and the pieces are averaged
over the replicas by us: a bucket of one row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from commcomp.bucket_part import OneWay, Place
from commcomp.config import Method
from commcomp.layout import Entry
from commcomp.module_tree import SUPPORTED_DTYPES, plain_name, trainable_parameters
from commcomp.saved_form import PieceForm, RowsForm, SavedForm

_TAKEN = "_commcomp_hook"
"""Set on a parameter group of torch's once a hook serves it."""


@dataclass(frozen=True)
class ShardedParameter:
    """A trainable parameter of one group; `fsdp_param` is torch's FSDPParam."""

    name: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    """The piece that one rank owns, the last ranks' filled up with rows of zeros."""
    fsdp_param: Any
    gradient_dtype: torch.dtype
    """In which torch reduces it."""

    @property
    def chunk_numel(self) -> int:
        """Values that one rank owns."""
        return math.prod(self.chunk)

    def owned_rows(self, rank: int) -> int:
        """Rows of the piece of this rank of the shard group that are not filled up."""
        return max(0, min(self.chunk[0], self.shape[0] - rank * self.chunk[0]))


@dataclass(frozen=True)
class ShardedGroup(OneWay):
    """The parameters of one fully_shard call, reduced in one go; `param_group` is torch's FSDPParamGroup."""

    path: str
    module: Any
    param_group: Any
    parameters: tuple[ShardedParameter, ...]
    place: Place

    @property
    def chunk_numel(self) -> int:
        """Values that one rank owns."""
        return sum(parameter.chunk_numel for parameter in self.parameters)

    @property
    def scattered(self) -> bool:
        """Whether torch would reduce-scatter over the compressed ranks; over replicas it would all-reduce."""
        return self.place.by_owner

    def entries(self) -> list[Entry]:
        """Where the pieces lie in a row of the bucket, in torch's order."""
        entries, offset = [], 0
        for parameter in self.parameters:
            # A replica's piece is a matrix by itself.
            total_rows = (*parameter.shape, 1)[0] if self.place.by_owner else None
            entries.append(Entry(parameter.name, offset, parameter.chunk, total_rows, self._padding(parameter)))
            offset += parameter.chunk_numel
        return entries


    def _padding(self, parameter: ShardedParameter) -> tuple[int, ...]:
        """Values that fill up the piece of every rank that has a row in the bucket."""
        shard_group = self.param_group.mesh_info.shard_process_group
        owners = range(self.place.num_rows) if self.place.by_owner else [dist.get_rank(shard_group)]
        row_numel = math.prod(parameter.chunk[1:])
        missing = [(parameter.chunk[0] - parameter.owned_rows(rank)) * row_numel for rank in owners]
        return tuple(missing) if any(missing) else ()


class ShardedModel:
    """The groups of a model and what they have in common."""

    def __init__(self, groups: list[ShardedGroup], frozen: list[ShardedGroup]) -> None:
        self.groups = groups
        self.frozen = frozen
        """Groups without any parameter to train: torch does not reduce them."""
        self.parameters = {parameter.name: parameter for group in groups for parameter in group.parameters}
        """By name."""
        mesh_info = groups[0].param_group.mesh_info
        self.has_replicas = _has_replicas(mesh_info)
        shard_group = mesh_info.shard_process_group
        self.process_group: dist.ProcessGroup = (
            mesh_info.replicate_process_group if self.has_replicas else shard_group
        )
        """The ranks over which gradients are averaged in compressed form."""
        self.shard_group: dist.ProcessGroup = shard_group
        self.other_shards: dist.ProcessGroup | None = shard_group if self.has_replicas else None
        """The ranks of this replica, where these are not the ones that average: each receives other means."""
        self.device: torch.device = groups[0].param_group.device
        self.place = groups[0].place
        for group in groups:
            own = group.param_group.mesh_info
            if _has_replicas(own) != self.has_replicas or own.shard_process_group != shard_group:
                raise ValueError(
                    f"{group.path!r} is sharded over other ranks than {groups[0].path!r}; use one mesh for all of the "
                    "model"
                )

    def gradient_dtype(self, name: str) -> torch.dtype:
        """In which torch reduces a parameter."""
        return self.parameters[name].gradient_dtype

    def scatters(self, name: str) -> bool:
        """Whether torch would reduce-scatter it over the compressed ranks."""
        return self.place.by_owner

    def num_owners(self, name: str) -> int:
        """The ranks of the shard group, unless the pieces are averaged over replicas."""
        return self.place.num_rows

    def cut_inside_rows(self, name: str) -> bool:
        """fully_shard deals out whole rows."""
        return False

    def to_owners(self, name: str, effective: Mapping[str, Method]) -> bool:
        """Whether its values go to the ranks that own them alone, as far as they travel one by one."""
        return self.place.by_owner

    def trainable(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's own, also those that are in no group."""
        return trainable_parameters(model)

    def optimized(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """The parameters themselves."""
        return list(parameters.values())

    def saved_form(self, parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> SavedForm:
        """By piece with replicas, else whole, as one row for every owner."""
        return PieceForm(self) if self.has_replicas else RowsForm(self)

    def seen_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the matrix that a method sees: the whole parameter, or with replicas the piece of one rank."""
        parameter = self.parameters[name]
        return parameter.chunk if self.has_replicas else parameter.shape


def find_sharded_model(model: nn.Module) -> ShardedModel | None:
    """The FSDP2 structure of `model`, None if fully_shard was not applied to it or nothing sharded is to be trained.

    Raises ValueError naming the module or parameter that cannot be handled, or that another hook has taken.
    """
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    groups = []
    owners: dict[Any, tuple[str, str]] = {}
    for path, module, param_group in sharded_modules(model):
        if is_taken(param_group):
            raise ValueError(
                f"{path!r} has the communication hook of a GradientSync already; a model keeps its first one: use that "
                "state, or build the model and call fully_shard anew"
            )
        _require_untied(path, param_group, names, owners)
        parameters = tuple(_trainable(path, param_group, names))
        groups.append(ShardedGroup(path, module, param_group, parameters, _place_of(param_group.mesh_info)))
    trained = [group for group in groups if group.parameters]
    frozen = [group for group in groups if not group.parameters]
    return ShardedModel(trained, frozen) if trained else None


def groups_of(model: object) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None] | None:
    """`process_group` and `other_shards` of the first sharded part, also of a model that cannot be handled.

    A rank on which `find_sharded_model` raises tells the others through these.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    for module in modules:
        if isinstance(module, FSDPModule):
            for param_group in module._get_fsdp_state()._fsdp_param_groups:
                mesh_info: Any = param_group.mesh_info
                if _has_replicas(mesh_info):
                    return mesh_info.replicate_process_group, mesh_info.shard_process_group
                if hasattr(mesh_info, "shard_process_group"):
                    return mesh_info.shard_process_group, None
    return None


def sharded_modules(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Where, on which module, and torch's FSDPParamGroup of every group of `model`, frozen ones included."""
    seen = set()
    for name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        path = plain_name(name) or "the root module"
        param_groups = module._get_fsdp_state()._fsdp_param_groups
        if len(param_groups) > 1:
            raise ValueError(
                f"{path!r} has {len(param_groups)} parameter groups with meshes of their own "
                "(shard_placement_fn); torch lets a hook serve only one: use one mesh"
            )
        for param_group in param_groups:
            if id(param_group) not in seen:  # fully_shard([a, b]) makes one group of two modules
                seen.add(id(param_group))
                yield path, module, param_group


def take(group: ShardedGroup) -> None:
    """Mark a group as served: there is no way back from a registered hook, so `find_sharded_model` refuses it."""
    setattr(group.param_group, _TAKEN, True)


def is_taken(param_group: Any) -> bool:
    """Whether a hook serves torch's parameter group."""
    return hasattr(param_group, _TAKEN)


def chunk_shape(fsdp_param: Any, num_ranks: int) -> tuple[int, ...]:
    """The piece of a parameter that one of `num_ranks` owns, filled up where they do not divide its first dimension."""
    shape = tuple(fsdp_param._orig_size)
    return (-(-shape[0] // num_ranks), *shape[1:])


def _has_replicas(mesh_info: Any) -> bool:
    return hasattr(mesh_info, "replicate_process_group") and hasattr(mesh_info, "shard_process_group")


def _place_of(mesh_info: Any) -> Place:
    if _has_replicas(mesh_info):
        return Place()
    return Place(dist.get_world_size(mesh_info.shard_process_group), dist.get_rank(mesh_info.shard_process_group))


def _trainable(path: str, param_group: Any, names: dict[int, str]) -> list[ShardedParameter]:
    mesh_info = param_group.mesh_info
    if not hasattr(mesh_info, "shard_process_group"):
        raise ValueError("the model is replicated and not sharded; use DistributedDataParallel and commcomp.comm_hook")
    size = dist.get_world_size(mesh_info.shard_process_group)
    policy = param_group.mp_policy
    found = []
    for fsdp_param in param_group.fsdp_params:
        current = _current(fsdp_param)
        if not current.requires_grad:
            continue
        name = names.get(id(current))
        if name is None:
            raise ValueError(
                f"the group of {path!r} holds a parameter of shape {tuple(fsdp_param._orig_size)} that is not in the "
                "model given to GradientSync; give it the whole model"
            )
        if fsdp_param.fsdp_placement.dim != 0:
            raise ValueError(
                f"parameter {name!r} is sharded along dimension {fsdp_param.fsdp_placement.dim}; only dimension 0 "
                "(fully_shard's own choice) is supported"
            )
        if getattr(fsdp_param, "is_dtensor", False):
            raise ValueError(
                f"parameter {name!r} is a DTensor on another mesh (tensor parallelism) besides FSDP's; that is not "
                "supported"
            )
        shape, chunk = tuple(fsdp_param._orig_size), chunk_shape(fsdp_param, size)
        dtype = policy.reduce_dtype or policy.param_dtype or current.dtype
        if dtype not in SUPPORTED_DTYPES:
            raise ValueError(
                f"the gradient of {name!r} is reduced in {dtype}; expected float32, float16 or bfloat16: change "
                "reduce_dtype of the MixedPrecisionPolicy"
            )
        found.append(ShardedParameter(name, shape, chunk, fsdp_param, dtype))
    return found


def _current(fsdp_param: Any) -> Tensor:
    """The parameter as the module has it now: gathered after a forward pass, or replaced by to_empty and the like."""
    place = fsdp_param._module_info
    parameter: Tensor = getattr(place.module, place.param_name)
    return parameter


def _require_untied(path: str, param_group: Any, names: dict[int, str], owners: dict[Any, tuple[str, str]]) -> None:
    """torch refuses a parameter of two groups too, but in the first forward pass only."""
    for fsdp_param in param_group.fsdp_params:
        name = names.get(id(_current(fsdp_param)), "?")
        first, other = owners.setdefault(getattr(fsdp_param, "_orig_param_uid", fsdp_param), (path, name))
        if first != path:
            raise ValueError(
                f"parameter {name!r} of {path!r} was tied to {other!r} of {first!r}, and fully_shard made two of it; "
                "put both modules into one group: fully_shard([first, second])"
            )
