"""How tokens are sent in one pass, which all ranks must do alike."""

from __future__ import annotations

import zlib
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from commcomp.exchange.agreement import require_agreement
from commcomp.moe.compressor import TokenCompressor

_REMEDY = (
    "give every rank the same layers, settings and dtypes, put all in training or all in evaluation, and load a state "
    "dict on all of them or on none"
)
_agreed: WeakKeyDictionary[dist.ProcessGroup, set[int]] = WeakKeyDictionary()
"""Numbers of experts that ranks have found to be the same, by group: a later group may have the same name."""


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
            "training passes of the TokenCompressor": compressor and compressor.learnt.passes,
            "whether rows require gradients": rows.requires_grad and torch.is_grad_enabled(),
            "whether gradients are recorded": torch.is_grad_enabled(),
        }
        self.fingerprint = zlib.crc32(repr(self._facts).encode())

    def agree_at_first(self) -> None:
        """A collective the first time that so many experts are met: messages of other lengths would end the process."""
        if self.group is None:
            return
        agreed = _agreed.setdefault(self.group, set())
        if (number := self._facts["number of experts"]) not in agreed:
            self.agree()
            agreed.add(number)

    def agree(self) -> None:
        """A collective. Raises ValueError on every rank, naming what differs, unless all do alike."""
        if self.group is not None:
            require_agreement(self._facts, self.group, self._device, remedy=_REMEDY)
