"""Loss scaling, several groups and models in one process, refusals, and backward passes that fail."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commcomp
from commcomp import Dense, GradientSync, LowRank
from tests import ddp_training as t
from tests.ranks import run_ranks

CAPS = {"one": t.ONE, "many": t.MANY}
caps = pytest.mark.parametrize("cap", CAPS.values(), ids=CAPS)


def _scaled(rank: int, cap: float, method: LowRank, broken: str) -> Any:
    """Steps 0 to 5 under a GradScaler; in step 2 rank 1 has an Inf in the gradient of `broken`."""
    module = t.Net()
    ledger = t.Ledger(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    model, state = t.wrap(module, method, bucket_cap_mb=cap, grad_scaler=scaler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scales, skipped, kept = [], [], []
    for step in range(6):
        x = t.inputs(rank, step)
        scales.append(scaler.get_scale())
        before = t.residuals(state)
        loss = scaler.scale(t.loss_of(model(x)))
        if step == 2:
            handle = dict(model.module.named_parameters())[broken].register_hook(
                lambda gradient: gradient * (float("inf") if rank == 1 else 1.0)
            )
        loss.backward()
        if step == 2:
            handle.remove()
        scaler.unscale_(optimizer)
        bad = any(not value.isfinite().all() for value in t.gradients(model).values())
        skipped.append(bad)
        if bad:
            model.zero_grad(set_to_none=True)
            kept.append(all(torch.equal(before[name], value) for name, value in t.residuals(state).items()))
        else:
            ledger.expect(x)
            ledger.receive(model)
        scaler.step(optimizer)
        scaler.update()
    account = ledger.account(state)
    account["residual"] = {name: value / state.loss_scale for name, value in account["residual"].items()}
    return account, scales, skipped, kept, state.stats()["skipped_steps"], state.loss_scale


@caps
@pytest.mark.parametrize("broken", ["layers.1.weight", "norm.bias"])
@pytest.mark.parametrize("method", [LowRank(rank=1), LowRank(rank=1, rounds=1, factor_dtype="int8")], ids=["f", "i"])
def test_an_infinity_under_a_grad_scaler(cap: float, broken: str, method: LowRank) -> None:
    both = run_ranks(_scaled, 2, cap, method, broken)
    for _, scales, skipped, kept, counted, kept_scale in both:
        assert skipped == [False, False, True, False, False, False], "one step, on both ranks"
        assert scales == [1024.0, 1024.0, 2048.0, 1024.0, 1024.0, 2048.0]
        assert kept == [True], "the skipped step moved a residual"
        assert counted == 1
        assert kept_scale == scales[-1]
    t.assert_conserved([account for account, *_ in both])


def _subgroup(rank: int, cap: float) -> Any:
    # every rank of the world makes the group; the third then does nothing
    group = dist.new_group([0, 1])
    if rank == 2:
        dist.barrier()  # the world's, which the others reach at the end
        return None
    accounts = []
    for seed in range(2):  # two models on one group
        module = t.Net(seed)
        ledger = t.Ledger(module)
        model, state = t.wrap(module, bucket_cap_mb=cap, ddp={"process_group": group})
        assert state.num_ranks == 2
        for step in range(3):
            ledger.expect(t.inputs(rank, step))
            t.backward(model, t.inputs(rank, step))
            ledger.receive(model)
        accounts.append(ledger.account(state))
    dist.barrier()
    return accounts


@caps
def test_a_group_of_two_of_three_ranks(cap: float) -> None:
    first, second, idle = run_ranks(_subgroup, 3, cap)
    assert idle is None
    for model in (0, 1):
        t.assert_conserved([first[model], second[model]])


def _unequal_memberships(rank: int) -> tuple[list[int], str]:
    """Rank 0 is in one group more than rank 1, as in many layouts of pipeline and data parallelism."""
    pair, _ = dist.new_group([0, 1]), dist.new_group([0, 2])
    exchange_group = dist.new_group([0, 1])
    model, state = t.wrap(t.Net())
    t.train(model, rank, 2)
    steps, text = [state.step], ""
    if rank < 2:
        try:
            t.wrap(t.Net(), ddp={"process_group": pair})
        except ValueError as error:
            text = str(error)
        model, state = t.wrap(t.Net(), ddp={"process_group": pair}, exchange_group=exchange_group)
        t.train(model, rank, 3)
        steps.append(state.step)
    dist.barrier()
    return steps, text


def test_ranks_that_are_members_of_unequally_many_groups() -> None:
    (first, text), (second, same_text), (third, _) = run_ranks(_unequal_memberships, 3, timeout=30)
    assert text == same_text and "exchange_group" in text
    assert [first, second, third] == [[2, 3], [2, 3], [2]]


def _two_models(rank: int, cap: float, interleaved: bool) -> Any:
    pairs = []
    for seed, factor_dtype in ((0, "fp32"), (1, "int8")):
        module = t.Net(seed)
        pairs.append((t.Ledger(module), *t.wrap(module, LowRank(rank=1, factor_dtype=factor_dtype), bucket_cap_mb=cap)))
    for step in range(4):
        x = t.inputs(rank, step)
        for ledger, _, _ in pairs:
            ledger.expect(x)
        if interleaved:  # both reducers are at work in one backward pass
            sum(t.loss_of(model(x)) for _, model, _ in pairs).backward()
        else:
            for _, model, _ in pairs:
                t.backward(model, x)
        for ledger, model, _ in pairs:
            ledger.receive(model)
    return [ledger.account(state) for ledger, _, state in pairs]


@caps
@pytest.mark.parametrize("interleaved", [False, True])
def test_two_models_with_a_state_each(cap: float, interleaved: bool) -> None:
    both = run_ranks(_two_models, 2, cap, interleaved)
    for model in (0, 1):
        t.assert_conserved([accounts[model] for accounts in both])


def _refused(rank: int, what: str) -> str:
    module: nn.Module = t.Net()
    if what == "sparse":
        module = nn.Sequential(nn.Embedding(32, 8, sparse=True))
    elif what == "fp64":
        module.head.double()
    elif what == "complex":
        module.extra = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    elif what == "nothing trainable":
        module.requires_grad_(False)
    elif what == "several devices":
        module.extra = nn.Linear(2, 2, device="meta")
    elif what == "mixed precision":
        module = DistributedDataParallel(module)
        module.mixed_precision = "as DDP keeps its argument; on a CPU it cannot be constructed with one"
    try:
        GradientSync(module, LowRank(rank=2))
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("sparse", ["'0'", "sparse=False"]),
        ("fp64", ["head.weight", "float64", "float32"]),
        ("complex", ["extra", "complex64"]),
        ("nothing trainable", ["requires_grad"]),
        ("several devices", ["several devices", "meta"]),
        ("mixed precision", ["mixed_precision=", "autocast"]),
    ],
)
def test_models_that_are_refused(what: str, words: list[str]) -> None:
    for text in run_ranks(_refused, 2, what):
        assert all(word in text for word in words), text


def _wrong_state(rank: int) -> str:
    model = DistributedDataParallel(t.Net())
    model.register_comm_hook(LowRank(rank=2), commcomp.comm_hook)
    try:
        t.backward(model, t.inputs(rank, 0))
    except (TypeError, RuntimeError) as error:
        return str(error)
    return "accepted"


def test_a_hook_with_a_wrong_state_object_is_refused() -> None:
    for text in run_ranks(_wrong_state, 2):
        assert "LowRank" in text and "GradientSync" in text


def _wrong_model(rank: int) -> str:
    model = DistributedDataParallel(t.Net())
    model.register_comm_hook(GradientSync(t.Net(), LowRank(rank=2)), commcomp.comm_hook)
    try:
        t.backward(model, t.inputs(rank, 0))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "accepted"


def test_a_state_made_for_another_model_is_refused() -> None:
    assert all("construct GradientSync" in text for text in run_ranks(_wrong_model, 2))


class _Bomb(torch.autograd.Function):
    armed = False

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        if _Bomb.armed:
            raise ArithmeticError("half-way")
        return gradient


class _BombNet(t.Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = x + torch.tanh(layer(_Bomb.apply(x) if index == 2 else x))
        return self.head(self.norm(x))


def _half_way(rank: int, cap: float, method: LowRank) -> Any:
    module = _BombNet()
    ledger = t.Ledger(module)
    model, state = t.wrap(module, method, bucket_cap_mb=cap)
    for step in range(5):
        if step == 2:
            _Bomb.armed = True
            with pytest.raises(ArithmeticError, match="half-way"):
                t.backward(model, t.inputs(rank, 99))
            _Bomb.armed = False
            # DDP itself does not go on after this; the same state serves a new one around the same module
            module.zero_grad(set_to_none=True)
            model = DistributedDataParallel(module, bucket_cap_mb=cap)
            model.register_comm_hook(state, commcomp.comm_hook)
        ledger.expect(t.inputs(rank, step))
        t.backward(model, t.inputs(rank, step))
        ledger.receive(model)
    return ledger.account(state), state.step


@caps
@pytest.mark.parametrize("method", [LowRank(rank=1), LowRank(rank=1, rounds=1, factor_dtype="int8")], ids=["f", "i"])
def test_a_backward_pass_that_raises_half_way_costs_nothing(cap: float, method: LowRank) -> None:
    both = run_ranks(_half_way, 2, cap, method)
    assert [steps for _, steps in both] == [5, 5]
    t.assert_conserved([account for account, _ in both])


def _threads_after(rank: int) -> int:
    for _ in range(3):
        model, state = t.wrap(t.Net(), policy=[("*.weight", LowRank(rank=2)), ("*", Dense())])
        t.backward(model, t.inputs(rank, 0))
        del model, state
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "commcomp":
            thread.join(5)
    return sum(thread.name == "commcomp" for thread in threading.enumerate())


def test_a_state_that_is_gone_leaves_no_thread_behind() -> None:
    assert run_ranks(_threads_after, 2) == [0, 0]
