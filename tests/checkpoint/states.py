"""States to save, of every kind of content, and what it means that two are the same."""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from commcomp.checkpoint.dtypes import NUMPY_DTYPES, TORCH_DTYPES
from commcomp.checkpoint.host_copy import raw_bytes


def tensor_of_bytes(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A contiguous tensor with exactly these bytes."""
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    storage = torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage()
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, strides)


def random_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bits, so any NaN, infinity, denormal and -0."""
    dtype = TORCH_DTYPES[name]
    data = np.random.default_rng(seed).integers(0, 256, math.prod(shape) * dtype.itemsize, np.uint8)
    return tensor_of_bytes((data & 1 if name == "bool" else data).tobytes(), dtype, shape)


def assert_same(given: Any, loaded: Any) -> None:
    """The same types, structure, order and bits."""
    if isinstance(given, torch.Tensor):
        assert type(loaded) is torch.Tensor and loaded.device.type == "cpu"
        assert (loaded.dtype, loaded.shape) == (given.dtype, given.shape)
        assert raw_bytes(given).tobytes() == raw_bytes(loaded).tobytes()
        return
    assert type(given) is type(loaded)
    if isinstance(given, (np.ndarray, np.generic)):
        assert (given.dtype, given.shape) == (loaded.dtype, loaded.shape) and given.tobytes() == loaded.tobytes()
    elif isinstance(given, dict):
        assert len(given) == len(loaded)
        for (key, value), (other_key, other) in zip(given.items(), loaded.items()):
            assert_same(key, other_key)
            assert_same(value, other)
        assert_same(getattr(given, "__dict__", None), getattr(loaded, "__dict__", None))
    elif isinstance(given, (list, tuple)):
        assert len(given) == len(loaded)
        for value, other in zip(given, loaded):
            assert_same(value, other)
    elif isinstance(given, float):
        assert struct.pack("d", given) == struct.pack("d", loaded)
    elif isinstance(given, complex):
        assert struct.pack("dd", given.real, given.imag) == struct.pack("dd", loaded.real, loaded.imag)
    else:
        assert given == loaded


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    tensor = random_tensor(draw(st.sampled_from(sorted(TORCH_DTYPES))), shape, draw(st.integers(0, 99)))
    form = draw(st.sampled_from(["whole", "transposed", "every second", "expanded", "conjugate"]))
    if form == "transposed":
        return tensor.permute(tuple(reversed(range(tensor.dim()))))
    if form == "every second" and tensor.dim():
        return tensor[1::2] if tensor.shape[0] > 1 else tensor[:0]
    if form == "expanded":
        return tensor.unsqueeze(0).expand(3, *shape)
    if form == "conjugate" and tensor.dtype in (torch.complex64, torch.complex128):
        return tensor.conj()
    return tensor


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    name = draw(st.sampled_from(sorted(NUMPY_DTYPES)))
    data = np.random.default_rng(draw(st.integers(0, 99))).integers(
        0, 2 if name == "bool" else 256, math.prod(shape) * NUMPY_DTYPES[name].itemsize, np.uint8
    )
    array = data.view(NUMPY_DTYPES[name]).reshape(shape)
    return draw(st.sampled_from([array, array.T, array[::-1] if array.ndim else array]))


_floats = st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0])
_scalars = st.sampled_from(sorted(NUMPY_DTYPES)).flatmap(
    lambda name: st.binary(min_size=NUMPY_DTYPES[name].itemsize, max_size=NUMPY_DTYPES[name].itemsize).map(
        lambda data: np.frombuffer(bytes(b & 1 for b in data) if name == "bool" else data, NUMPY_DTYPES[name])[0]
    )
)
_texts = st.text(st.characters(), max_size=8)  # lone surrogates too
plain = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | _floats
    | st.builds(complex, _floats, _floats)
    | _texts
    | st.binary(max_size=8)
    | st.sampled_from(sorted(TORCH_DTYPES)).map(TORCH_DTYPES.__getitem__)
    | st.lists(st.integers(0, 2**40), max_size=4).map(torch.Size)
    | _scalars
)
_keys = _texts | st.integers(-9, 9) | st.tuples(_texts, st.integers(0, 3)) | st.none() | st.booleans()
leaves = plain | tensors() | arrays()
states = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(_keys, inner, max_size=4)
        | st.dictionaries(_keys, inner, max_size=4).map(OrderedDict)
    ),
    max_leaves=12,
)


def training_state(step: int, rows: int = 64) -> dict[str, Any]:
    """Like a model's and its Adam's; every tensor but one differs from step to step."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(rows, 32, generator=generator)
    return {
        "model": OrderedDict(
            [("weight", weight), ("tied", weight), ("bias", torch.full((32,), step, dtype=torch.bfloat16))]
        ),
        "optimizer": {
            "state": {0: {"exp_avg": weight * 0.1, "exp_avg_sq": weight.square(), "step": torch.tensor(float(step))}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}],
        },
        "table": torch.randint(0, 1 << 62, (1000,), generator=torch.Generator().manual_seed(0)),
        "step": step,
    }


def changing_state(step: int) -> dict[str, Any]:
    """A few values of each tensor change from step to step, so that a delta is small."""
    weight = torch.randn(500, generator=torch.Generator().manual_seed(0))
    weight[: step * 3] += 1
    return {"w": weight, "m": weight.flip(0).contiguous(), "b": weight.bfloat16(), "step": step}
