"""How tokens are sent in one pass, which all ranks must do alike."""

from __future__ import annotations

import zlib
from typing import Any

import torch.distributed as dist
from torch import Tensor

from commcomp.exchange.agreement import require_agreement
from commcomp.moe.compressor import TokenCompressor

_REMEDY = "give every rank the same layers, settings and dtypes, and put all in training or all in evaluation"
_agreed: set[tuple[str, int]] = set()
"""Groups, by their names, and numbers of experts that ranks have found to be the same."""


class Terms:
    """What decides which bytes a pass sends."""

    def __init__(
        self, rows: Tensor, num_experts: int, compressor: TokenCompressor | None, group: dist.ProcessGroup | None
    ) -> None:
        self.compressor, self.group = compressor, group
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self._device = rows.device
        self._facts: dict[str, Any] = {
            "number of experts": num_experts,
            "width of a token's row": rows.shape[1],
            "dtype of rows": str(rows.dtype),
            "whether tokens are compressed now": compressor is not None and compressor.active,
            "settings of the TokenCompressor": compressor and repr((compressor.lsh, compressor.quantized)),
        }
        self.fingerprint = zlib.crc32(repr(self._facts).encode())

    def agree_at_first(self) -> None:
        """A collective the first time that so many experts are met: messages of other lengths would end the process."""
        key = ("" if self.group is None else self.group.group_name, self._facts["number of experts"])
        if key not in _agreed:
            self.agree()
            _agreed.add(key)

    def agree(self) -> None:
        """A collective. Raises ValueError on every rank, naming what differs, unless all do alike."""
        if self.group is not None:
            require_agreement(self._facts, self.group, self._device, remedy=_REMEDY)
