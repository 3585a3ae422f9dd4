"""FSDP2 and HSDP with models as users build them: the gradients of torch without a hook, and nothing gets lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from commcomp import Dense, GradientSync, LowRank, Quantized
from tests import fsdp_models as m
from tests import fsdp_training as f
from tests.ranks import run_ranks

EIGHT = Quantized(block=16)
LAYOUTS = pytest.mark.parametrize(("parallel", "num_ranks"), [("fsdp2", 2), ("hsdp", 4)])
EXACT = {"dense": (Dense(), 1e-6), "full rank": (LowRank(rank=64, min_ratio=0), 1e-4)}


# How a model was built and what is checkpointed matters before the replicas come in.
OF_REPLICAS = ("tied", "used twice", "in chunks", "blocks alone", "partly frozen", "odd sizes", "REENTRANT outside")


def _against_torch(rank: int, parallel: str, builders: str) -> dict[str, str]:
    """By model: what is off, or nothing."""
    chosen = {what: build for what, build in getattr(m, builders).items() if parallel != "hsdp" or what in OF_REPLICAS}
    return {what: _differences(rank, parallel, build) for what, build in chosen.items()}


def _differences(rank: int, parallel: str, build: Any) -> str:
    plain, off = f.train(build(parallel), rank, 0, 1, 2), []
    for what, (method, bound) in EXACT.items():
        model = build(parallel)
        state = f.hook(model, method, strict=False)
        error = max(map(f.difference, f.train(model, rank, 0, 1, 2), plain))
        off += [f"{what}: {error}"] if error > bound else []
        off += [f"{what}: {state.step} steps"] if state.step != 3 else []
        named = {f.plain_name(name) for name, value in model.named_parameters() if value.requires_grad}
        off += [f"{what}: {sorted(state.parameters)}"] if state.parameters.keys() != named else []
    for lossy in (EIGHT, *([LowRank(rank=2, min_ratio=0)] if build is m.BUILDERS["used twice"] else [])):
        model = build(parallel)
        state = f.hook(model, lossy)
        seen = f.train(model, rank, 0, 1, 2)
        lost = f.conservation_error(seen, state, plain)
        off += [f"{lossy.method} lost {lost}"] if lost > 2e-5 else []
        error = max(map(_difference_of_all, seen, plain))
        off += [f"{lossy.method}: {error}"] if lossy is EIGHT and not 0 < error < 0.02 else []
    return "; ".join(off)


def _difference_of_all(left: f.Gradients, right: f.Gradients) -> float:
    """Over all parameters together: a block of 16 values may hold a small one's and a large one's."""
    everything = [torch.cat([side[name].flatten() for name in right]) for side in (left, right)]
    return float((everything[0] - everything[1]).norm() / everything[1].norm())


@LAYOUTS
def test_models_have_the_gradients_of_torch(parallel, num_ranks):
    for found in run_ranks(_against_torch, num_ranks, parallel, "BUILDERS", timeout=120):
        assert not any(found.values()), found


@LAYOUTS
def test_checkpointed_models_have_the_gradients_of_torch_in_one_step(parallel, num_ranks):
    for found in run_ranks(_against_torch, num_ranks, parallel, "CHECKPOINTED", timeout=120):
        assert not any(found.values()), found


def _skip(rank: int, parallel: str) -> dict[str, str]:
    """By what is left out in the second of three steps: what is off."""
    found = {}
    for what, ranks in {"some": (0, 1, 2, 3), "some on one rank": (1,), "block": (0, 1, 2, 3)}.items():
        def train(method: Any, what: str = what, ranks: tuple[int, ...] = ranks) -> tuple[list[f.Gradients], Any]:
            model, state = f.wrap(parallel, method, model=m.Skipping())
            for module in model.modules():
                if method is None and hasattr(module, "set_reduce_scatter_unused_params"):
                    module.set_reduce_scatter_unused_params(True)
            seen = []
            for step in range(3):
                model.skip = what.split()[0] if step == 1 and rank in ranks else None
                seen += f.train(model, rank, step)
            return seen, state

        plain, _ = train(None)
        exact, _ = train(Dense())
        lossy, state = train(EIGHT)
        error, lost = max(map(f.difference, exact, plain)), f.conservation_error(lossy, state, plain)
        found[what] = f"{error}, lost {lost}" if error > 1e-6 or lost > 2e-5 else ""
    return found


@LAYOUTS
def test_what_has_no_gradient_in_a_step_counts_as_zero(parallel, num_ranks):
    for found in run_ranks(_skip, num_ranks, parallel):
        assert not any(found.values()), found


def _thaw(rank: int, parallel: str, method: Any, frozen_at_first: bool, strict: bool) -> list[f.Gradients]:
    """Steps with all of a block trained, frozen, trained again; or frozen before the hook was there."""
    net, seen = f.Net(), []
    net.blocks[1].requires_grad_(not frozen_at_first)
    model, _ = f.wrap(parallel, method, model=net, **({} if method is None else {"strict": strict}))
    for step, trained in enumerate((not frozen_at_first, False, True)):
        net.blocks[1].requires_grad_(trained)
        seen += f.train(model, rank, step)
    return seen


def _thaw_all(rank: int, parallel: str) -> tuple[float, float, str]:
    afterwards = map(f.difference, *(_thaw(rank, parallel, method, False, True) for method in (Dense(), None)))
    before = map(f.difference, *(_thaw(rank, parallel, method, True, False) for method in (Dense(), None)))
    try:
        _thaw(rank, parallel, EIGHT, True, True)
        text = "accepted"
    except RuntimeError as error:
        text = str(error)
    return max(afterwards), max(before), text


@LAYOUTS
def test_whole_groups_may_be_frozen_and_trained_again_and_nothing_goes_uncompressed_silently(parallel, num_ranks):
    for afterwards, before, text in run_ranks(_thaw_all, num_ranks, parallel):
        assert afterwards < 1e-6 and before < 1e-6
        assert "'blocks.1'" in text and "frozen when GradientSync was constructed" in text and "strict=False" in text


def _torn_apart(rank: int, parallel: str) -> list[str]:
    """What the hook, and torch itself, say of a parameter that two groups hold, and of a scalar."""
    model, mesh, texts = m.Tied(), f.mesh_of(parallel), []
    for part in (model.embedding, model.head, model):
        fully_shard(part, mesh=mesh)
    scalar = f.Net()
    scalar.gain = torch.nn.Parameter(torch.ones(()))
    for attempt in (
        lambda: GradientSync(model, EIGHT), lambda: model(f.inputs(rank, 0)), lambda: f.shard(scalar, parallel)
    ):
        try:
            attempt()
            texts.append("accepted")
        except ValueError as error:
            texts.append(str(error))
    return texts


@LAYOUTS
def test_a_parameter_of_two_groups_is_refused_and_torch_takes_no_scalar(parallel, num_ranks):
    for ours, torchs_own, scalar in run_ranks(_torn_apart, num_ranks, parallel):
        assert "'head.weight'" in ours and "'embedding.weight'" in ours and "fully_shard([" in ours, ours
        assert "shared" in torchs_own and "scalar" in scalar
