"""A small network that is trained by a real optimizer, as a source of states."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Training:
    """Matrices of several shapes, a tied one, vectors, and an embedding used in part."""

    def __init__(self, optimizer: str = "AdamW", dtype: torch.dtype = torch.float32, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleDict(
            {
                "embedding": nn.Embedding(120, 48),
                "wide": nn.Linear(48, 160),
                "narrow": nn.Linear(160, 48),
                "norm": nn.LayerNorm(48),
                "head": nn.Linear(48, 120, bias=False),
            }
        ).to(dtype)
        self.model["head"].weight = self.model["embedding"].weight
        parameters = [
            {"params": [p for p in self.model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in self.model.parameters() if p.dim() == 1]},
        ]
        self.optimizer = getattr(torch.optim, optimizer)(parameters, lr=3e-3, **options)
        self.generator = torch.Generator().manual_seed(1)

    def step(self, count: int) -> float:
        """Train so many steps; the last loss."""
        loss = torch.zeros(())
        for _ in range(count):
            tokens = torch.randint(0, 90, (64,), generator=self.generator)
            hidden = self.model["embedding"](tokens)
            hidden = self.model["norm"](hidden + self.model["narrow"](torch.tanh(self.model["wide"](hidden))))
            loss = nn.functional.cross_entropy(self.model["head"](hidden).float(), (tokens * 7 + 3) % 90)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        """As a script would save it."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "note": "text"}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
