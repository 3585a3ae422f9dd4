"""Tokens of DeepSpeed's own MoE layers, compressed: which layers, what is refused, what was sent.

A token's answer depends on tokens of later places in the text no more than it does in plain DeepSpeed, with
`LSH(centroid="first")`: rows of an expert are compared in the order of `x.view(-1, width)`. For x of [batch, length,
width] that is one sequence after another, so a row of an earlier sequence, or of an earlier place in its own, may stand
for a token; for [length, batch, width] it is the order of time. Which tokens are dropped for want of capacity is the
gate's doing, and depends on later tokens there as it does without us.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.moe import sharded_moe
from deepspeed.utils import groups
from torch import nn

from commcomp.complaint import complain, warn
from commcomp.deepspeed.moe_layer import CompressedForward
from commcomp.exchange.agreement import require_agreement
from commcomp.moe import MoEConfig, TokenCompressor

_REMEDY = "give every rank of the expert-parallel group the same model and the same moe settings"


class MoETraffic:
    """The layers whose tokens are compressed, by their names in the model."""

    def __init__(self, layers: Mapping[str, CompressedForward]) -> None:
        self._layers = dict(layers)

    @property
    def compressors(self) -> dict[str, TokenCompressor]:
        """Of each layer; what they have learnt goes into the model's state dict."""
        return {name: one.compressor for name, one in self._layers.items()}

    def stats(self) -> dict[str, Any]:
        """Bytes of this rank since the start, of training passes, forward and backward.

        wire_bytes: handed to collectives for other ranks; plain_bytes: what DeepSpeed's all-to-all of [experts,
        capacity, width] would have been in the dtype of its tensors; ratio: plain_bytes / wire_bytes; layers: the same
        by name, with `dense_bytes`, tokens alone in fp32, and the rest of `TokenCompressor.stats()`.
        """
        layers = {name: one.stats() for name, one in self._layers.items()}
        wire, plain = (sum(one[key] for one in layers.values()) for key in ("wire_bytes", "plain_bytes"))
        return {
            "wire_bytes": wire,
            "plain_bytes": plain,
            "ratio": plain / wire if wire else None,
            "layers": layers,
        }


def attach_moe(model: nn.Module, config: MoEConfig, *, strict: bool) -> MoETraffic | None:
    """Make every expert-parallel `deepspeed.moe.layer.MoE` of `model` send its tokens as `config` says.

    `model`: an engine or its module, after `deepspeed.initialize` (which makes the groups) and before
    `load_checkpoint`. A collective over each expert-parallel group. Layers are changed one by one, no class and no
    global is; attaching again with equal settings changes nothing. Layers with ep_size 1 send nothing and are left as
    they are; None: there is no other, which is warned of.

    Raises ValueError, on every rank, for settings or layers that differ between ranks. Under `strict` raises, and
    otherwise warns and leaves the layer as it is: RuntimeError where this DeepSpeed lacks what is relied on;
    ValueError for Tutel, AutoEP, tensor parallelism, layers with a forward pass or gate of their own, other settings
    than those attached before, and a model without any MoE layer.
    """
    if (lacking := _what_is_missing()) is not None:
        message = (
            f"moe: DeepSpeed {deepspeed.__version__} has no {lacking}, which is needed to compress its MoE layers' "
            "tokens; install a release that commcomp is tested with, or remove the block moe"
        )
        complain(message, strict=strict, error=RuntimeError)
        return None
    found = {name: one for name, one in model.named_modules() if isinstance(one, sharded_moe.MOELayer)}
    travelling = {name: one for name, one in found.items() if one.ep_size > 1}
    problems = _problems_of(model, travelling, config)
    _agree({name: one for name, one in travelling.items() if one.ep_group is not None}, config, problems)
    for name, problem in problems.items():
        complain(f"MoE layer {name}: {problem}", strict=strict)
    if not found and not problems:
        complain(
            "moe: the model has no deepspeed.moe.layer.MoE; remove the block moe (commcomp.moe serves other layers)",
            strict=strict,
        )
    elif not travelling and not problems:
        warn("moe: every MoE layer has ep_size 1: no tokens travel, none are compressed")
    layers = {name: _attached(one, config) for name, one in travelling.items() if name not in problems}
    return MoETraffic(layers) if layers else None


def _attached(layer: Any, config: MoEConfig) -> CompressedForward:
    before = vars(layer).get("forward")
    if isinstance(before, CompressedForward):
        return before
    made = CompressedForward(layer, config)
    layer.token_compressor = made.compressor  # so that it is in the state dict, and follows train() and eval()
    layer.forward = made
    return made


def _agree(layers: Mapping[str, Any], config: MoEConfig, problems: Mapping[str, str]) -> None:
    by_group: dict[dist.ProcessGroup, list[str]] = {}
    for name, layer in layers.items():
        by_group.setdefault(layer.ep_group, []).append(name)
    for group, names in by_group.items():
        facts = {"moe settings": config.to_dict(), "names of MoE layers": names, "MoE layers refused": dict(problems)}
        device = next(layers[names[0]].parameters()).device
        require_agreement(facts, group, device, remedy=_REMEDY)


def _what_is_missing() -> str | None:
    """The first thing that is relied on and that this DeepSpeed's MoE layer lacks."""
    where = "deepspeed.moe.sharded_moe"
    names = ("MOELayer", "TopKGate", "_AllToAll")
    for name in names:
        if not hasattr(sharded_moe, name):
            return f"{where}.{name}"
    layer, gate, all_to_all = (getattr(sharded_moe, name) for name in names)
    forward = layer.forward
    if not isinstance(forward, FunctionType) or "_AllToAll" not in forward.__code__.co_names:
        return f"{where}.MOELayer.forward that calls _AllToAll"
    if list(inspect.signature(all_to_all.forward).parameters) != ["ctx", "group", "input"]:
        return f"{where}._AllToAll.forward(ctx, group, input)"
    if "sparse_routes" not in inspect.signature(gate.forward).parameters:
        return f"parameter sparse_routes of {where}.TopKGate.forward"
    return None


def _problems_of(model: nn.Module, layers: Mapping[str, Any], config: MoEConfig) -> dict[str, str]:
    """Why which layers cannot be served, and what to do."""
    split = {
        id(child)
        for parent in model.modules()
        if getattr(parent, "enable_expert_tensor_parallelism", False)
        for child in parent.modules()
    }
    found = {name: _problem(layer, config, id(layer) in split) for name, layer in layers.items()}
    problems = {name: problem for name, problem in found.items() if problem is not None}
    automatic = _automatic_layer()
    for name, module in model.named_modules():
        if automatic is not None and isinstance(module, automatic):
            problems[name] = (
                "it is AutoEP's (expert_parallel in ds_config), which sends its tokens by itself; remove the block "
                "expert_parallel and build the model with deepspeed.moe.layer.MoE, or remove the block moe"
            )
    return problems


def _problem(layer: Any, config: MoEConfig, split: bool) -> str | None:
    before = vars(layer).get("forward")
    if isinstance(before, CompressedForward):
        if before.config == config:
            return None
        return f"its tokens are sent by {before.config}, now {config} is asked for; attach once, or with equal settings"
    if before is not None or type(layer).forward is not sharded_moe.MOELayer.forward:
        return "it has a forward pass of its own; use DeepSpeed's, or commcomp.moe.dispatch and combine in yours"
    if getattr(layer, "use_tutel", False):
        return "it uses Tutel, which packs tokens in its own way; build it with use_tutel=False"
    if not isinstance(layer.gate, sharded_moe.TopKGate):
        return f"its gate is {type(layer.gate).__name__}; expected deepspeed.moe.sharded_moe.TopKGate"
    if hasattr(layer, "token_compressor"):
        return "it has an attribute token_compressor of its own; rename that"
    if layer.ep_group is None:
        return "it has no process group yet; attach after deepspeed.initialize"
    if split:
        return "its experts are tensor-parallel; build it with enable_expert_tensor_parallelism=False"
    if (ranks := sharded_moe.bwc_tensor_model_parallel_world_size(groups.mpu)) > 1:
        return f"the model is tensor-parallel over {ranks} ranks, which cuts what is sent; use 1, or no block moe"
    return None


def _automatic_layer() -> type[nn.Module] | None:
    """AutoEP's layer, in releases that have it."""
    try:
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    except ImportError:
        return None
    return AutoEPMoELayer
