"""What is to be synchronised: a model's parameters, what they look like in gradient buckets, and their methods."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from commcomp import policy as policy_module
from commcomp.complaint import complain, warn
from commcomp.compressors import native
from commcomp.compressors.low_rank import folded_shape
from commcomp.compressors.passes import rounding_digest
from commcomp.config import Dense, GradientConfig, LowRank, Method, Rule, Sparse
from commcomp.exchange.mean import sent_bytes
from commcomp.layout import effective_method, sections, wire_dtype
from commcomp.model_structure import ModelStructure
from commcomp.module_tree import memory_shape, trainable_parameters
from commcomp.saved_form import SavedForm, WholeForm
from commcomp.transformer_roles import ATTENTION, EMBEDDING, HEAD, MLP, transformer_roles

_TAGC_ROLES = (MLP, EMBEDDING, HEAD)


def _for_role(method: Method, role: str | None) -> Method:
    """The method, or Dense where it leaves matrices of this role in a transformer alone; None: not in one."""
    if not isinstance(method, Sparse) or role is None or method.layers == "all" or role in _TAGC_ROLES:
        return method
    if role == ATTENTION and method.layers == "transformer+attention":
        return method
    return Dense(method.dense_dtype)


def _complain_of_unsharded(names: Sequence[str], *, strict: bool) -> None:
    if not names:
        return
    message = (
        f"parameters {list(names[:4])} are in no fully_shard group: neither torch nor this GradientSync averages their "
        "gradients; call fully_shard on the root module too, before GradientSync is constructed"
    )
    complain(message, strict=strict, unless="they are its ignored_params")


def _cheaper_whole(
    method: Method, shape: tuple[int, ...], gradient_dtype: torch.dtype, num_owners: int, *, to_everybody: bool
) -> Method:
    """`method`, or Dense where a matrix of which each rank owns a piece travels whole in fewer bytes.

    Values go to their owners alone (unless `to_everybody`), both factors of a matrix to everybody.
    """
    if isinstance(method, Dense) or num_owners == 1 or not (to_everybody or isinstance(method, LowRank)):
        return method
    dense = Dense(wire_dtype(method.dense_dtype, gradient_dtype))
    (whole,) = sections(dense, shape)
    owned = whole.of_length(-(-whole.length // num_owners))
    sent = float(sum(sent_bytes(section, num_owners) for section in sections(method, shape)))
    if isinstance(method, LowRank):
        sent *= method.min_ratio * method.rounds / 2
    return method if (num_owners - 1) * owned.encoded_bytes() > sent else dense


class SynchronisedModel:
    """Everything about a model and the settings for it that one rank can tell by itself.

    Raises ValueError naming the parameter, rule or setting that cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method | None,
        policy: Sequence[Rule | tuple[str, Method]] | None,
        settings: dict[str, Any],
        sharded: ModelStructure | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"GradientSync got {type(model).__name__} as model; expected GradientSync(model, method)")
        if isinstance(method, (list, tuple)):
            raise ValueError("GradientSync got a list for its method; rules are given as policy=[(glob, method), ...]")
        if policy is None and method is not None:
            policy = [("*", method)]
        elif policy is None:
            raise ValueError("GradientSync got no method; expected one, e.g. LowRank(rank=4), or policy=[...]")
        elif method is not None:
            raise ValueError("GradientSync got a method and a policy; expected one method, or policy=[...], not both")
        self.config = GradientConfig(policy=policy_module.as_rules(policy), **settings)
        self.parameters = trainable_parameters(model) if sharded is None else sharded.trainable(model)
        """By name without wrappers' prefixes; of FSDP1 and DeepSpeed tensors without values."""
        self.sharded = sharded
        """What fully_shard, FullyShardedDataParallel or DeepSpeed made of the model, if they did."""
        if self.sharded is None:
            shapes = {name: memory_shape(value) for name, value in self.parameters.items()}
            dtypes = {name: value.dtype for name, value in self.parameters.items()}
        else:
            pieces = self.sharded.parameters
            outside = [name for name in self.parameters if name not in pieces]
            _complain_of_unsharded(outside, strict=self.config.strict)
            self.parameters = {name: value for name, value in self.parameters.items() if name in pieces}
            shapes = {name: self.sharded.seen_shape(name) for name in self.parameters}
            dtypes = {name: self.sharded.gradient_dtype(name) for name in self.parameters}
        self.shapes: dict[str, tuple[int, ...]] = shapes
        """As the methods see them: dimensions in the order of memory; with replicas, the piece of one rank."""
        self.gradient_dtypes: dict[str, torch.dtype] = dtypes
        rules, strict = self.config.policy, self.config.strict
        self.methods = policy_module.assign_methods(rules, self.parameters, strict=strict)
        roles = transformer_roles(model, self.parameters)
        self.effective = {
            name: effective_method(_for_role(self.methods[name], roles.get(name)), shape, dtypes[name])
            for name, shape in shapes.items()
        }
        """What each parameter really gets: Dense where its method would not make it smaller."""
        if sharded is not None:
            for name, found in self.effective.items():
                owners, everybody = sharded.num_owners(name), sharded.cut_inside_rows(name)
                self.effective[name] = _cheaper_whole(
                    found, shapes[name], dtypes[name], owners, to_everybody=everybody
                )
        if self.config.residual_dtype == "none" and any(
            isinstance(found, (LowRank, Sparse)) for found in self.effective.values()
        ):
            warn(
                "residual_dtype='none' under LowRank or Sparse: what is not delivered, most of a gradient, is lost in "
                "every step; int8 keeps it for one byte a value"
            )
        policy_module.require_effect(rules, self.methods, self.effective, shapes, strict=strict)
        if sharded is not None and any(sharded.num_owners(name) > 1 for name in self.parameters):
            self._say_what_residuals_take()
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}

    def _say_what_residuals_take(self) -> None:
        """A warning where residuals undo the sharding of the model's memory."""
        item_bytes = {"fp32": 4, "bf16": 2}.get(self.config.residual_dtype)
        values = sum(prod(self.shapes[name]) for name, found in self.effective.items() if not isinstance(found, Dense))
        if item_bytes and values:
            warn(
                f"residual_dtype={self.config.residual_dtype!r} keeps {item_bytes * values / 1e6:.4g} MB a rank: on a "
                "1-D mesh a rank owes something to every owner, so residuals are of the whole model's size; "
                "'int8' keeps one byte a value, HSDP a residual of a shard's size"
            )

    @property
    def compresses(self) -> bool:
        """Whether any parameter is compressed."""
        return any(not isinstance(method, Dense) for method in self.effective.values())

    def name_of(self, parameter: Tensor) -> str:
        """The name of a parameter in a bucket."""
        name = self._names.get(id(parameter))
        if name is None:
            raise ValueError(
                f"a bucket holds a parameter of shape {tuple(parameter.shape)} that the model given to GradientSync "
                "did not have with requires_grad=True: construct GradientSync after freezing, unfreezing or replacing, "
                "and register each model's own state"
            )
        return name

    def optimized(self) -> list[Tensor]:
        """The parameters as optimizers are given them."""
        return list(self.parameters.values()) if self.sharded is None else self.sharded.optimized(self.parameters)

    def saved_form(self) -> SavedForm:
        """How residuals are saved; a collective in nothing, but it needs the process groups."""
        if self.sharded is None:
            return WholeForm(self.parameters, self.shapes)
        return self.sharded.saved_form(self.parameters, self.shapes)

    def facts(self) -> dict[str, Any]:
        """What must be equal on all ranks, JSON-able."""
        settings = self.config.to_dict()
        settings["policy"] = [f"{rule.params!r}: {rule.method}" for rule in self.config.policy]
        return {
            "settings": settings,
            "parameters": [
                f"{name} {list(self.shapes[name])} {value.dtype}" for name, value in self.parameters.items()
            ],
        }

    def rounding(self, device: torch.device) -> str:
        """What decides the decoded bits on a CPU: the passes, the number of threads, and a trial."""
        low_rank = ((self.effective[name], folded_shape(shape)) for name, shape in self.shapes.items())
        trial = rounding_digest(
            (method.rank, *shape) for method, shape in low_rank if isinstance(method, LowRank) and shape
        )
        return f"{native.arithmetic(device)} passes on {torch.get_num_threads()} threads, giving {trial}"
