"""What a model's module tree tells: its trainable parameters, their plain names and how they lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of gradients."""
_COMPILED = "_orig_mod"
_WRAPPERS = (_COMPILED, "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_NOT_THERE = (
    "parameter {!r} has no storage yet (meta device or lazy module); construct GradientSync after the model has been "
    "materialised"
)


def find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel layer of a wrapped (also compiled) model, None for a bare module."""
    while not isinstance(model, DistributedDataParallel):
        inner = getattr(model, _COMPILED, None)
        if not isinstance(inner, nn.Module):
            return None
        model = inner
    return model


def device_of(model: object) -> torch.device:
    """Where the model's gradients will be; the CPU for what is no model or has no storage yet."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return next((value.device for value in parameters if not value.is_meta), torch.device("cpu"))


def trainable_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters with requires_grad by the names that the unwrapped, uncompiled model gives them.

    Raises ValueError naming what cannot be synchronised: a dtype, a sparse embedding, several devices, nothing.
    """
    wrapper = find_ddp(model)
    if getattr(wrapper, "mixed_precision", None) is not None:
        raise ValueError(
            "DDP's mixed_precision= registers a communication hook of its own, and there can be one only; "
            "leave it out and use torch.autocast"
        )
    module = model if wrapper is None else wrapper.module
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))  # where DDP keeps its users' choice
    parameters: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad or name in ignored:
            continue
        name = plain_name(name)
        require_supported(name, parameter)
        parameters[name] = parameter
    if not parameters:
        raise ValueError("the model has no parameter with requires_grad=True; there is nothing to synchronise")
    require_dense_embeddings(module)
    devices = {parameter.device for parameter in parameters.values()}
    if len(devices) > 1:
        raise ValueError(f"the model lies on several devices ({devices}); one device a rank is expected")
    require_storage(*next(iter(parameters.items())))
    return parameters


def require_storage(name: str, parameter: Tensor) -> None:
    """ValueError naming a parameter that is not materialised."""
    if isinstance(parameter, UninitializedParameter) or parameter.device.type == "meta":
        raise ValueError(_NOT_THERE.format(name))


def require_supported(name: str, parameter: Tensor) -> None:
    """ValueError naming a parameter of a lazy module, or of another dtype than float32, float16 or bfloat16."""
    if isinstance(parameter, UninitializedParameter):
        raise ValueError(_NOT_THERE.format(name))
    if parameter.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"parameter {name!r} has dtype {parameter.dtype}; expected float32, float16 or bfloat16: "
            "convert it, or freeze it and leave it out of DDP"
        )


def require_dense_embeddings(module: nn.Module) -> None:
    """ValueError naming an embedding whose gradients would be sparse."""
    for name, child in module.named_modules():
        if getattr(child, "sparse", False) and isinstance(child, (nn.Embedding, nn.EmbeddingBag)):
            raise ValueError(f"{name!r} has sparse=True; sparse gradients are not supported, set sparse=False")


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile, checkpoint_wrapper and FSDP1 put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def memory_order(parameter: Tensor) -> tuple[int, ...]:
    """The dimensions of `parameter` from the slowest to the fastest in memory, as DDP lays out its gradient.

    (0, 1, ...) for contiguous tensors and for those with gaps, which DDP stores contiguously.
    """
    strides = parameter.stride()
    order = tuple(sorted(range(parameter.dim()), key=lambda dim: -strides[dim]))
    if parameter.is_contiguous() or not parameter.permute(order).is_contiguous():
        return tuple(range(parameter.dim()))
    return order


def memory_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of `parameter` with its dimensions in `memory_order`.

    A channels_last convolution is (out, height, width, in), a transposed matrix is (columns, rows): what is compressed
    is the matrix that lies in memory, and no gradient is copied to turn it.
    """
    return tuple(parameter.shape[dim] for dim in memory_order(parameter))
