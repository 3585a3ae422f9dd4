"""The raw bytes of tensors and arrays on the host, and tensors and arrays made of raw bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from commcomp.checkpoint.coded import HostTensor, TensorHeader
from commcomp.checkpoint.dtypes import NUMPY_DTYPES, TORCH_DTYPES, dtype_name
from commcomp.checkpoint.parallel import ordered_map

_UNSIGNED = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}  # numpy copies items of these sizes fast


def host_tensors(tensors: Mapping[str, Tensor | np.ndarray], *, copy: bool, threads: int = 1) -> dict[str, HostTensor]:
    """The raw bytes of each. `copy`: in memory of their own, one memcpy each; otherwise views where that can be."""

    def convert(item: tuple[str, Tensor | np.ndarray]) -> HostTensor:
        name, value = item
        data = raw_bytes(value, copy=copy)
        data.flags.writeable = False
        dtype = dtype_name(value.dtype) if isinstance(value, Tensor) else value.dtype.name
        return HostTensor(name, dtype, tuple(value.shape), data)

    return {made.name: made for made in ordered_map(convert, tensors.items(), threads)}


def raw_bytes(value: Tensor | np.ndarray, *, copy: bool) -> np.ndarray:
    """The values in row-major order as flat uint8; a view of contiguous values on the CPU unless `copy`."""
    if isinstance(value, np.ndarray):
        array = value
    else:
        value = value.detach().resolve_conj().resolve_neg()
        if value.device.type != "cpu":
            return _from_device(value)
        array = _as_items(value)
    if array.flags.c_contiguous:
        flat = array.reshape(-1).view(np.uint8)
        return flat.copy() if copy else flat.view()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _storage_bytes(tensor: Tensor) -> Tensor:
    """All bytes of a tensor's storage, whatever its dtype."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))


def _as_items(tensor: Tensor) -> np.ndarray:
    """A CPU tensor as a numpy array of unsigned items of its width, a view."""
    width = tensor.dtype.itemsize
    return np.ndarray(
        tuple(tensor.shape),
        _UNSIGNED[width],
        _storage_bytes(tensor).numpy() if tensor.numel() else np.empty(0, np.uint8),
        tensor.storage_offset() * width if tensor.numel() else 0,
        tuple(stride * width for stride in tensor.stride()),
    )


def _from_device(tensor: Tensor) -> np.ndarray:
    tensor = tensor.contiguous()
    start = tensor.storage_offset() * tensor.dtype.itemsize
    return _storage_bytes(tensor)[start : start + tensor.numel() * tensor.dtype.itemsize].cpu().numpy()


def as_tensor(header: TensorHeader, data: np.ndarray, shape: tuple[int, ...] | None = None) -> Tensor:
    """A CPU tensor in the memory of `data` (uint8, flat, its raw bytes), of the header's dtype."""
    shape = header.shape if shape is None else shape
    dtype = TORCH_DTYPES[header.dtype]
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return torch.empty(0, dtype=dtype).set_(torch.from_numpy(data).untyped_storage(), 0, shape, strides)


def as_array(header: TensorHeader, data: np.ndarray) -> np.ndarray:
    """A numpy array in the memory of `data`. Raises ValueError for a dtype that numpy does not have."""
    if header.dtype not in NUMPY_DTYPES:
        raise ValueError(f"is declared a numpy array of dtype {header.dtype}, which numpy does not have")
    return data.view(NUMPY_DTYPES[header.dtype]).reshape(header.shape)
