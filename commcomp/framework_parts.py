"""What the adapters for Lightning, accelerate and the Hugging Face Trainer share; it imports none of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from torch import nn
from torch.distributed import checkpoint

from commcomp import policy as policy_module
from commcomp.complaint import complain, warn
from commcomp.config import GradientConfig, Method, Rule, reject_unknown
from commcomp.gradient_sync import GradientSync
from commcomp.hooks.ddp import comm_hook
from commcomp.sharded_model import ShardedModel, sharded_modules

FOLDER = "gradient_sync"
"""Where residuals lie in a framework's checkpoint folder."""
_KEY = "gradient_sync"

Settings = GradientConfig | Mapping[str, Any] | Method


def gradient_config(
    method: Settings | None, policy: Sequence[Rule | tuple[str, Method]] | None, settings: Mapping[str, Any], where: str
) -> GradientConfig:
    """The settings of a GradientSync that is constructed later, so that what is wrong is said now.

    `method`: one for all parameters, or everything: a GradientConfig, or a configuration file's dictionary.
    Raises ValueError naming what cannot work.
    """
    if isinstance(method, (GradientConfig, Mapping)):
        if policy is not None or settings:
            found = sorted(settings) or "a policy"
            raise ValueError(f"{where} got a whole configuration, and {found} besides; expected all in one")
        return method if isinstance(method, GradientConfig) else GradientConfig.from_dict(method)
    if (method is None) == (policy is None):
        raise ValueError(f"{where} takes either one method, e.g. LowRank(rank=4), or policy=[(glob, method), ...]")
    reject_unknown(settings, {field.name for field in fields(GradientConfig)} - {"policy"}, where)
    rules = policy_module.as_rules(policy or ()) if method is None else (Rule("*", method),)
    return GradientConfig(policy=rules, **settings)


def attach(
    model: nn.Module, config: GradientConfig, grad_scaler: torch.amp.GradScaler | None, where: str
) -> GradientSync | None:
    """Construct a GradientSync for a model as a framework has wrapped it, and register the hook that fits it.

    A collective. None, after a warning, where nothing is wrapped and the settings are not strict; ValueError else.
    """
    is_sharded = any(True for _ in sharded_modules(model))
    if not is_sharded and not callable(getattr(model, "register_comm_hook", None)):
        complain(
            f"{where} found a {type(model).__name__}, whose gradients no hook of torch averages; expected a "
            f"DistributedDataParallel, FullyShardedDataParallel or fully_shard model: {_remedy(model)}",
            strict=config.strict,
            unless="one process trains alone and nothing is to be compressed",
        )
        return None
    state = GradientSync.from_config(model, config, grad_scaler=grad_scaler)
    if isinstance(state.sharded, ShardedModel):
        from commcomp.hooks.fsdp import register_comm_hook  # leans on more of torch than the rest

        register_comm_hook(model, state)
    else:
        cast(Any, model).register_comm_hook(state, comm_hook)
    return state


def _remedy(model: nn.Module) -> str:
    if any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__):
        return "under DeepSpeed put a 'commcomp' block into its configuration instead (docs/deepspeed.md)"
    return "start several processes, for example with torchrun"


def save(state: GradientSync, folder: str | os.PathLike[str], *, mean_residual: bool) -> None:
    """Write the residuals of all ranks, or their mean, into a checkpoint's folder. On every rank, which all see it."""
    target = os.path.join(folder, FOLDER)
    checkpoint.save({_KEY: state.state_dict(mean_residual=mean_residual)}, checkpoint_id=target)


def restore(state: GradientSync, folder: str | os.PathLike[str]) -> None:
    """Read what `save` wrote, on any number of ranks; a warning where there is nothing, as from a run without us."""
    source = os.path.join(folder, FOLDER)
    if os.path.isdir(source):
        state.restore(source, _KEY)
    else:
        warn(f"{os.fspath(folder)} holds no residuals (no {FOLDER}/): compression begins anew from this checkpoint")
