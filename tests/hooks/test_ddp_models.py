"""Real DDP training of every kind of model that a user may bring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commcomp
from commcomp import Dense, GradientSync, LowRank
from tests import ddp_training as t
from tests.ranks import run_ranks

CAPS = {"one": t.ONE, "many": t.MANY}
caps = pytest.mark.parametrize("cap", CAPS.values(), ids=CAPS)


def _account(rank: int, module: nn.Module, cap: float, shape: tuple[int, ...], **options: Any) -> Any:
    """Four steps without moving the weights; the ledger's account and what .grad held."""
    ledger = t.Ledger(module)
    ddp = options.pop("ddp", None)
    dtype = options.pop("input_dtype", torch.float32)
    model, state = t.wrap(module, bucket_cap_mb=cap, ddp=ddp, **options)
    history = []
    for step in range(4):
        x = t.inputs(rank, step, shape).to(dtype)
        ledger.expect(x)
        t.backward(model, x)
        history.append(t.gradients(model))
        ledger.receive(model)
    return ledger.account(state), history


def _compiled(rank: int, where: str, cap: float) -> Any:
    torch._dynamo.config.optimize_ddp = cap >= 1  # torch itself refuses smaller caps with it
    module = t.Net()
    if where == "inside":
        module = torch.compile(module, backend="eager")
    elif where == "layer":
        module.layers[1] = torch.compile(module.layers[1], backend="eager")
    model = DistributedDataParallel(module, bucket_cap_mb=cap)
    trained = torch.compile(model, backend="eager") if where == "outside" else model
    state = GradientSync(trained, LowRank(rank=2))
    model.register_comm_hook(state, commcomp.comm_hook)
    history = t.train(trained, rank, 3)
    names = list(state.parameters)
    return names, [list(step.values()) for step in history], sorted(state.state_dict())


@caps
@pytest.mark.parametrize("where", ["inside", "outside", "layer"])
def test_a_compiled_model_trains_alike_under_the_same_names(where: str, cap: float) -> None:
    plain, compiled = (run_ranks(_compiled, 2, kind, cap)[0] for kind in ("nowhere", where))
    assert compiled[0] == plain[0]
    assert compiled[2] == plain[2]
    for left, right in zip(compiled[1], plain[1], strict=True):
        t.assert_close(dict(enumerate(left)), dict(enumerate(right)), 1e-3)


def _bare_and_wrapped_names(rank: int) -> Any:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(8, 8)
            self.head = nn.Linear(8, 8)

    module = Holder()
    bare = GradientSync(module, LowRank(rank=1))
    wrapped = GradientSync(DistributedDataParallel(module), LowRank(rank=1))
    return sorted(bare.parameters), sorted(wrapped.parameters)


def test_a_submodule_called_module_keeps_its_name() -> None:
    bare, wrapped = run_ranks(_bare_and_wrapped_names, 1)[0]
    assert bare == wrapped == ["head.bias", "head.weight", "module.bias", "module.weight"]


def _frozen_and_tied(rank: int, cap: float) -> Any:
    module = t.Net()
    module.layers[0].requires_grad_(False)
    module.layers[3].weight = module.layers[1].weight
    account, history = _account(rank, module, cap, (8, t.WIDTH))
    return account, sorted(history[0])


@caps
def test_frozen_and_tied_parameters(cap: float) -> None:
    both = run_ranks(_frozen_and_tied, 2, cap)
    names = both[0][1]
    assert "layers.0.weight" not in names and "layers.0.weight" not in both[0][0]["residual"]
    assert "layers.1.weight" in both[0][0]["residual"] and "layers.3.weight" not in both[0][0]["residual"]
    t.assert_conserved([account for account, _ in both])


def _low_precision(rank: int, cap: float, dtype: torch.dtype, mixed: bool, factor_dtype: str) -> Any:
    module = t.Net().to(dtype)
    shape = (8, t.WIDTH)
    if mixed:

        class Mixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.low, self.high = module, nn.Sequential(nn.Linear(t.CLASSES, 12), nn.Tanh(), nn.Linear(12, 12))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.high(self.low(x).float())

        return _account(rank, Mixed(), cap, shape, method=LowRank(rank=2, factor_dtype=factor_dtype), input_dtype=dtype)
    return _account(rank, module, cap, shape, method=LowRank(rank=2, factor_dtype=factor_dtype), input_dtype=dtype)


@caps
@pytest.mark.parametrize("mixed", [False, True], ids=["pure", "mixed"])
@pytest.mark.parametrize("factor_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sixteen_bit_models_are_conserved_to_their_rounding(
    dtype: torch.dtype, factor_dtype: str, mixed: bool, cap: float
) -> None:
    both = run_ranks(_low_precision, 2, cap, dtype, mixed, factor_dtype)
    for account, history in both:
        assert account["residual"], "nothing was compressed"
        dtypes = {value.dtype for value in history[0].values()}
        assert dtypes == ({dtype, torch.float32} if mixed else {dtype})
    # each of the four steps rounds .grad once to the parameter's format
    t.assert_conserved([account for account, _ in both], 4 * torch.finfo(dtype).eps)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 12, 3, padding=1)
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.up(torch.tanh(self.second(torch.tanh(self.first(x)))))))


def _convolutions(rank: int, cap: float, view: bool, method: LowRank) -> Any:
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        module = ConvNet().to(memory_format=layout)
        results.append(_account(rank, module, cap, (2, 3, 8, 8), method=method, ddp={"gradient_as_bucket_view": view}))
    return results


@caps
@pytest.mark.parametrize("view", [False, True], ids=["copy", "view"])
@pytest.mark.parametrize("method", [LowRank(rank=2), LowRank(rank=2, rounds=1, factor_dtype="int8")], ids=["f", "i"])
def test_channels_last_convolutions_are_conserved(method: LowRank, view: bool, cap: float) -> None:
    both = run_ranks(_convolutions, 2, cap, view, method)
    for layout in (0, 1):  # residuals are kept by logical index, whatever the order in memory
        t.assert_conserved([results[layout][0] for results in both])


def _moved_between_layouts(rank: int) -> Any:
    """One compressed step channels-last, the state moved to a contiguous copy; both residuals by logical index."""
    module = ConvNet().to(memory_format=torch.channels_last)
    ledger = t.Ledger(module)
    model, state = t.wrap(module, LowRank(rank=1))
    ledger.expect(t.inputs(rank, 0, (2, 3, 8, 8)))
    t.backward(model, t.inputs(rank, 0, (2, 3, 8, 8)))
    ledger.receive(model)
    contiguous, moved = t.wrap(ConvNet(), LowRank(rank=1))
    moved.load_state_dict(state.state_dict())
    for step in range(1, 3):
        ledger.expect(t.inputs(rank, step, (2, 3, 8, 8)))
        t.backward(contiguous, t.inputs(rank, step, (2, 3, 8, 8)))
        ledger.receive(contiguous)
    return ledger.account(moved)


def test_a_residual_does_not_depend_on_the_memory_layout_of_its_weight() -> None:
    t.assert_conserved(run_ranks(_moved_between_layouts, 2))


def test_channels_last_at_full_rank_equals_the_contiguous_mean() -> None:
    (contiguous, permuted), _ = run_ranks(_convolutions, 2, t.MANY, True, LowRank(rank=12, min_ratio=0))
    for left, right in zip(permuted[1], contiguous[1], strict=True):
        t.assert_close(left, right, 1e-4)


def _transposed(rank: int) -> Any:
    """A weight stored column by column whose gradient has rank one."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(24, 16).t())
            self.left, self.right = torch.arange(1.0, 17), torch.arange(1.0, 25)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.left @ self.weight @ self.right * x

    model, _ = t.wrap(Outer(), LowRank(rank=1))
    model(torch.ones(())).sum().backward()
    return model.module.weight.grad.clone(), torch.outer(model.module.left, model.module.right)


def test_a_weight_stored_column_by_column_is_compressed_as_the_matrix_that_it_is() -> None:
    gradient, expected = run_ranks(_transposed, 2)[0]
    assert (gradient - expected).abs().max() < 1e-3 * expected.abs().max()


class Vectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(t.WIDTH))
        self.shift = nn.Parameter(torch.zeros(t.WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.shift


class WithEmpty(t.Net):
    """A parameter without elements, last, so that it may get a bucket to itself."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 4, dtype=dtype))
        self.empty_vector = nn.Parameter(torch.zeros(0, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.empty.float().sum() + self.empty_vector.float().sum()


def _odd_models(rank: int, build: type[nn.Module], arguments: list[tuple[Any, ...]], methods: list[Any]) -> Any:
    return [
        (argument, method, *_account(rank, build(*argument), cap, (8, t.WIDTH), method=method))
        for argument in arguments
        for method in methods
        for cap in CAPS.values()
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_model_of_vectors_only(num_ranks: int) -> None:
    methods = [LowRank(rank=2), LowRank(rank=2, factor_dtype="int8", dense_dtype="bf16")]
    for cases in zip(*run_ranks(_odd_models, num_ranks, Vectors, [()], methods), strict=True):
        assert not cases[0][2]["residual"]
        t.assert_conserved([account for _, _, account, _ in cases], 2e-2 if cases[0][1] == methods[1] else 2e-5)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_parameters_without_elements(num_ranks: int) -> None:
    methods = [LowRank(rank=2), LowRank(rank=2, factor_dtype="int8", min_ratio=0), Dense("bf16")]
    dtypes = [(torch.float32,), (torch.bfloat16,)]
    for cases in zip(*run_ranks(_odd_models, num_ranks, WithEmpty, dtypes, methods), strict=True):
        for _, _, account, history in cases:
            assert history[0]["empty"].shape == (0, 4)
            for name in ("empty", "empty_vector"):
                account["true"].pop(name)
        t.assert_conserved([case[2] for case in cases], 2e-2 if cases[0][1] == methods[2] else 2e-5)


def _world_of_one(rank: int, factor_dtype: str) -> Any:
    module = t.Net()
    return _account(rank, module, t.MANY, (8, t.WIDTH), method=LowRank(rank=2, factor_dtype=factor_dtype))


@pytest.mark.parametrize("factor_dtype", ["fp32", "int8"])
def test_world_size_one(factor_dtype: str) -> None:
    t.assert_conserved([run_ranks(_world_of_one, 1, factor_dtype)[0][0]])
