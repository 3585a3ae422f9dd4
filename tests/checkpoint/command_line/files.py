"""Real files to pack: of safetensors by an own writer, of torch by torch.save."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from commcomp.checkpoint.command_line.main import main
from tests.checkpoint.codec.training import Training

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL", torch.float16: "F16"}


def run(*arguments: object, expect: int = 0) -> None:
    """One command in this process."""
    assert main(["ckpt", *map(str, arguments)]) == expect


def bytes_below(folder: Path) -> dict[str, bytes | None]:
    """By relative path what each file of a folder holds; folders are there with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, pad: int = 0
) -> None:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        data += raw
    text = json.dumps(header, ensure_ascii=False).encode() + b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensors(seed: int, change: float = 0.0) -> dict[str, torch.Tensor]:
    """Weights of a model; those of the same seed differ by `change`."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(200, 150, generator=generator)
    weight += change * 1e-3 * torch.randn(200, 150, generator=torch.Generator().manual_seed(99))
    return {
        "layers.0.weight": weight.bfloat16(),
        "layers.1.weight": weight * 0.1,
        "größe": torch.arange(7),
        "scalar": torch.tensor(change),
        "none": torch.empty(0, 3),
        "mask": torch.tensor([True, False, True]),
    }


def trained(steps: int) -> dict[str, Any]:
    """A state of weights and Adam's moments."""
    training = Training()
    training.step(steps)
    return training.state()


def model_folder(folder: Path, change: float, steps: int) -> None:
    """Like one from Hugging Face, with an optimizer beside it."""
    (folder / "nested" / "empty").mkdir(parents=True)
    write_safetensors(folder / "model-00001-of-00002.safetensors", tensors(0, change), {"format": "pt"}, pad=3)
    write_safetensors(folder / "nested" / "model.safetensors", tensors(1, change))
    (folder / "config.json").write_text('{"hidden": 1}\n')
    (folder / "nested" / "tokens.txt").write_bytes(bytes(range(256)))
    (folder / "training_args.bin").write_bytes(b"no checkpoint at all")
    (folder / "broken.safetensors").write_bytes(b"\xff" * 40)
    torch.save(trained(steps), folder / "optimizer.pt")
