"""The element types that a snapshot can hold, by their torch name without "torch."."""

from __future__ import annotations

import numpy as np
import torch

_TORCH_NAMES = """
    bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex32 complex64
    complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 bits8 bits16
    bits1x8 bits2x4 bits4x2 uint1 uint2 uint3 uint4 uint5 uint6 uint7 int1 int2 int3 int4 int5 int6 int7
"""

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in _TORCH_NAMES.split() if hasattr(torch, name)
}

# Those that a numpy array or scalar may have; longdouble is left out, since it differs between machines.
_NUMPY_NAMES = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64 complex64 complex128"
NUMPY_DTYPES: dict[str, np.dtype] = {name: np.dtype(name) for name in _NUMPY_NAMES.split()}


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def item_bytes(name: str) -> int:
    """Bytes of one value. Raises ValueError naming a dtype that this version does not know."""
    if name not in TORCH_DTYPES:
        raise ValueError(f"unknown dtype {name[:40]!r}; this torch has {', '.join(TORCH_DTYPES)}")
    return TORCH_DTYPES[name].itemsize
