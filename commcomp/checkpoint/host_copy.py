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

_WORTH_THREADS = 16 << 20  # bytes
_SHARED_BYTES, _ALIGNMENT = 64 << 20, 64
_UNSIGNED = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}  # numpy copies items of these sizes fast


def host_views(tensors: Mapping[str, Tensor | np.ndarray]) -> dict[str, HostTensor]:
    """The raw bytes of each; views where that can be."""
    return {name: _host_tensor(name, value, raw_bytes(value)) for name, value in tensors.items()}


def host_copies(
    tensors: Mapping[str, Tensor | np.ndarray], memory: Mapping[str, np.ndarray], threads: int
) -> dict[str, HostTensor]:
    """The raw bytes of each in memory that nobody else has: that of `memory` (uint8) where name and size fit.

    One memcpy a tensor. New memory costs two to five times that: the system has to clear it first.
    """
    fitting = {
        name: data
        for name, value in tensors.items()
        if (data := memory.get(name)) is not None and data.shape == (value.nbytes,) and data.flags.writeable
    }
    to = fitting | _new_memory({name: value.nbytes for name, value in tensors.items() if name not in fitting})

    def convert(item: tuple[str, Tensor | np.ndarray]) -> HostTensor:
        name, value = item
        copy_bytes(value, to[name])
        return _host_tensor(name, value, to[name])

    if sum(value.nbytes for value in tensors.values()) < _WORTH_THREADS:
        threads = 1
    return {made.name: made for made in ordered_map(convert, tensors.items(), threads)}


def memory_of(sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """By name an array (uint8) of so many bytes, in memory that the system has cleared already."""
    found = _new_memory(sizes)
    for data in found.values():
        data.fill(0)
    return found


def _new_memory(sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """By name an array (uint8). Small ones share a piece of memory: the system gives large pages to large pieces."""
    groups: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if groups[-1] and total + size > _SHARED_BYTES:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += _aligned(size)
    found: dict[str, np.ndarray] = {}
    for group in groups:
        memory, start = np.empty(sum(_aligned(sizes[name]) for name in group), np.uint8), 0
        for name in group:
            found[name] = memory[start : start + sizes[name]]
            start += _aligned(sizes[name])
    return found


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _host_tensor(name: str, value: Tensor | np.ndarray, data: np.ndarray) -> HostTensor:
    dtype = dtype_name(value.dtype) if isinstance(value, Tensor) else value.dtype.name
    return HostTensor(name, dtype, tuple(value.shape), data)


def raw_bytes(value: Tensor | np.ndarray) -> np.ndarray:
    """The values in row-major order as flat uint8, not to be written; of contiguous values on the CPU a view."""
    array = _plain(value)
    if isinstance(array, Tensor):
        return _contiguous_bytes(array).cpu().numpy()
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    flat.flags.writeable = False
    return flat


def copy_bytes(value: Tensor | np.ndarray, to: np.ndarray) -> None:
    """The same into memory: flat uint8 of exactly as many bytes."""
    array = _plain(value)
    if isinstance(array, Tensor):
        torch.from_numpy(to).copy_(_contiguous_bytes(array))
    elif to.size:
        np.copyto(to.view(array.dtype).reshape(array.shape), array)


def _plain(value: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """A numpy array on the values of what is in host memory; what is elsewhere stays a tensor."""
    if isinstance(value, np.ndarray):
        return value
    value = value.detach().resolve_conj().resolve_neg()
    return _as_items(value) if value.device.type == "cpu" else value


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


def _contiguous_bytes(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    start = tensor.storage_offset() * tensor.dtype.itemsize
    return _storage_bytes(tensor)[start : start + tensor.numel() * tensor.dtype.itemsize]


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
