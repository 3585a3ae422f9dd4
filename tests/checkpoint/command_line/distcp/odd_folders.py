"""Small folders of torch.distributed.checkpoint with all that a state may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.checkpoint.command_line.files import bytes_below, run

NAME = "__0_0.distcp"


class Own:
    """Something that only pickle can save."""


def odd_state() -> dict[str, Any]:
    values = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    four = {"float4": torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}
    return {
        **{"fp32": values, "bf16": values.bfloat16(), "fp8": values.to(torch.float8_e4m3fn), "fp16": values.half()},
        **{"int64": torch.arange(5), "uint16": torch.arange(4).to(torch.uint16), "bool": values > 0},
        **{"complex": torch.complex(values, -values), "conjugate": torch.complex(values, values).conj()},
        **{"none": torch.empty(0, 3), "scalar": torch.tensor(2.5), "one": torch.ones(1, 1, 3), **four},
        **{"columns": values.t(), "part": values[1:3, ::2], "expanded": values[:1].expand(4, 8)},
        **{"channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)},
        **{"negative": torch.complex(values, values).conj().imag, "parameter": torch.nn.Parameter(values[0])},
        **{"text": "übung", "set": {1, 2}, "own": [Own, 3.0], "list": [1, None], "empty": {}, "nested": {"a/b.c": 1}},
    }


def saved(folder: Path, state: dict[str, Any] | None = None) -> Path:
    dcp.save(odd_state() if state is None else state, checkpoint_id=folder, no_dist=True)
    return folder / NAME


def require_copied(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Pack a folder of which nothing can be packed; what was said."""
    run("pack", folder, folder.parent / "packed")
    said = capsys.readouterr().err
    assert bytes_below(folder.parent / "packed") == bytes_below(folder)
    assert f"{NAME}: copied as it is" in said
    return said
