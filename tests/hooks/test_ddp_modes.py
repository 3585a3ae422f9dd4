"""Real DDP training in every mode that DDP knows, with one bucket and with many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.algorithms.join import Join

import commcomp
from commcomp import LowRank
from tests import ddp_training as t
from tests.ranks import run_ranks

CAPS = {"one": t.ONE, "many": t.MANY}
FLAGS = {
    "plain": {},
    "view": {"gradient_as_bucket_view": True},
    "static": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "view+static": {"gradient_as_bucket_view": True, "static_graph": True},
    "view+unused": {"gradient_as_bucket_view": True, "find_unused_parameters": True},
}
MODES = [f"{flags}-{cap}" for flags in FLAGS for cap in CAPS]


def _train_in_all_modes(rank: int, method: LowRank, steps: int) -> dict[str, Any]:
    outcome = {}
    for mode in MODES:
        flags, cap = mode.split("-")
        buckets: list[int] = []

        def hook(state, bucket, buckets=buckets):
            buckets.append(bucket.index())
            return commcomp.comm_hook(state, bucket)

        model, _ = t.wrap(t.Net(), method, bucket_cap_mb=CAPS[cap], ddp=FLAGS[flags], hook=hook)
        outcome[mode] = t.train(model, rank, steps), buckets
    return outcome


@pytest.fixture(scope="module", params=[1, 2], ids=["rounds=1", "rounds=2"])
def trained(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(_train_in_all_modes, 2, LowRank(rank=1, rounds=request.param), 6)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_gradients_of_the_plain_one(trained: list[dict[str, Any]], mode: str) -> None:
    for outcome in trained:
        for step, (own, plain) in enumerate(zip(outcome[mode][0], outcome["plain-one"][0], strict=True)):
            assert own.keys() == plain.keys(), f"step {step}"
            t.assert_close(own, plain, 1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_both_ranks_the_same_bits(trained: list[dict[str, Any]], mode: str) -> None:
    for left, right in zip(trained[0][mode][0], trained[1][mode][0], strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_modes_really_have_one_bucket_and_many(trained: list[dict[str, Any]]) -> None:
    assert max(trained[0]["plain-one"][1]) == 0
    assert max(trained[0]["plain-many"][1]) >= 4


def _ledger_in_all_modes(rank: int, method: LowRank, steps: int) -> dict[str, Any]:
    outcome = {}
    for mode in MODES:
        flags, cap = mode.split("-")
        module = t.Net()
        ledger = t.Ledger(module)
        model, state = t.wrap(module, method, bucket_cap_mb=CAPS[cap], ddp=FLAGS[flags], start_step=1)
        for step in range(steps):
            ledger.expect(t.inputs(rank, step))
            t.backward(model, t.inputs(rank, step))
            ledger.receive(model)
        outcome[mode] = ledger.account(state)
    return outcome


@pytest.fixture(scope="module", params=[("fp32", 2), ("int8", 1), ("int8", 2)], ids=str)
def accounts(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    factor_dtype, rounds = request.param
    return run_ranks(_ledger_in_all_modes, 2, LowRank(rank=1, factor_dtype=factor_dtype, rounds=rounds), 5)


@pytest.mark.parametrize("mode", MODES)
def test_what_grad_received_and_the_residuals_are_all_gradients(accounts: list[dict[str, Any]], mode: str) -> None:
    both = [account[mode] for account in accounts]
    assert sum(float(value.norm()) for value in both[0]["residual"].values()) > 0.1, "nothing was compressed"
    t.assert_conserved(both)


def _unused(rank: int, cap: float, method: LowRank, view: bool, bare: bool) -> Any:
    """Steps 0..5; `second` is skipped on rank 1 in step 2, on all ranks in steps 3 and 4, then returns."""
    module = t.Branches()
    ledger = t.Ledger(module)
    ddp = {"find_unused_parameters": True, "gradient_as_bucket_view": view}
    if bare:
        state = commcomp.GradientSync(module, method)
        model = torch.nn.parallel.DistributedDataParallel(module, bucket_cap_mb=cap, **ddp)
        model.register_comm_hook(state, commcomp.comm_hook)
    else:
        model, state = t.wrap(module, method, bucket_cap_mb=cap, ddp=ddp)
    seen = []
    for step in range(6):
        without = (step == 2 and rank == 1) or step in (3, 4)
        used = ("first",) if without else ("first", "second")
        ledger.expect(t.inputs(rank, step), used)
        t.backward(model, t.inputs(rank, step), used)
        has_gradient = module.second.weight.grad is not None
        ledger.receive(model)
        name = "second.weight"
        seen.append((has_gradient, t.residuals(state)[name], t.warm_starts(state)[f"warm_right/{name}"]))
    return ledger.account(state), seen


def _unused_in_a_static_graph(rank: int) -> Any:
    """`second` takes part on no rank in any step, which static_graph demands to be so from the first one on."""
    module = t.Branches()
    ledger = t.Ledger(module)
    model, state = t.wrap(module, LowRank(rank=1), ddp={"static_graph": True})
    for step in range(4):
        ledger.expect(t.inputs(rank, step), ("first",))
        t.backward(model, t.inputs(rank, step), ("first",))
        ledger.receive(model)
    return ledger.account(state), module.second.weight.grad is not None


def test_an_unused_parameter_of_a_static_graph() -> None:
    both = run_ranks(_unused_in_a_static_graph, 2)
    assert [has for _, has in both] == [False, False]
    t.assert_conserved([account for account, _ in both])
    assert all(account["residual"]["second.weight"].norm() == 0 for account, _ in both)


METHODS = [LowRank(rank=1), LowRank(rank=1, rounds=1), LowRank(rank=1, rounds=1, factor_dtype="int8")]


@pytest.mark.parametrize("view", [False, True], ids=["copy", "view"])
@pytest.mark.parametrize("method", METHODS, ids=["published", "alternating", "int8"])
@pytest.mark.parametrize("cap", CAPS)
def test_what_an_unused_parameter_is_owed_stays_owed(cap: str, method: LowRank, view: bool) -> None:
    both = run_ranks(_unused, 2, CAPS[cap], method, view, False)
    for _, seen in both:
        assert [has for has, _, _ in seen] == [True, True, True, False, False, True]
        assert seen[2][1].norm() > 0
        for step in (3, 4):
            assert torch.equal(seen[step][1], seen[2][1]), f"the residual moved in step {step}"
            assert torch.equal(seen[step][2], seen[2][2]), f"the warm start moved in step {step}"
    t.assert_conserved([account for account, _ in both])


def test_an_unused_parameter_is_safe_when_the_state_was_made_for_the_bare_module() -> None:
    both = run_ranks(_unused, 2, t.MANY, LowRank(rank=1), False, True)
    t.assert_conserved([account for account, _ in both])


def _used_only_without_sync(rank: int, cap: float) -> Any:
    module = t.Branches()
    ledger = t.Ledger(module)
    model, state = t.wrap(module, bucket_cap_mb=cap, ddp={"find_unused_parameters": True})
    for step in range(4):
        for used, context in ((("second",), model.no_sync()), (("first",), None)):
            ledger.expect(t.inputs(rank, step), used)
            t.backward(model, t.inputs(rank, step), used, context=context)
        ledger.receive(model)
    return ledger.account(state)


@pytest.mark.parametrize("cap", CAPS)
def test_a_parameter_used_only_in_the_accumulating_passes_is_conserved(cap: str) -> None:
    t.assert_conserved(run_ranks(_used_only_without_sync, 2, CAPS[cap]))


def _accumulated(rank: int, cap: float, view: bool, passes: int) -> Any:
    model, state = t.wrap(t.Net(), bucket_cap_mb=cap, ddp={"gradient_as_bucket_view": view})
    history = []
    for step in range(3):
        model.zero_grad()
        parts = [t.inputs(rank, 10 * step + part) for part in range(3)]
        if passes == 1:  # the sum of the losses in one graph
            sum(t.loss_of(out) for out in model(torch.stack(parts)).unbind(0)).backward()
        else:
            for part in parts[:-1]:
                t.backward(model, part, context=model.no_sync())
            t.backward(model, parts[-1])
        history.append(t.gradients(model))
    return history, state.step


@pytest.mark.parametrize("view", [False, True], ids=["copy", "view"])
@pytest.mark.parametrize("cap", CAPS)
def test_no_sync_accumulation_equals_one_step_with_the_sum(cap: str, view: bool) -> None:
    accumulated, at_once = (run_ranks(_accumulated, 2, CAPS[cap], view, passes)[1] for passes in (3, 1))
    assert accumulated[1] == at_once[1] == 3
    for left, right in zip(accumulated[0], at_once[0], strict=True):
        t.assert_close(left, right, 1e-3)


def _joined(rank: int, cap: float, unused: bool) -> Any:
    module = t.Net()
    ledger = t.Ledger(module)
    model, state = t.wrap(module, bucket_cap_mb=cap, ddp={"find_unused_parameters": unused})
    steps = 3 + 3 * rank  # rank 0 runs out of data after three
    gradients_of_rank_1 = []
    with Join([model]):
        for step in range(steps):
            ledger.expect(t.inputs(rank, step))
            t.backward(model, t.inputs(rank, step))
            gradients_of_rank_1.append(t.gradients(model))
            ledger.receive(model)
    return ledger.account(state), state.step


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("cap", CAPS)
def test_join_with_uneven_inputs_is_conserved(cap: str, unused: bool) -> None:
    (early, early_steps), (late, late_steps) = run_ranks(_joined, 2, CAPS[cap], unused)
    assert early_steps == late_steps == 6, "the joined rank shadows every step"
    early["received"] = late["received"]  # the joined rank's .grad is not touched any more
    t.assert_conserved([early, late])


def _many_buckets(rank: int) -> Any:
    buckets = set()

    def hook(state, bucket):
        buckets.add(bucket.index())
        return commcomp.comm_hook(state, bucket)

    method = LowRank(rank=1, factor_dtype="int8")
    model, state = t.wrap(t.Net(depth=30), method, bucket_cap_mb=t.MANY, hook=hook)
    history = t.train(model, rank, 20)
    return len(buckets), state.step, all(value.isfinite().all() for value in history[-1].values())


def test_thirty_buckets_and_twenty_steps_do_not_hang() -> None:
    for buckets, steps, finite in run_ranks(_many_buckets, 2):
        assert buckets >= 30
        assert steps == 20
        assert finite
