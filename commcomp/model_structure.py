"""What `GradientSync` must know of a model whose gradients are not simply its parameters' `.grad` on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from commcomp.config import Method
from commcomp.saved_form import SavedForm


class ModelStructure(Protocol):
    """What a framework made of a model: FSDP1, FSDP2, DeepSpeed's ZeRO. One is found or given at construction."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """All that are averaged, by name."""

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The ranks over which gradients are averaged in compressed form."""

    @property
    def other_shards(self) -> dist.ProcessGroup | None:
        """The ranks of this replica, where these are not the ones that average."""

    @property
    def device(self) -> torch.device:
        """Where gradients are exchanged."""

    def trainable(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters by name; tensors without values where the model's own do not show their shapes."""

    def optimized(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """What optimizers are given of them."""

    def seen_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the matrix that a method sees."""

    def gradient_dtype(self, name: str) -> torch.dtype:
        """In which the framework reduces a parameter."""

    def scatters(self, name: str) -> bool:
        """Whether the framework would reduce-scatter it over the compressed ranks, and not all-reduce it."""

    def num_owners(self, name: str) -> int:
        """Over how many ranks a parameter's gradient is dealt out; 1 where each needs the whole mean."""

    def cut_inside_rows(self, name: str) -> bool:
        """Whether owners' pieces are no whole rows of the matrix; then its compressed mean goes to all of them."""

    def to_owners(self, name: str, effective: Mapping[str, Method]) -> bool:
        """Whether its values go to the ranks that own them alone, as far as they travel one by one."""

    def saved_form(self, parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> SavedForm:
        """How residuals are saved."""
