"""Saving and loading a `GradientSync`: a flat dict of tensors, on the same or another number of ranks.

| key                         | saved by       | value                                             |
|-----------------------------|----------------|---------------------------------------------------|
| rank_<i>/residual/<name>    | rank i         | its residual, [n, m], fp32 or bf16                |
| warm_right/<name>           | all, identical | Q of the power iteration, fp32 [rank, m]          |
| warm_left/<name>            | all, identical | P, with rounds=1 only, fp32 [rank, n]             |
| step, num_ranks, loss_scale, version | all   | scalars                                           |
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from commcomp.compressors.low_rank import folded_shape
from commcomp.error_feedback import RESIDUAL, ParameterStore, rank_overlap, resample_over_ranks
from commcomp.low_rank_state import FieldSpec, kept_fields

if TYPE_CHECKING:
    from commcomp.gradient_sync import GradientSync

_VERSION = 1


def collect(sync: GradientSync, store: ParameterStore) -> dict[str, Tensor]:
    """The state as a flat dict; every factored parameter is in it, also before its first step."""
    state = {
        "step": torch.tensor(sync.step),
        "num_ranks": torch.tensor(sync.num_ranks),
        "loss_scale": torch.tensor(sync.loss_scale, dtype=torch.float64),
        "version": torch.tensor(_VERSION),
    }
    for name in _factored(sync):
        for field, spec in _fields(sync, name).items():
            if store.get(field, name) is None:
                store.put(field, name, spec.make(name, sync.parameters[name].device))
            state[_key(field, name, sync.rank)] = store.get(field, name)
    return state


def apply(sync: GradientSync, store: ParameterStore, state: Mapping[str, Tensor]) -> None:
    """Put a flat dict into `sync`. Raises ValueError naming the first key that is missing, unknown or misshapen."""
    for key in ("version", "step", "num_ranks"):
        if key not in state:
            raise ValueError(f"gradient state has no key {key!r}; expected what GradientSync.state_dict() returned")
    if int(state["version"]) != _VERSION:
        raise ValueError(f"gradient state has version {int(state['version'])}; this commcomp reads version {_VERSION}")
    _require_known_residuals(sync, state)
    old_ranks = int(state["num_ranks"])
    for name in _factored(sync):
        _apply_residual(sync, store, state, name, old_ranks)
        _apply_warm_starts(sync, store, state, name)
    sync.step = int(state["step"])
    sync.loss_scale = float(state.get("loss_scale", 1.0))


def read(checkpoint_id: str | os.PathLike[str], prefix: str, rank: int, num_ranks: int) -> dict[str, Tensor]:
    """Read from a torch.distributed.checkpoint folder what rank `rank` of `num_ranks` needs, as a flat dict."""
    reader = checkpoint.FileSystemReader(checkpoint_id)
    saved = {
        key[len(prefix) + 1 :]: entry
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if key.startswith(f"{prefix}.") and isinstance(entry, TensorStorageMetadata)
    }
    if "num_ranks" not in saved:
        raise ValueError(f"{checkpoint_id} holds no gradient state under {prefix!r}; save {{{prefix!r}: state_dict()}}")
    scalars = _load(checkpoint_id, prefix, {"num_ranks": saved["num_ranks"]})
    old_ranks = int(scalars["num_ranks"])
    needed = {f"rank_{old}/" for old in range(old_ranks) if rank_overlap(old, old_ranks, rank, num_ranks)}
    wanted = {
        key: entry for key, entry in saved.items() if not key.startswith("rank_") or key.split("/")[0] + "/" in needed
    }
    return _load(checkpoint_id, prefix, wanted)


def _load(
    checkpoint_id: str | os.PathLike[str], prefix: str, entries: Mapping[str, TensorStorageMetadata]
) -> dict[str, Tensor]:
    template = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    checkpoint.load({prefix: template}, checkpoint_id=checkpoint_id, no_dist=True)
    return template


def _factored(sync: GradientSync) -> list[str]:
    return [name for name, rank in sync.ranks.items() if rank]


def _key(field: str, name: str, rank: int) -> str:
    return f"rank_{rank}/{field}/{name}" if field == RESIDUAL else f"{field}/{name}"


def _fields(sync: GradientSync, name: str) -> dict[str, FieldSpec]:
    rows, columns = folded_shape(tuple(sync.parameters[name].shape)) or (0, 0)
    rounds = getattr(sync.methods[name], "rounds", 2)
    config = sync.config
    return kept_fields(
        rows, columns, sync.ranks[name], rounds, residual_dtype=config.residual_dtype, seed=config.seed
    )


def _require_known_residuals(sync: GradientSync, state: Mapping[str, Tensor]) -> None:
    """A residual is owed to its parameter: one that nobody would deliver must not vanish without a word."""
    for key in state:
        rank, _, rest = key.partition("/")
        field, _, name = rest.partition("/")
        if not rank.startswith("rank_") or field != RESIDUAL or sync.ranks.get(name):
            continue
        problem = "travels dense under the present policy" if name in sync.parameters else "is not in this model"
        _complain(
            sync,
            f"gradient state holds a residual ({key}) for parameter {name!r}, which {problem}; restore the policy and "
            "model it was saved with, or drop the residual with strict=False",
        )


def _apply_residual(
    sync: GradientSync, store: ParameterStore, state: Mapping[str, Tensor], name: str, old_ranks: int
) -> None:
    spec, device = _fields(sync, name)[RESIDUAL], sync.parameters[name].device

    def load(old: int) -> Tensor | None:
        key = _key(RESIDUAL, name, old)
        if key not in state and any(other.endswith(f"/{RESIDUAL}/{name}") for other in state):
            raise ValueError(
                f"gradient state saved on {old_ranks} ranks lacks {key!r}, which rank {sync.rank} of {sync.num_ranks} "
                "needs; use state.restore(checkpoint_id), which reads other ranks' residuals"
            )
        return state.get(key)

    residual = resample_over_ranks(load, old_ranks, sync.num_ranks, sync.rank)
    if residual is None:  # compressed only since: nothing is owed
        residual = spec.make(name, device)
    if residual.numel() != torch.Size(spec.shape).numel():
        raise ValueError(
            f"residual of {name!r} has shape {tuple(residual.shape)}; the model's parameter needs {spec.shape}"
        )
    store.put(RESIDUAL, name, residual.to(device, spec.dtype).view(spec.shape))


def _apply_warm_starts(sync: GradientSync, store: ParameterStore, state: Mapping[str, Tensor], name: str) -> None:
    for field, spec in _fields(sync, name).items():
        if field == RESIDUAL:
            continue
        saved, fresh = state.get(f"{field}/{name}"), spec.make(name, sync.parameters[name].device)
        if saved is not None and saved.shape[1:] == fresh.shape[1:]:
            common = min(len(saved), len(fresh))  # another rank: keep the leading columns, the rest starts anew
            fresh[:common] = saved[:common].to(fresh.device)
        store.put(field, name, fresh)


def _complain(sync: GradientSync, message: str) -> None:
    if sync.config.strict:
        raise ValueError(message)
    warnings.warn(message, stacklevel=4)
