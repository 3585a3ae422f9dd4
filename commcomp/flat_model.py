"""What FullyShardedDataParallel (FSDP1) made of a model: its units, and where the parameters lie in each flat one.

A unit's flat parameter is cut into one equal piece a rank anywhere, also inside a matrix. So a unit is a bucket of one
row, as under DDP, of which every rank gets the whole mean and takes its own piece. A bucket that travels dense as a
whole needs no matrices: there each rank gets its own piece alone, as from torch's reduce-scatter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from commcomp.bucket_part import Place
from commcomp.config import Dense, Method
from commcomp.layout import Entry
from commcomp.module_tree import memory_shape, plain_name, require_dense_embeddings, require_storage, require_supported
from commcomp.saved_form import SavedForm, WholeForm

_HYBRID = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)


@dataclass(frozen=True)
class FlatParameterPiece:
    """An original parameter inside a flat one: `offset` and `numel` in elements; `shape` as it lies in memory."""

    name: str
    offset: int
    numel: int
    shape: tuple[int, ...]
    trainable: bool


@dataclass(frozen=True, eq=False)
class FlatUnit:
    """One FullyShardedDataParallel module with parameters of its own; `handle` is torch's FlatParamHandle."""

    module: Any
    handle: Any
    pieces: tuple[FlatParameterPiece, ...]
    numel: int
    """Values that torch hands over: all pieces, and what it fills up with."""
    gradient_dtype: torch.dtype
    """In which torch reduces it."""
    place: Place
    """Every rank needs the whole mean."""
    dense_place: Place
    """Whole as it is, each rank needs its own piece only, unless it is not sharded."""

    @property
    def scattered(self) -> bool:
        """Whether torch would reduce-scatter it; else it would all-reduce it (NO_SHARD)."""
        return self.dense_place.by_owner

    def entries(self) -> list[Entry]:
        """Where the trainable parameters lie in the bucket's row, in torch's order."""
        return [Entry(piece.name, piece.offset, piece.shape) for piece in self.pieces if piece.trainable]

    def own_piece(self, row: Tensor) -> Tensor:
        """This rank's piece of a row, [numel]: a view."""
        return row.view(self.dense_place.num_rows, -1)[self.dense_place.own_row]

    def clear_frozen(self, row: Tensor) -> None:
        """Zeros for parameters that share the flat one and are not trained: torch leaves anything there."""
        for piece in self.pieces:
            if not piece.trainable:
                row[piece.offset : piece.offset + piece.numel].zero_()

    def require_unchanged(self) -> None:
        """RuntimeError naming the parameter that was frozen or unfrozen, or the dtype that changed."""
        originals = self.handle.flat_param._params
        for piece, value in zip(self.pieces, originals or (), strict=False):
            if value.requires_grad != piece.trainable:
                raise RuntimeError(
                    f"requires_grad of parameter {piece.name!r} was {piece.trainable} when GradientSync was "
                    f"constructed and is {value.requires_grad} now; construct the model and its GradientSync anew"
                )
        if self.handle._reduce_dtype != self.gradient_dtype:
            raise RuntimeError(
                f"the gradients of {self.pieces[0].name!r} are reduced in {self.handle._reduce_dtype}; it was "
                f"{self.gradient_dtype} when GradientSync was constructed: construct it after converting the model"
            )


class FlatModel:
    """The units of a model and what they have in common."""

    place = Place()
    other_shards = None

    def __init__(
        self, units: list[FlatUnit], modules: list[FullyShardedDataParallel], stand_ins: dict[str, Tensor]
    ) -> None:
        self.units, self.modules = units, modules
        self.parameters = stand_ins
        """By name: tensors on the meta device with each trainable parameter's shape, strides and dtype."""
        self._unit_of = {piece.name: unit for unit in units for piece in unit.pieces}
        self.process_group: dist.ProcessGroup = units[0].module.process_group
        """The ranks over which gradients are averaged."""
        self.device: torch.device = units[0].module.compute_device
        for unit in units:
            first, own = units[0].pieces[0].name, unit.pieces[0].name
            if unit.module.process_group != self.process_group:
                raise ValueError(f"{own!r} is sharded over other ranks than {first!r}; give all one process_group")
            if unit.module.compute_device != self.device:
                raise ValueError(f"{own!r} and {first!r} lie on several devices; one device a rank is expected")

    def seen_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the matrix that a method sees: dimensions in the order of memory."""
        return memory_shape(self.parameters[name])

    def gradient_dtype(self, name: str) -> torch.dtype:
        """In which torch reduces a parameter."""
        return self._unit_of[name].gradient_dtype

    def scatters(self, name: str) -> bool:
        """Whether torch would reduce-scatter it."""
        return self._unit_of[name].scattered

    def to_owners(self, name: str, effective: Mapping[str, Method]) -> bool:
        """Whether its values go to the ranks that own them alone: where one dense format takes the whole unit."""
        unit = self._unit_of[name]
        methods = {effective[entry.name] for entry in unit.entries()}
        return unit.scattered and len(methods) == 1 and isinstance(effective[name], Dense)

    def num_owners(self, name: str) -> int:
        """Every rank needs the whole mean: pieces are cut anywhere."""
        return 1

    def cut_inside_rows(self, name: str) -> bool:
        """The whole mean is there anyway."""
        return False

    def trainable(self, model: nn.Module) -> dict[str, Tensor]:
        """The stand-ins: the model's own parameters may be views of a piece."""
        return self.parameters

    def saved_form(self, parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> SavedForm:
        """A rank's residual is whole."""
        return WholeForm(parameters, shapes)

    def optimized(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """What optimizers are given: with use_orig_params the original parameters, else the flat ones."""
        flat = [unit.handle.flat_param for unit in self.units]
        return [value for one in flat for value in (one._params if one._params is not None else [one])]


def find_flat_model(model: nn.Module) -> FlatModel | None:
    """The FSDP1 structure of `model`, None if it holds no FullyShardedDataParallel.

    Raises ValueError naming the module or parameter that cannot be handled.
    """
    units, modules, stand_ins = [], [], {}
    for path, module in model.named_modules():
        if not isinstance(module, FullyShardedDataParallel):
            continue
        modules.append(module)
        if module.sharding_strategy in _HYBRID:
            raise ValueError(
                f"{path or 'the root module'!r} has {module.sharding_strategy}; torch lets no hook serve hybrid "
                "strategies of FSDP1: use FULL_SHARD, SHARD_GRAD_OP or NO_SHARD, or fully_shard on a 2-D mesh"
            )
        handle = module._handle
        if handle is None or not handle.flat_param.requires_grad:
            continue
        units.append(_unit(path, module, handle))
        for piece, shape, stride in zip(
            units[-1].pieces, handle.flat_param._shapes, handle.flat_param._strides, strict=True
        ):
            if piece.trainable:
                stand_ins[piece.name] = torch.empty_strided(shape, stride, dtype=handle.flat_param.dtype, device="meta")
    if not modules:
        return None
    require_dense_embeddings(model)
    if not stand_ins:
        raise ValueError("the model has no parameter with requires_grad=True; there is nothing to synchronise")
    return FlatModel(units, modules, stand_ins)


def _unit(path: str, module: Any, handle: Any) -> FlatUnit:
    flat = handle.flat_param
    names = [plain_name(f"{path}.{name}".lstrip(".")) for name in flat._fqns]
    require_storage(names[0], flat)
    require_supported(names[0], flat)
    for name, extension in zip(names, flat._param_extensions, strict=True):
        if extension is not None:
            raise ValueError(f"parameter {name!r} is a DTensor (tensor parallelism) besides FSDP's; not supported")
    trainable = [True] * len(names) if flat._params is None else [value.requires_grad for value in flat._params]
    pieces: list[FlatParameterPiece] = []
    offset = 0
    for numel, is_padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
        if not is_padding:
            index = len(pieces)
            like = torch.empty_strided(flat._shapes[index], flat._strides[index], device="meta")
            pieces.append(FlatParameterPiece(names[index], offset, numel, memory_shape(like), trainable[index]))
        offset += numel
    owners = Place()
    if handle.uses_sharded_strategy:
        owners = Place(dist.get_world_size(module.process_group), dist.get_rank(module.process_group))
    total = -(-offset // owners.num_rows) * owners.num_rows
    return FlatUnit(module, handle, tuple(pieces), total, handle._reduce_dtype, Place(), owners)
