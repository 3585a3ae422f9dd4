"""What DeepSpeed made of a model: which parameters are averaged, in which dtype, and who owns which piece.

Under ZeRO 0, 1 and 2 every rank computes whole gradients and is given the whole mean: 1 and 2 cut a flat buffer of many
parameters anywhere, so a rank keeps its part of what it is given. Under ZeRO 3 each parameter, laid out flat, is cut
into one equal piece a rank. Where that is at the end of a row, methods see a matrix of which each rank owns some rows,
as under FSDP2. Elsewhere its compressed mean goes to all ranks, and what is not compressed goes as a vector to its
owners.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from commcomp.bucket_part import OneWay, Place
from commcomp.config import Dense, Method
from commcomp.layout import Entry
from commcomp.module_tree import require_dense_embeddings, require_supported
from commcomp.saved_form import SavedForm

FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20
"""As DistributedDataParallel's: the first one is small, so that something is on its way soon."""


@dataclass(frozen=True, eq=False)
class ZeroParameter:
    """A parameter that is averaged over the data-parallel ranks; `value` is the model's own."""

    name: str
    value: nn.Parameter
    shape: tuple[int, ...]
    gradient_dtype: torch.dtype
    """In which DeepSpeed reduces it."""

    @property
    def numel(self) -> int:
        """Values of the whole parameter."""
        return prod(self.shape)


@dataclass(frozen=True, eq=False)
class ZeroGroup(OneWay):
    """Parameters whose gradients go in one bucket, [W, S]; in a row they lie one after another, in this order."""

    parameters: tuple[ZeroParameter, ...]
    chunks: tuple[int, ...]
    """Values of each in a row."""
    place: Place
    scattered: bool
    """Whether DeepSpeed would reduce-scatter them."""
    rows_of: tuple[tuple[int, ...], ...]
    """The shape of each in a row, as methods see it."""

    @property
    def row_numel(self) -> int:
        """S."""
        return sum(self.chunks)

    def places(self) -> Iterator[tuple[ZeroParameter, int, int]]:
        """Each parameter, where it begins in a row, and its values there."""
        return zip(self.parameters, accumulate(self.chunks, initial=0), self.chunks)

    def entries(self) -> list[Entry]:
        """Where the parameters lie in a row."""
        entries = []
        for (parameter, offset, chunk), shape in zip(self.places(), self.rows_of, strict=True):
            total_rows = (*parameter.shape, 1)[0] if self.place.by_owner else None
            entries.append(Entry(parameter.name, offset, shape, total_rows, self._padding(parameter, chunk)))
        return entries

    def _padding(self, parameter: ZeroParameter, chunk: int) -> tuple[int, ...]:
        missing = [chunk - max(0, min(chunk, parameter.numel - row * chunk)) for row in range(self.place.num_rows)]
        return tuple(missing) if any(missing) else ()


class ReshapedForm(SavedForm):
    """The whole residual; where each rank owns rows of the parameter, kept as one piece a rank."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], num_pieces: Mapping[str, int]) -> None:
        self._shapes, self._num_pieces = shapes, num_pieces

    def kept_shape(self, name: str) -> tuple[int, ...]:
        shape, pieces = self._shapes[name], self._num_pieces[name]
        return (1, *shape) if pieces == 1 else (pieces, shape[0] // pieces, *shape[1:])

    def full_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def to_saved(self, name: str, kept: Tensor) -> Tensor:
        return kept.reshape(self._shapes[name])

    def from_saved(self, name: str, saved: Tensor) -> Tensor:
        return saved.reshape(self.kept_shape(name))


class ZeroModel:
    """The averaged parameters of one engine, and how they are dealt out.

    Args:
        parameters: in the order of the model.
        num_owners: ranks that each own a piece of every gradient (ZeRO 3), or 1.
        optimized: what the optimizer is given.
    """

    other_shards = None

    def __init__(
        self,
        parameters: Sequence[ZeroParameter],
        process_group: dist.ProcessGroup,
        device: torch.device,
        *,
        num_owners: int,
        optimized: Sequence[Tensor],
    ) -> None:
        self.members = {parameter.name: parameter for parameter in parameters}
        self.process_group, self.device = process_group, device
        self._num_owners, self._optimized = num_owners, list(optimized)
        self.parameters: dict[str, Tensor] = {
            name: torch.empty(member.shape, dtype=member.value.dtype, device="meta")
            for name, member in self.members.items()
        }
        """By name: tensors on the meta device."""

    def trainable(self, model: nn.Module) -> dict[str, Tensor]:
        """The stand-ins: under ZeRO 3 the model's own are empty between uses."""
        require_dense_embeddings(model)
        for name, member in self.members.items():
            require_supported(name, member.value)
        return self.parameters

    def optimized(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """What DeepSpeed gives to the optimizer: flat pieces of many, or the parameters."""
        return self._optimized

    def seen_shape(self, name: str) -> tuple[int, ...]:
        """The parameter's own."""
        return self.members[name].shape

    def gradient_dtype(self, name: str) -> torch.dtype:
        """In which DeepSpeed reduces it."""
        return self.members[name].gradient_dtype

    def scatters(self, name: str) -> bool:
        """ZeRO 3 reduce-scatters; 1 and 2 all-reduce whole buckets and keep a part."""
        return self._num_owners > 1

    def num_owners(self, name: str) -> int:
        """The ranks, under ZeRO 3."""
        return self._num_owners

    def cut_inside_rows(self, name: str) -> bool:
        """Whether an owner's piece ends inside a row of the matrix."""
        shape = self.members[name].shape
        return self._num_owners > 1 and len(shape) > 1 and shape[0] % self._num_owners > 0

    def to_owners(self, name: str, effective: Mapping[str, Method]) -> bool:
        """Not where a compressed matrix is cut inside a row."""
        return self._num_owners > 1 and (isinstance(effective[name], Dense) or not self.cut_inside_rows(name))

    def saved_form(self, parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> SavedForm:
        """Residuals are saved whole; ZeRO 3 keeps them by owner where it deals out rows."""
        pieces = {name: 1 if self.cut_inside_rows(name) else self._num_owners for name in shapes}
        vectors = {name: 1 for name, shape in shapes.items() if len(shape) < 2}  # they travel dense
        return ReshapedForm(shapes, {**pieces, **vectors})

    def groups(self, effective: Mapping[str, Method]) -> list[ZeroGroup]:
        """Buckets in the order in which a backward pass fills them: of one dtype, going one way."""
        ways: dict[tuple[torch.dtype, bool], list[list[ZeroParameter]]] = {}
        sizes: dict[tuple[torch.dtype, bool], int] = {}
        for member in reversed(self.members.values()):
            way = (member.gradient_dtype, self.to_owners(member.name, effective))
            buckets = ways.setdefault(way, [])
            limit = FIRST_BUCKET_BYTES if len(buckets) == 1 else BUCKET_BYTES
            if not buckets or sizes[way] >= limit:
                buckets.append([])
                sizes[way] = 0
            buckets[-1].append(member)
            sizes[way] += member.numel * member.gradient_dtype.itemsize
        order = {name: index for index, name in enumerate(self.members)}
        found = [(members, owned) for (_, owned), buckets in ways.items() for members in buckets]
        found.sort(key=lambda bucket: -order[bucket[0][-1].name])
        return [self._group(members, owned) for members, owned in found]

    def _group(self, members: Sequence[ZeroParameter], owned: bool) -> ZeroGroup:
        scattered = self._num_owners > 1
        if not owned:
            shapes = tuple(member.shape for member in members)
            return ZeroGroup(tuple(members), tuple(member.numel for member in members), Place(), scattered, shapes)
        size = self._num_owners
        chunks = tuple(-(-member.numel // size) for member in members)
        shapes = tuple(
            (chunk,)
            if len(member.shape) < 2 or self.cut_inside_rows(member.name)
            else (member.shape[0] // size, *member.shape[1:])
            for member, chunk in zip(members, chunks, strict=True)
        )
        return ZeroGroup(tuple(members), chunks, Place(size, dist.get_rank(self.process_group)), scattered, shapes)
