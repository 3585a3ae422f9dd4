"""A small network under DDP, FSDP2 or alone, trained by Adam, and its state as it goes into a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

WIDTH = 40  # 4 ranks have equal rows of it, and none of 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(101, WIDTH)  # uneven shards
        self.wide = nn.Linear(WIDTH, 4 * WIDTH)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH)
        self.few = nn.Parameter(torch.randn(3, WIDTH))  # of 4 ranks one has nothing
        self.head = nn.Linear(WIDTH, 101, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens) + self.few.sum(0)
        return self.head(hidden + self.narrow(torch.tanh(self.wide(hidden))))


class Training:
    def __init__(self, kind: str, *, flat: bool = False) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Net()
        if kind == "fsdp":
            fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        elif kind == "ddp":
            self.model = nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95))
        self.steps, self.flat = 0, flat

    def train(self, to_step: int) -> None:
        while self.steps < to_step:
            tokens = torch.randint(0, 101, (32,), generator=torch.Generator().manual_seed(self.steps))
            loss = nn.functional.cross_entropy(self.model(tokens), (tokens * 7 + 3) % 101)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.steps += 1

    def state(self) -> dict[str, Any]:
        """With items of several kinds beside the tensors."""
        options = StateDictOptions(flatten_optimizer_state_dict=self.flat)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        extra = {"text": "übung", "numbers": [1, 2.5, None], "seed": 7, "wide": torch.arange(6).reshape(2, 3)}
        return {"model": model, "optim": optimizer, "extra": extra, "step": self.steps}


def whole(state: dict[str, Any], path: str = "") -> dict[str, Any]:
    """By name, the raw bytes of every tensor, whole, and every other value."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        name = f"{path}{key}"
        if isinstance(value, dict):
            found.update(whole(value, f"{name}."))
        elif isinstance(value, Tensor):
            value = value.full_tensor() if isinstance(value, DTensor) else value
            found[name] = value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        else:
            found[name] = value
    return found


def emptied(state: dict[str, Any]) -> dict[str, Any]:
    """A state to load into, with other values."""
    for value in state.values():
        if isinstance(value, dict):
            emptied(value)
        elif isinstance(value, Tensor):
            (value.to_local() if isinstance(value, DTensor) else value).detach().fill_(1)
    plain = [key for key in ("text", "numbers", "seed", "step") if not isinstance(state.get(key), (Tensor, type(None)))]
    state.update(dict.fromkeys(plain, -1))
    return state
