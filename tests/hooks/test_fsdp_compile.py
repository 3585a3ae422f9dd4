"""FSDP2 and HSDP under torch.compile, before and after fully_shard, of blocks and of the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from commcomp import Dense, Quantized
from tests import fsdp_models as m
from tests import fsdp_training as f
from tests.ranks import run_ranks

BACKEND = "aot_eager"


def _blocks_first(parallel: str) -> nn.Module:
    net = f.Net()
    for index, block in enumerate(net.blocks):
        net.blocks[index] = torch.compile(block, backend=BACKEND, fullgraph=True)
    return f.shard(net, parallel)


def _checkpointed_blocks_first(parallel: str) -> nn.Module:
    net = m.wrap_blocks(f.Net(), "NO_REENTRANT")
    for index, block in enumerate(net.blocks):
        net.blocks[index] = torch.compile(block, backend=BACKEND, fullgraph=True)
    return f.shard(net, parallel)


def _blocks_in_place(parallel: str) -> nn.Module:
    net = f.shard(f.Net(), parallel)
    for block in net.blocks:
        block.compile(backend=BACKEND)
    return net


def _whole(parallel: str) -> Any:
    return torch.compile(f.shard(f.Net(), parallel), backend=BACKEND)


CASES: dict[str, Any] = {
    "blocks, then sharded": _blocks_first,
    "checkpointed blocks, then sharded": _checkpointed_blocks_first,
    "sharded, then blocks": _blocks_in_place,
    "sharded, then the whole": _whole,
}


def _compiled(rank: int, parallel: str, what: str) -> list[float]:
    """The distance from torch's gradients without compiling for Dense and 8 bits; what those 8 bits lose."""
    plain, _ = f.wrap(parallel)
    true, found = f.train(plain, rank, 0, 1), []
    for method in (Dense(), Quantized(block=16)):
        model = CASES[what](parallel)
        state = f.hook(model, method)
        assert state.parameters.keys() == dict(f.Net().named_parameters()).keys()
        seen = f.train(model, rank, 0, 1)
        found.append(max(map(f.difference, seen, true)))
    return [*found, f.conservation_error(seen, state, true)]


# Of HSDP one is enough: what differs between the layouts comes after the compiled code.
@pytest.mark.parametrize(
    ("parallel", "num_ranks", "what"), [*(("fsdp2", 2, what) for what in CASES), ("hsdp", 4, "blocks, then sharded")]
)
def test_compiled_models_have_the_gradients_of_torch(parallel, num_ranks, what):
    for dense, eight, lost in run_ranks(_compiled, num_ranks, parallel, what, timeout=180):
        assert dense < 1e-5 and eight < 0.02 and lost < 2e-5
