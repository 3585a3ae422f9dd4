"""What tests of DeepSpeed's MoE layers look at, made in one run of ranks: importing DeepSpeed takes seconds."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from commcomp.moe import LSH, MoEConfig, Quantized, compressing
from tests.deepspeed.moe_training import (
    BATCH,
    EXPERTS,
    LENGTH,
    WIDTH,
    Model,
    engine_of,
    start,
    tokens_of,
    train,
    weights_of,
)
from tests.moe.layers import RowByRow, lsh, ready
from tests.test_readme import code_blocks

WHOLE, INT8 = MoEConfig(), MoEConfig(quantized=Quantized(dtype="int8"))
INT4_BACK = MoEConfig(quantized=Quantized(dtype="fp32", backward_dtype="int4"))
HALF = MoEConfig(lsh=LSH(rate=0.5), quantized=Quantized(dtype="int8"))
STAGES = [(0, 1), (1, 2), (2, 1)]
"""ZeRO stage and choices of a token."""
STEPS = 48


def _attach(engine: nn.Module, config: MoEConfig, strict: bool = True) -> Any:
    from commcomp.deepspeed.moe import attach_moe

    return attach_moe(engine, config, strict=strict)


def _trained(config: MoEConfig | None, stage: int, steps: int, **settings: Any) -> Any:
    """Losses, weights and stats."""
    bf16 = settings.pop("bf16", False)
    engine = engine_of(Model(**settings), stage, bf16=bf16)
    traffic = _attach(engine, config) if config is not None else None
    return train(engine, steps), weights_of(engine), traffic and traffic.stats()


def _equal_to_plain() -> Any:
    return {(stage, k): [_trained(one, stage, 4, k=k)[:2] for one in (None, WHOLE)] for stage, k in STAGES}


def _compressed() -> Any:
    return [_trained(config, 0, STEPS, k=2) for config in (None, INT8, HALF)]


def _first_step() -> Any:
    """What one step changes: weights after it, of each, less those before."""
    before = weights_of(engine_of(Model(k=2), 1))
    after = [_trained(config, 1, 1, k=2)[1] for config in (None, INT8, INT4_BACK)]
    return [torch.cat([(one - old).flatten() for one, old in zip(of_one, before, strict=True)]) for of_one in after]


def _idle_experts() -> Any:
    """All tokens choose the first expert, which takes a quarter of them, or all."""
    made = []
    for config in (None, WHOLE, HALF):
        for drop_tokens in (True, False):
            model = Model(drop_tokens=drop_tokens)
            nn.init.zeros_(model.moe_layers()[0].gate.wg.weight)
            engine = engine_of(model, 1)
            if config is not None:
                _attach(engine, config)
            made.append(train(engine, 3))
    return made


def _in_bf16() -> Any:
    return [_trained(config, 1, 8, k=2, bf16=True) for config in (None, WHOLE, INT8)]


def _recomputed() -> Any:
    return [_trained(HALF, 0, 8, k=2, recompute=recompute)[0] for recompute in (False, True)]


def _counted() -> Any:
    """Bytes of one step, and what they come to by the gate's numbers."""
    engine = engine_of(Model(), 0)
    traffic = _attach(engine, WHOLE)
    train(engine, 1)
    (layer,) = engine.module.moe_layers()
    capacity = int(1.25 * BATCH * LENGTH / EXPERTS)
    kept = layer.exp_counts.clamp(max=capacity)
    everyone = [torch.empty_like(kept) for _ in range(2)]
    dist.all_gather(everyone, kept)
    rank = dist.get_rank()
    away, home = everyone[rank].view(2, -1)[1 - rank].sum(), everyone[1 - rank].view(2, -1)[rank].sum()
    counts = 8 * (EXPERTS // 2 + 4)
    return traffic.stats(), 2 * 4 * WIDTH * int(away + home) + counts, 4 * 4 * WIDTH * EXPERTS * capacity // 2


def _evaluated() -> Any:
    """What two engines with equal weights make, of which one has been trained with clusters of tokens."""
    compressed, plain = (engine_of(Model(k=2), 0) for _ in range(2))
    traffic = _attach(compressed, HALF)
    train(compressed, 6)
    plain.module.load_state_dict(compressed.module.state_dict(), strict=False)
    stats = [traffic.stats()]
    made = []
    for engine in (plain, compressed):
        engine.eval()
        torch.manual_seed(7)
        with torch.no_grad():
            made.append(engine(tokens_of(0))[0])
    stats.append(traffic.stats())
    with torch.no_grad(), compressing(compressed.module):
        torch.manual_seed(7)
        made.append(compressed(tokens_of(0))[0])
    return made, [*stats, traffic.stats()]


def _two_engines() -> Any:
    """One compressed and one not, step by step in turn, and each alone."""
    alone = [_trained(config, 0, 4, layers=2)[0] for config in (HALF, None)]
    compressed, plain = (engine_of(Model(layers=2), 0) for _ in range(2))
    traffic = _attach(compressed, HALF)
    in_turn: list[list[float]] = [[], []]
    for step in range(4):
        for losses, engine in zip(in_turn, (compressed, plain), strict=True):
            losses += train(engine, 1, step)
    return alone, in_turn, traffic.stats()["layers"]


def _repeated() -> Any:
    engine = engine_of(Model(), 0)
    first = _attach(engine, HALF)
    before = train(engine, 3)
    again = _attach(engine, HALF)
    same = again.compressors == first.compressors and again.stats() == first.stats()
    with pytest.raises(ValueError, match=r"its tokens are sent by MoEConfig.*attach once, or with equal settings"):
        _attach(engine, INT8)
    with pytest.warns(UserWarning, match="attach once"):
        assert _attach(engine, INT8, strict=False) is None
    return same, before + train(engine, 3, 3), _trained(HALF, 0, 6)[0]


def _resumed(stage: int) -> Any:
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    engine = engine_of(Model(k=2), stage)
    traffic = _attach(engine, HALF)
    train(engine, 5)
    engine.save_checkpoint(folder[0])
    expected = train(engine, 4, 5)
    resumed = engine_of(Model(k=2), stage)
    other = _attach(resumed, HALF)
    resumed.load_checkpoint(folder[0])
    found = train(resumed, 4, 5)
    states = [[one.get_extra_state() for one in made.compressors.values()] for made in (traffic, other)]
    return expected, found, states


def _resumed_from_plain() -> Any:
    """Losses after a checkpoint of a run without compression was loaded, and warnings of it."""
    plain, engine = (engine_of(Model(), 0) for _ in range(2))
    train(plain, 2)
    _attach(engine, HALF)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.module.load_state_dict(plain.module.state_dict())
    return train(engine, 2, 2), train(plain, 2, 2), [str(one.message) for one in caught]


def _changed_later_tokens(k: int) -> Any:
    """Answers for the same tokens but for the last third of the last sequence: equal before that?"""
    torch.manual_seed(0)
    model = Model(k=k, drop_tokens=False, top2_2nd_expert_sampling=False, use_rts=False)
    (layer,) = model.moe_layers()
    layer.experts.deepspeed_experts = nn.ModuleList(RowByRow(WIDTH) for _ in range(EXPERTS // 2))
    engine = engine_of(model, 0)
    traffic = _attach(engine, MoEConfig(lsh=lsh()))
    (compressor,) = traffic.compressors.values()
    engine.eval()
    first = LENGTH // 3
    equal, joined = [], 0
    for seed in range(12):
        tokens = tokens_of(seed)
        other = tokens.clone()
        other[-1, first:] = tokens_of(seed + 1)[-1, first:]
        made = []
        for one in (tokens, other):
            ready(compressor, EXPERTS, WIDTH)
            with torch.no_grad(), compressing(engine):
                made.append(engine.module.blocks[0](one)[0])
        plain = engine.module.blocks[0](tokens)[0]
        joined += int((plain != made[0]).any(-1).sum())
        one, other = (torch.cat((both[:-1].flatten(), both[-1, :first].flatten())) for both in made)
        equal.append(torch.equal(one, other))
    return equal, joined


def _refusals() -> None:
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    def refused(model: nn.Module, message: str, config: MoEConfig = INT8) -> None:
        with pytest.raises(ValueError, match=message):
            _attach(model, config)
        with pytest.warns(UserWarning, match=message):
            assert _attach(model, config, strict=False) is None

    refused(Model(), "has no process group yet; attach after deepspeed.initialize")
    refused(nn.Linear(2, 2), "the model has no deepspeed.moe.layer.MoE")
    model = Model()
    engine = engine_of(model, 0)
    model.moe_layers()[0].use_tutel = True  # as the layer sets it where Tutel is installed
    refused(engine, r"blocks.0.deepspeed_moe: it uses Tutel.*use_tutel=False")
    split = engine_of(Model(enable_expert_tensor_parallelism=True), 0)
    refused(split, r"experts are tensor-parallel; .*enable_expert_tensor_parallelism=False")
    own = engine_of(Model(), 0)
    own.module.moe_layers()[0].forward = own.module.moe_layers()[0].forward
    refused(own, "it has a forward pass of its own")
    gate = engine_of(Model(), 0)
    gate.module.moe_layers()[0].gate = nn.Linear(WIDTH, EXPERTS)
    refused(gate, r"its gate is Linear; expected deepspeed\.moe\.sharded_moe\.TopKGate")
    automatic = AutoEPMoELayer.__new__(AutoEPMoELayer)  # made by DeepSpeed from a model of transformers
    nn.Module.__init__(automatic)
    refused(nn.Sequential(automatic), r"it is AutoEP's \(expert_parallel in ds_config\)")
    with pytest.warns(UserWarning, match="every MoE layer has ep_size 1"):
        assert _attach(engine_of(Model(ep_size=1), 0), INT8) is None
    differing = MoEConfig(quantized=Quantized(dtype=("int8", "int4")[dist.get_rank()]))
    with pytest.raises(ValueError, match=r"ranks disagree on moe settings: rank 0 has .*give every rank"):
        _attach(engine_of(Model(), 0), differing)


def _what_is_lacking() -> list[str | None]:
    from deepspeed.moe import sharded_moe

    from commcomp.deepspeed import moe

    engine = engine_of(Model(), 0)
    found = [moe._what_is_missing()]
    theirs = sharded_moe._AllToAll
    del sharded_moe._AllToAll
    try:
        found.append(moe._what_is_missing())
        with pytest.raises(RuntimeError, match=r"no deepspeed\.moe\.sharded_moe\._AllToAll"):
            _attach(engine, INT8)
    finally:
        sharded_moe._AllToAll = theirs
    return found


def _page() -> float:
    (block,), (snippet,) = (code_blocks("docs/deepspeed_moe.md", language) for language in ("json", "python"))
    scope = {"engine": engine_of(Model(), 1), "ds_config": json.loads(block)}
    exec(compile(snippet, "deepspeed_moe", "exec"), scope)
    train(scope["engine"], 2)
    return scope["traffic"].stats()["ratio"]


CASES: dict[str, Callable[[], Any]] = {
    "equal": _equal_to_plain,
    "compressed": _compressed,
    "first step": _first_step,
    "idle": _idle_experts,
    "bf16": _in_bf16,
    "recomputed": _recomputed,
    "counted": _counted,
    "evaluated": _evaluated,
    "two engines": _two_engines,
    "repeated": _repeated,
    "resumed 0": partial(_resumed, 0),
    "resumed 1": partial(_resumed, 1),
    "from plain": _resumed_from_plain,
    "later 1": partial(_changed_later_tokens, 1),
    "later 2": partial(_changed_later_tokens, 2),
    "later 3": partial(_changed_later_tokens, 3),
    "refusals": _refusals,
    "lacking": _what_is_lacking,
    "page": _page,
}


def all_cases(rank: int) -> dict[str, Any]:
    start()
    return {name: case() for name, case in CASES.items()}


def in_pairs(rank: int) -> Any:
    """Four ranks, whose pairs have all experts."""
    start()
    return [_trained(config, 1, 4, k=2)[:3:2] for config in (None, WHOLE, HALF)]
