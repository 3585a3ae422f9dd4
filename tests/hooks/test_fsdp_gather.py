"""Compressed parameter all-gathers: what the passes see, what stays exact, bytes, and training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from torch.distributed.tensor import distribute_tensor

import commcomp
from commcomp import Quantized
from commcomp.compressors import native
from tests import fsdp_training as f
from tests.ranks import run_ranks

LAYOUTS = pytest.mark.parametrize(("parallel", "num_ranks"), [("fsdp2", 3), ("hsdp", 4)])
EIGHT, FOUR = Quantized(bits=8, block=16), Quantized(bits=4, block=16)


def _seen(rank: int, parallel: str, method: Any, difference: bool) -> tuple[list[float], bool, bool, float]:
    """By forward pass: the largest error of a gathered matrix; whether vectors and masters were exact; bytes saved."""
    model, _ = f.wrap(parallel)
    sent = commcomp.fsdp.compress_all_gathers(model, method, difference=difference)
    exact = dict(f.Net().named_parameters())
    masters = [value.to_local().clone() for value in model.parameters()]
    errors, vectors = [], True
    for module in (*model.blocks, model):
        module.set_reshard_after_forward(False)
    for _ in range(4):
        model(f.inputs(rank, 0))
        worst = 0.0
        for name, value in model.named_parameters():
            if value.dim() > 1:
                worst = max(worst, float((value - exact[name]).abs().max() / exact[name].abs().max()))
            else:
                vectors &= torch.equal(value, exact[name])
        errors.append(worst)
        gathered = torch.cat([value.detach().reshape(-1) for value in model.parameters()])
        everyone = [torch.empty_like(gathered) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, gathered)
        assert all(torch.equal(other, gathered) for other in everyone)
        for module in (*model.blocks, model):
            module.reshard()
    kept = all(torch.equal(value.to_local(), master) for value, master in zip(model.parameters(), masters))
    return errors, vectors, kept, sent.plain_wire_bytes / sent.wire_bytes


@LAYOUTS
def test_all_ranks_see_the_same_rounded_matrices_and_exact_vectors(parallel, num_ranks):
    for method, bound in ((EIGHT, 0.01), (FOUR, 0.15)):
        for errors, vectors, kept, ratio in run_ranks(_seen, num_ranks, parallel, method, False):
            assert all(0 < error < bound for error in errors)
            assert vectors and kept
            assert ratio > 2.5


@LAYOUTS
def test_differences_leave_no_lasting_error(parallel, num_ranks):
    for errors, vectors, kept, _ in run_ranks(_seen, num_ranks, parallel, FOUR, True):
        assert errors[0] == 0 and max(errors) < 1e-6  # constant weights: there is no difference
        assert vectors and kept


def _moved(rank: int, parallel: str) -> tuple[list[float], bool]:
    """Errors of gathers after the weights moved; whether the backward pass sends nothing and has torch's gradients."""
    plain, _ = f.wrap(parallel)
    model, _ = f.wrap(parallel, fsdp={"reshard_after_forward": True})
    sent = commcomp.fsdp.compress_all_gathers(model, FOUR, difference=True)
    _gathered(model, rank)
    with torch.no_grad():
        for value in (*model.parameters(), *plain.parameters()):
            value.mul_(1.1)
    exact = _gathered(plain, rank)
    errors = []
    for _ in range(6):
        seen = _gathered(model, rank)
        errors.append(max(float((seen[name] - exact[name]).abs().max()) for name in exact if exact[name].dim() > 1))
    for module in (*model.blocks, model):
        module.set_reshard_after_forward(True)
    before = sent.wire_bytes
    with torch.no_grad():
        model(f.inputs(rank, 0))
    forward = sent.wire_bytes - before
    f.backward(model, rank, 0)
    f.backward(plain, rank, 0)
    error = f.difference(f.gradients(model), f.gradients(plain))
    return errors, sent.wire_bytes - before == 2 * forward > 0 and error < 1e-3


@LAYOUTS
def test_differences_bring_gathers_nearer_and_the_backward_pass_sees_what_the_forward_pass_saw(parallel, num_ranks):
    for errors, as_forward in run_ranks(_moved, num_ranks, parallel):
        assert errors[0] > 1e-4 and errors[2] < 0.2 * errors[0] and errors[-1] < 1e-6, errors
        assert as_forward


def _train(rank: int, parallel: str, gathers: Any, difference: bool) -> float:
    """The loss after some steps on one batch."""
    model, _ = f.wrap(parallel, Quantized(block=16), fsdp={})
    if gathers is not None:
        commcomp.fsdp.compress_all_gathers(model, gathers, difference=difference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    target = torch.randn(6, 5, generator=torch.Generator().manual_seed(rank))
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(f.inputs(rank, 0)), target)
        loss.backward()
        optimizer.step()
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return float(mean)


def _train_all(rank: int, parallel: str) -> list[float]:
    cases = [(None, False), (EIGHT, False), (EIGHT, True), (FOUR, True)]
    return [_train(rank, parallel, *case) for case in cases]


@pytest.mark.parametrize(("parallel", "num_ranks"), [("fsdp2", 2), ("hsdp", 4)])
def test_training_reaches_the_loss_of_exact_gathers(parallel, num_ranks):
    exact, *others = run_ranks(_train_all, num_ranks, parallel, timeout=240)[0]
    assert exact < 0.2
    assert all(loss < 1.25 * exact + 0.01 for loss in others), (exact, others)


def _gathered(model: Any, rank: int) -> dict[str, torch.Tensor]:
    """What a forward pass sees, by plain name."""
    for module in (*model.blocks, model):
        module.set_reshard_after_forward(False)
    with torch.no_grad():
        model(f.inputs(rank, 0))
        seen = {f.plain_name(name): value.detach().clone() for name, value in model.named_parameters()}
    for module in (*model.blocks, model):
        module.reshard()
    return seen


def _bad_parameters(rank: int, parallel: str, difference: bool) -> tuple[list[bool], float]:
    """Whether Inf and NaN, one each, reached all ranks; the error after they were put right."""
    model, _ = f.wrap(parallel)
    commcomp.fsdp.compress_all_gathers(model, EIGHT, difference=difference)
    matrix, vector = model.head.weight, model.head.bias
    exact = dict(f.Net().named_parameters())
    _gathered(model, rank)
    with torch.no_grad():
        matrix.to_local()[:1, :1], vector.to_local()[:1] = float("inf"), float("nan")
    seen = _gathered(model, rank)
    arrived = [bool(seen[name].isfinite().all()) for name in ("head.weight", "head.bias")]
    harmless = all(value.isfinite().all() for name, value in seen.items() if not name.startswith("head"))
    with torch.no_grad():
        for value, good in ((matrix, exact["head.weight"]), (vector, exact["head.bias"])):
            value.copy_(distribute_tensor(good.detach(), value.device_mesh, value.placements))
    for _ in range(4):
        seen = _gathered(model, rank)
    error = max(float((value - exact[name]).abs().max() / exact[name].abs().max()) for name, value in seen.items())
    return [not any(arrived), harmless], error


@LAYOUTS
def test_bad_parameters_are_seen_and_leave_no_trace(parallel, num_ranks):
    for difference, bound in ((False, 0.01), (True, 1e-5)):
        for flags, error in run_ranks(_bad_parameters, num_ranks, parallel, difference):
            assert all(flags) and error < bound, (difference, flags, error)


def _count(rank: int, parallel: str) -> dict[str, tuple[int, int, int, int]]:
    """By case: bytes by the counters and as handed to collectives, with compression; both without it."""
    found = {}
    real, real_send, handed = dist.all_gather_single, dist.isend, [0]

    def spy(output: torch.Tensor, given: torch.Tensor, *args: Any, group: Any = None, **options: Any) -> Any:
        handed[0] += given.nbytes * (dist.get_world_size(group) - 1)
        return real(output, given, *args, group=group, **options)

    def spy_on_messages(given: torch.Tensor, *args: Any, **options: Any) -> Any:
        handed[0] += given.nbytes
        return real_send(given, *args, **options)

    dist.all_gather_single, dist.isend = spy, spy_on_messages
    bf16 = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    cases: dict[str, tuple[dict[str, Any], bool]] = {
        "fp32": ({}, False), "fp32, differences": ({}, True), "bf16": (bf16, False), "bf16, differences": (bf16, True)
    }
    if parallel == "fsdp2" and dist.get_world_size() == 4:
        cases["resharded to two"] = ({"reshard_after_forward": 2}, True)
    for what, (options, difference) in cases.items():
        totals = []
        for compress in (True, False):
            net = f.Net()
            net.blocks[1].requires_grad_(False)
            net.blocks[2].wide.requires_grad_(False)
            model = f.shard(net, parallel, **options)  # without a gradient hook: that one has all-gathers too
            sent = commcomp.fsdp.compress_all_gathers(model, EIGHT, difference=difference) if compress else None
            handed[0] = 0
            for step in range(2):
                f.backward(model, rank, step)
            if sent is not None and difference:
                assert sent.memory_bytes >= 4 * sum(value.numel() for value in net.parameters())
            totals += [handed[0]] if sent is None else [sent.wire_bytes, handed[0], sent.plain_wire_bytes]
        found[what] = (totals[0], totals[1], totals[2], totals[3])
    return found


@pytest.mark.parametrize(("parallel", "num_ranks"), [("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4)])
def test_bytes_are_those_handed_to_collectives_frozen_layers_included(parallel, num_ranks):
    for found in run_ranks(_count, num_ranks, parallel):
        for what, (counted, handed, plain_counted, plain_handed) in found.items():
            assert counted == handed and plain_counted == plain_handed, (what, found)
            assert counted < plain_counted / 1.2, (what, found)


def _refusals(rank: int) -> dict[str, str]:
    texts, mesh = {}, f.mesh_of("fsdp2")

    def attempt(what: str, model: nn.Module) -> None:
        texts[what] = f.said(lambda: commcomp.fsdp.compress_all_gathers(model, EIGHT))

    attempt("whole", f.Net())
    at_random = Quantized(rounding="stochastic")
    texts["at random"] = f.said(lambda: commcomp.fsdp.compress_all_gathers(f.shard(f.Net(), "fsdp2"), at_random))
    twice = f.shard(f.Net(), "fsdp2")
    commcomp.fsdp.compress_all_gathers(twice, EIGHT)
    attempt("twice", twice)
    attempt("fp16", f.shard(f.Net(), "fsdp2", mp_policy=MixedPrecisionPolicy(param_dtype=torch.float16)))
    mixed = f.Net()
    mixed.blocks[1].wide.to(torch.bfloat16).requires_grad_(False)
    attempt("mixed", f.shard(mixed, "fsdp2"))
    own = fully_shard(f.Net(), mesh=mesh)
    own.set_custom_all_gather(_OwnAllGather())
    attempt("own", own)
    return texts


class _OwnAllGather(DefaultAllGather):
    """A user's."""


def test_what_cannot_be_gathered_is_refused_by_name():
    for texts in run_ranks(_refusals, 2):
        assert "fully_shard" in texts["whole"]
        assert "rounding='nearest'" in texts["at random"]
        assert "the root module" in texts["twice"] and "once" in texts["twice"]
        assert "float16" in texts["fp16"] and "param_dtype" in texts["fp16"]
        assert "'blocks.1'" in texts["mixed"] and "bfloat16" in texts["mixed"] and "float32" in texts["mixed"]
        assert "the root module" in texts["own"] and "_OwnAllGather" in texts["own"]


def _low_precision(rank: int) -> float:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, _ = f.wrap("fsdp2", Quantized(block=16), fsdp={"mp_policy": policy})
    commcomp.fsdp.compress_all_gathers(model, EIGHT)
    f.backward(model, rank, 0)
    return f.difference(f.gradients(model), f.true_mean(dist.get_world_size(), 0))


def test_low_precision_works():
    assert all(error < 0.1 for error in run_ranks(_low_precision, 2))


def _disagree(rank: int, parallel: str, difference: bool) -> str:
    model = f.shard(f.Net(), parallel)
    first = rank < dist.get_world_size() // 2  # under hsdp a replica
    method = EIGHT if difference or first else FOUR
    own = difference and first
    return f.said(lambda: commcomp.fsdp.compress_all_gathers(model, method, difference=own))


@pytest.mark.parametrize(("parallel", "num_ranks"), [("fsdp2", 2), ("hsdp", 4)])
@pytest.mark.parametrize(("difference", "named"), [(False, "bits=4"), (True, "difference")])
def test_ranks_that_disagree_find_out_at_once(parallel, num_ranks, difference, named):
    for said in run_ranks(_disagree, num_ranks, parallel, difference):
        assert "ranks disagree" in said and named in said, said


def _under_autocast(rank: int) -> float:
    """The distance of rotated 4-bit gathers from those without autocast, by torch's operations."""
    native.available = False
    seen = []
    for enabled in (False, True):
        model = f.shard(f.Net(), "fsdp2")
        commcomp.fsdp.compress_all_gathers(model, Quantized(bits=4, block=16, rotate=True))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            seen.append(_gathered(model, rank))
    return max(float((seen[0][name] - value).abs().max()) for name, value in seen[1].items())


def test_autocast_does_not_reach_the_codes():
    assert run_ranks(_under_autocast, 2) == [0.0, 0.0]


def _other_method(rank: int) -> str:
    model = f.shard(f.Net(), "fsdp2")
    with pytest.raises(TypeError) as error:
        commcomp.fsdp.compress_all_gathers(model, commcomp.Sparse())
    return str(error.value)


def test_only_quantised_gathers_are_taken():
    assert all("expected commcomp.Quantized" in said for said in run_ranks(_other_method, 2))
