"""Saving and loading a `GradientSync`: a flat dict of tensors, on the same or another number of ranks.

| key                         | saved by       | value                                             |
|-----------------------------|----------------|---------------------------------------------------|
| rank_<i>/residual/<name>    | rank i         | its residual, the parameter's shape, fp32 or bf16 |
| rank_0/residual/<name>      | all, identical | with `mean`: the mean over ranks, as of one rank  |
| warm_right/<name>           | all, identical | Q of the power iteration, fp32 [rank, m]          |
| warm_left/<name>            | all, identical | P, with rounds=1 only, fp32 [rank, n]             |
| step, num_ranks, loss_scale, version | all   | scalars                                           |

Under HSDP "rank" is the number of the replica; a residual is sharded over its ranks as the parameter is, and each shard
has factors of its own: warm_right/<name>/piece_<j>_of_<M>.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from commcomp.complaint import complain
from commcomp.compressors.low_rank import folded_shape
from commcomp.config import Dense, LowRank
from commcomp.error_feedback import (
    RESIDUAL,
    WARM_RIGHT,
    FieldSpec,
    ParameterStore,
    rank_overlap,
    resample_over_ranks,
)
from commcomp.low_rank_part import warm_start_fields
from commcomp.residuals import for_saving, packed, residual_spec

if TYPE_CHECKING:
    from commcomp.gradient_sync import GradientSync

_VERSION = 1


def collect(
    sync: GradientSync, store: ParameterStore, mean: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """The state as a flat dict; every factored parameter is in it, also before its first step.

    `mean`: of a tensor over all ranks; then it is the state of a single rank that is owed as much as all.
    """
    state = {
        "step": torch.tensor(sync.step),
        "num_ranks": torch.tensor(1 if mean else sync.num_ranks),
        "loss_scale": torch.tensor(sync.loss_scale, dtype=torch.float64),
        "version": torch.tensor(_VERSION),
    }
    for name in _compressed(sync):
        for field, spec in _fields(sync, name).items():
            if store.get(field, name) is None:
                store.put(field, name, spec.make(name, sync.device))
            value = store.get(field, name)
            assert value is not None
            if field == RESIDUAL:
                values = for_saving(value, sync.saved_form.kept_shape(name))
                if mean is None:
                    state[f"rank_{sync.rank}/{RESIDUAL}/{name}"] = sync.saved_form.to_saved(name, values)
                else:
                    whole = sync.saved_form.to_whole(name, mean(values))
                    state[f"rank_0/{RESIDUAL}/{name}"] = whole.cpu()
            else:
                state[f"{field}/{sync.saved_form.factor_name(name)}"] = value
    return state


def planned_bytes(sync: GradientSync) -> int:
    """What this rank keeps between steps once every parameter has been through a compressed one."""
    return sum(spec.num_bytes for name in _compressed(sync) for spec in _fields(sync, name).values())


def warm_start_digest(sync: GradientSync, store: ParameterStore) -> str:
    """A few letters that are equal on ranks with equal warm starts."""
    digest = hashlib.sha256()
    for name in _compressed(sync):
        for field, spec in _fields(sync, name).items():
            if field != RESIDUAL:
                value = store.get(field, name)
                value = spec.make(name, torch.device("cpu")) if value is None else value
                digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def prepare(sync: GradientSync, store: ParameterStore, state: Mapping[str, Tensor]) -> Callable[[], None]:
    """Check a flat dict against `sync`; the call that is returned puts it in.

    Raises ValueError naming the first key that is missing, unknown or misshapen.
    """
    for key in ("version", "step", "num_ranks"):
        if key not in state:
            raise ValueError(f"gradient state has no key {key!r}; expected what GradientSync.state_dict() returned")
    if int(state["version"]) != _VERSION:
        raise ValueError(f"gradient state has version {int(state['version'])}; this commcomp reads version {_VERSION}")
    _require_known_residuals(sync, state)
    old_ranks = int(state["num_ranks"])
    values = [item for name in _compressed(sync) for item in _values_of(sync, state, name, old_ranks)]

    def put() -> None:
        for field, name, value in values:
            store.put(field, name, value)
        sync.step = int(state["step"])
        sync.loss_scale = _loss_scale(state)

    return put


def _loss_scale(state: Mapping[str, Tensor]) -> float:
    return float(state.get("loss_scale", 1.0))


def read(sync: GradientSync, reader: checkpoint.StorageReader, prefix: str) -> dict[str, Tensor]:
    """Read from a checkpoint of torch.distributed.checkpoint what this rank of `sync` needs, as a flat dict."""
    rank, num_ranks = sync.rank, sync.num_ranks
    metadata = reader.read_metadata()
    saved = {
        key[len(prefix) + 1 :]: entry
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith(f"{prefix}.") and isinstance(entry, TensorStorageMetadata)
    }
    if "num_ranks" not in saved:
        place = getattr(reader, "checkpoint_id", reader)
        raise ValueError(f"{place} holds no gradient state under {prefix!r}; save {{{prefix!r}: state_dict()}}")
    scalars = _load(reader, prefix, {"num_ranks": _empty(saved["num_ranks"])})
    old_ranks = int(scalars["num_ranks"])
    needed = {f"rank_{old}/" for old in range(old_ranks) if rank_overlap(old, old_ranks, rank, num_ranks)}
    compressed = set(_compressed(sync))
    wanted = {}
    for key, entry in saved.items():
        of_rank, _, name = key.partition(f"/{RESIDUAL}/")
        if not key.startswith("rank_"):
            wanted[key] = _empty(entry)
        elif of_rank + "/" in needed:
            fits = name in compressed and tuple(entry.size) == sync.saved_form.full_shape(name)
            wanted[key] = sync.saved_form.template(name, entry.properties.dtype) if fits else _empty(entry)
    return _load(reader, prefix, wanted)


def reader_of(checkpoint_id: str | os.PathLike[str]) -> checkpoint.StorageReader:
    """Of a folder that torch.distributed.checkpoint wrote. Raises FileNotFoundError where it is none."""
    reader = checkpoint.FileSystemReader(checkpoint_id)
    if not os.path.exists(os.path.join(checkpoint_id, ".metadata")):
        raise FileNotFoundError(
            f"{checkpoint_id} holds no checkpoint of torch.distributed.checkpoint (no file .metadata); expected the "
            "checkpoint_id given to checkpoint.save, and that save to have ended, or a storage_reader for what another "
            "storage_writer wrote"
        )
    return reader


def _empty(entry: TensorStorageMetadata) -> Tensor:
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _load(reader: checkpoint.StorageReader, prefix: str, into: dict[str, Tensor]) -> dict[str, Tensor]:
    with warnings.catch_warnings():  # it thinks that no_dist was not meant
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        checkpoint.load({prefix: into}, storage_reader=reader, no_dist=True)
    return into


def _compressed(sync: GradientSync) -> list[str]:
    return [name for name, method in sync.effective.items() if not isinstance(method, Dense)]


def _fields(sync: GradientSync, name: str) -> dict[str, FieldSpec]:
    """What is kept of a compressed parameter between steps."""
    method, shape, config = sync.effective[name], sync.shapes[name], sync.config
    fields = {}
    if spec := residual_spec(config.residual_dtype, sync.saved_form.kept_shape(name)):
        fields[RESIDUAL] = spec
    if isinstance(method, LowRank):
        rows, columns = folded_shape(shape) or (0, 0)
        fields.update(warm_start_fields(rows, columns, method.rank, method.rounds, seed=config.seed))
    return fields


def _require_known_residuals(sync: GradientSync, state: Mapping[str, Tensor]) -> None:
    """A residual is owed to its parameter: one that nobody would deliver must not vanish without a word."""
    compressed = set(_compressed(sync)) if sync.config.residual_dtype != "none" else set()
    for key in state:
        rank, _, rest = key.partition("/")
        field, _, name = rest.partition("/")
        if not rank.startswith("rank_") or field != RESIDUAL or name in compressed:
            continue
        if name not in sync.parameters:
            problem = "is not in this model"
        elif sync.config.residual_dtype == "none":
            problem = "keeps none with residual_dtype='none'"
        else:
            problem = "travels dense under the present policy"
        complain(
            f"gradient state holds a residual ({key}) for parameter {name!r}, which {problem}; restore the settings "
            "and model it was saved with",
            strict=sync.config.strict,
            unless="what it holds may be dropped",
        )


def _values_of(
    sync: GradientSync, state: Mapping[str, Tensor], name: str, old_ranks: int
) -> Iterator[tuple[str, str, Tensor]]:
    device = sync.device
    for field, spec in _fields(sync, name).items():
        value = (
            _residual(sync, state, name, old_ranks, spec)
            if field == RESIDUAL
            else _warm_start(sync, state, field, name, spec)
        )
        yield field, name, value.to(device, spec.dtype)


def _residual(sync: GradientSync, state: Mapping[str, Tensor], name: str, old_ranks: int, spec: FieldSpec) -> Tensor:
    def load(old: int) -> Tensor | None:
        key = f"rank_{old}/{RESIDUAL}/{name}"
        if key not in state:
            if any(other.endswith(f"/{RESIDUAL}/{name}") for other in state):
                raise ValueError(
                    f"gradient state saved on {old_ranks} ranks lacks {key!r}, which rank {sync.rank} of "
                    f"{sync.num_ranks} needs; use state.restore(checkpoint_id), which reads other ranks' residuals"
                )
            return None
        expected = sync.saved_form.full_shape(name)
        if tuple(state[key].shape) != expected:
            raise ValueError(f"{key!r} has shape {tuple(state[key].shape)}; the model's parameter has {expected}")
        return sync.saved_form.from_saved(name, state[key])

    residual = resample_over_ranks(load, old_ranks, sync.num_ranks, sync.rank)
    if residual is None:
        if f"{WARM_RIGHT}/{name}" in state and not _without_feedback(state):
            raise ValueError(f"gradient state holds a warm start but no residual for parameter {name!r}; it is damaged")
        return spec.make(name, torch.device("cpu"))  # it travelled dense then: nothing is owed
    if not sync.uses_loss_scale:
        residual = residual / _loss_scale(state)
    return packed(residual, spec, name=name, step=int(state["step"]))


def _warm_start(
    sync: GradientSync, state: Mapping[str, Tensor], field: str, name: str, spec: FieldSpec
) -> Tensor:
    saved, fresh = state.get(f"{field}/{sync.saved_form.factor_name(name)}"), spec.make(name, torch.device("cpu"))
    if saved is not None and saved.shape[1:] == fresh.shape[1:]:
        common = min(len(saved), len(fresh))  # another rank: keep the leading columns, the rest starts anew
        fresh[:common] = saved[:common]
    return fresh


def _without_feedback(state: Mapping[str, Tensor]) -> bool:
    """Whether it was saved with residual_dtype="none"."""
    return not any(f"/{RESIDUAL}/" in key for key in state)
