"""Two small codecs that use what the container offers: inputs of both kinds, side data, chunks, a declared bound."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from commcomp.checkpoint.coded import (
    CURRENT,
    PREVIOUS,
    CodedTensor,
    HostTensor,
    Input,
    Reference,
    TensorHeader,
    TreeInfo,
)
from commcomp.checkpoint.dtypes import item_bytes


def decode_xor(
    header: TensorHeader, side: bytes, payload: bytes, start: int, count: int, inputs: Sequence[np.ndarray]
) -> np.ndarray:
    result = np.frombuffer(zlib.decompress(payload), np.uint8) ^ np.frombuffer(side, np.uint8)[0]
    for given in inputs:
        result = result ^ given
    return result


class XorEncoder:
    """XOR with the same tensor of the parent and with the tensor before in the state, where these are as large."""

    def __init__(self, chunk_values: int = 7) -> None:
        self.chunk_values = chunk_values

    def __call__(
        self, tensors: Mapping[str, HostTensor], tree_info: TreeInfo, previous: Reference | None
    ) -> Iterator[CodedTensor]:
        before: HostTensor | None = None
        for tensor in tensors.values():
            width, inputs, data = item_bytes(tensor.dtype), [], tensor.data ^ 85
            given = previous.header(tensor.name) if previous else None
            if given is not None and given.num_bytes == len(tensor.data) and given.dtype == tensor.dtype:
                inputs.append(Input(PREVIOUS, tensor.name))
                data = data ^ previous.read(tensor.name)
            if before is not None and before.dtype == tensor.dtype and len(before.data) == len(tensor.data):
                inputs.append(Input(CURRENT, before.name))
                data = data ^ before.data
            before = tensor
            size = min(self.chunk_values, len(data) // width)
            chunks = [zlib.compress(data[i : i + size * width]) for i in range(0, len(data), max(1, size * width))]
            yield CodedTensor(tensor.name, tensor.dtype, tensor.shape, "xor", {}, tuple(inputs), size, b"\x55", chunks)


def decode_rounded(
    header: TensorHeader, side: bytes, payload: bytes, start: int, count: int, inputs: Sequence[np.ndarray]
) -> np.ndarray:
    steps = np.frombuffer(zlib.decompress(payload), np.int8).astype(np.float32)
    before = inputs[0].view(np.float32) if inputs else np.float32(0)
    return (before + steps * np.float32(header.settings["step"])).astype(np.float32).view(np.uint8)


class RoundingEncoder:
    """float32 as int8 multiples of a step, added to what the parent decodes to; everything else by XorEncoder."""

    step = 1 / 32

    def __call__(
        self, tensors: Mapping[str, HostTensor], tree_info: TreeInfo, previous: Reference | None
    ) -> Iterator[CodedTensor]:
        for tensor in tensors.values():
            if tensor.dtype != "float32" or not len(tensor.data):
                yield from XorEncoder()({tensor.name: tensor}, tree_info, previous)
                continue
            inputs, before = (), np.zeros(len(tensor.data) // 4, np.float32)
            if previous is not None and previous.header(tensor.name) is not None:
                inputs = (Input(PREVIOUS, tensor.name),)
                before = previous.read(tensor.name).view(np.float32)
            values = tensor.data.view(np.float32)
            steps = np.clip(np.rint((values - before) / self.step), -127, 127).astype(np.int8)
            settings, bound = {"step": self.step}, {"absolute": self.step / 2}
            header = TensorHeader(tensor.name, "float32", tensor.shape, "rounded", settings, inputs, len(steps), bound)
            payload = zlib.compress(steps)
            decoded = decode_rounded(header, b"", payload, 0, len(steps), [before.view(np.uint8)] * len(inputs))
            yield CodedTensor(
                tensor.name,
                "float32",
                tensor.shape,
                "rounded",
                settings,
                inputs,
                len(steps),
                b"",
                [payload],
                bound,
                decoded,
            )


DECODERS = {"xor": decode_xor, "rounded": decode_rounded}
