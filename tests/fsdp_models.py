"""Models as users build and wrap them for FSDP2: tied, checkpointed, nested, grouped, of odd sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from tests import fsdp_training as f

VOCABULARY = 11


class Tied(f.Net):
    """A head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, f.WIDTH)
        self.head = nn.Linear(f.WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(self.embedding(values.mul(10).long().remainder(VOCABULARY)[:, 0]))


class UsedTwice(f.Net):
    """The first block is the last one too."""

    def forward(self, values: Tensor) -> Tensor:
        for block in (*self.blocks, self.blocks[0]):
            values = block(values)
        return self.head(values)


class InChunks(f.Net):
    """The last block and the head are one group, and the head runs on two halves."""

    @property
    def parts(self) -> list[Any]:
        return [self.blocks[0], self.blocks[1], [self.head, self.blocks[2]]]

    def forward(self, values: Tensor) -> Tensor:
        for block in self.blocks:
            values = block(values)
        return torch.cat([self.head(half) for half in values.split(3)])


class ThreeDeep(f.Net):
    """fully_shard inside fully_shard inside fully_shard."""

    @property
    def parts(self) -> list[Any]:
        return [part for block in self.blocks for part in (block.mix, block.wide, block)]


class BlocksAlone(f.Net):
    """The head is frozen and belongs to no group: every block is a root of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head.requires_grad_(False)


class PartlyFrozen(f.Net):
    """As with adapters: of every group something is trained and something is not."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.wide.requires_grad_(False)
        self.head.bias.requires_grad_(False)


class OddSizes(f.Net):
    """First dimensions of one and of primes. Empty parameters and scalars torch takes neither."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.ModuleList([nn.Linear(f.WIDTH, 1), nn.Linear(1, 7), nn.Linear(7, 13), nn.Linear(13, f.WIDTH)])
        self.row, self.pair = nn.Parameter(torch.randn(1, f.WIDTH)), nn.Parameter(torch.randn(2, 3, f.WIDTH))

    def forward(self, values: Tensor) -> Tensor:
        inner = values
        for layer in self.narrow:
            inner = layer(inner)
        return super().forward(values + inner + self.row + self.pair.sum((0, 1)))


class Skipping(f.Net):
    """May leave out some parameters of a block, or a whole block."""

    skip: str | None = None

    def forward(self, values: Tensor) -> Tensor:
        first, second, last = self.blocks
        values = last(first(values)) if self.skip == "block" else last(second(first(values)))
        return values[:, :5] + 0 * self.head.bias if self.skip == "some" else self.head(values)


class Checkpointed(f.Net):
    """Blocks called by torch.utils.checkpoint."""

    reentrant = False

    def forward(self, values: Tensor) -> Tensor:
        values = values.detach().requires_grad_()  # else reentrant checkpoints have no gradients in plain torch either
        for block in self.blocks:
            values = checkpoint(block, values, use_reentrant=self.reentrant)
        return self.head(values)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class WithGradients(f.Net):
    """Its blocks' inputs want gradients, as reentrant checkpoints need it."""

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values.detach().requires_grad_())


def wrap_blocks(net: f.Net, how: str) -> Any:
    """Every block in a checkpoint_wrapper."""
    for index, block in enumerate(net.blocks):
        net.blocks[index] = checkpoint_wrapper(block, CheckpointImpl[how])
    return net


def blocks_alone(parallel: str) -> nn.Module:
    net, mesh = BlocksAlone(), f.mesh_of(parallel)
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return net


def materialised(parallel: str, *, assign: bool) -> nn.Module:
    """Built on the meta device and filled after fully_shard."""
    with torch.device("meta"):
        net = f.Net()
    f.shard(net, parallel)
    whole = f.shard(f.Net(), parallel).state_dict() if assign else f.Net().state_dict()
    if assign:
        net.load_state_dict(whole, assign=True)
    else:
        net.to_empty(device="cpu")
        set_model_state_dict(net, whole, options=StateDictOptions(full_state_dict=True))
    return net


def after_evaluation(parallel: str) -> nn.Module:
    """Whose root is still gathered from a forward pass."""
    net = f.shard(f.Net(), parallel)
    with torch.no_grad():
        net(f.inputs(0, 0))
    return net


BUILDERS: dict[str, Any] = {
    "tied": lambda parallel: f.shard(Tied(), parallel),
    "used twice": lambda parallel: f.shard(UsedTwice(), parallel),
    "in chunks": lambda parallel: f.shard(InChunks(), parallel),
    "three deep": lambda parallel: f.shard(ThreeDeep(), parallel),
    "blocks alone": blocks_alone,
    "partly frozen": lambda parallel: f.shard(PartlyFrozen(), parallel),
    "odd sizes": lambda parallel: f.shard(OddSizes(), parallel),
    "materialised": lambda parallel: materialised(parallel, assign=False),
    "assigned": lambda parallel: materialised(parallel, assign=True),
    "after evaluation": after_evaluation,
}
CHECKPOINTED: dict[str, Any] = {
    "called": lambda parallel: f.shard(Checkpointed(), parallel),
    "called, reentrant": lambda parallel: f.shard(CheckpointedReentrant(), parallel),
    **{
        f"{how} inside": lambda parallel, how=how: f.shard(wrap_blocks(WithGradients(), how), parallel)
        for how in ("NO_REENTRANT", "REENTRANT")
    },
    **{
        f"{how} outside": lambda parallel, how=how: wrap_blocks(f.shard(WithGradients(), parallel), how)
        for how in ("NO_REENTRANT", "REENTRANT")
    },
}
