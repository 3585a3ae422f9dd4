"""FSDP1: every strategy, with and without the original parameters, and what torch lets users do with it.

What holds under FSDP2 too, gradients of DDP, conservation and bad numbers, is in test_fsdp.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import commcomp
from commcomp import Dense, GradientSync, LowRank, Quantized, Sparse
from tests import fsdp_training as f
from tests.ranks import run_ranks

RANK_4 = LowRank(rank=4, min_ratio=0)
FULL = ShardingStrategy.FULL_SHARD
STRATEGIES = [FULL, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD]
SETTINGS = [(strategy, original) for strategy in STRATEGIES for original in (True, False)]


def _flat(method: Any, strategy: ShardingStrategy = FULL, original: bool = True) -> nn.Module:
    """The net of three blocks, with a hook if there is a method."""
    fsdp = {"sharding_strategy": strategy, "use_orig_params": original}
    return f.wrap("fsdp1", method, fsdp=fsdp, strict=False)[0]


def _every_setting(rank: int) -> dict[str, bool]:
    """Whether lossless settings give plain FSDP1's gradients and low rank those of DDP, over two steps."""
    found = {}
    low_rank = f.run("ddp", rank, RANK_4, steps=2)
    for strategy, original in SETTINGS:
        plain = f.train(_flat(None, strategy, original), rank, 0, 1)
        full_rank = LowRank(rank=64, min_ratio=0)
        for method, expected, bound in ((Dense(), plain, 1e-6), (full_rank, plain, 1e-4), (RANK_4, low_rank, 2e-5)):
            seen = f.train(_flat(method, strategy, original), rank, 0, 1)
            distance = max(f.difference(left, right) for left, right in zip(seen, expected, strict=True))
            found[f"{strategy.name} {original} {method} {distance}"] = distance < bound
    return found


def test_lossless_is_plain_fsdp1_and_low_rank_is_ddp():
    for found in run_ranks(_every_setting, 3, timeout=120):
        assert all(found.values()), found


class Tied(nn.Module):
    """An embedding that is the head too, and matrices in units of their own and in the root's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(23, f.WIDTH)
        self.layers = nn.ModuleList(nn.Linear(f.WIDTH, f.WIDTH) for _ in range(2))
        self.blocks = nn.ModuleList(f.Block() for _ in range(2))
        self.head = nn.Linear(f.WIDTH, 23, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, values: Tensor) -> Tensor:
        hidden = values @ self.embedding.weight[: f.WIDTH, : f.WIDTH] + self.embedding.weight[0]
        for layer in (*self.layers, *self.blocks):
            hidden = hidden + torch.tanh(layer(hidden))
        return self.head(hidden)


def _train(model: nn.Module, rank: int) -> list[f.Gradients]:
    """Gradients of four steps of SGD with momentum: each also tells whether the weights moved alike."""
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), []
    for step in range(4):
        optimizer.zero_grad()
        f.backward(model, rank, step)
        seen.append(f.gradients(model))
        optimizer.step()
    return seen


def _tied(rank: int) -> dict[str, Any]:
    """Nested units with a tied embedding, trained: distance from DDP; and what is known of the parameters."""
    whole = DistributedDataParallel(Tied())
    state = GradientSync(whole, RANK_4)
    whole.register_comm_hook(state, commcomp.comm_hook)
    expected, found = _train(whole, rank), {}
    for original in (True, False):
        net = Tied()
        model = f.flatten(net, *net.blocks, net.blocks[0].wide, use_orig_params=original)
        own = GradientSync(model, RANK_4)
        model.register_comm_hook(own, commcomp.comm_hook)
        distance = max(f.difference(left, right) for left, right in zip(_train(model, rank), expected, strict=True))
        saved, alike = own.state_dict(), state.state_dict()
        same_keys = {key: value.shape for key, value in saved.items()} == {k: v.shape for k, v in alike.items()}
        found[str(original)] = (distance, own.shapes == state.shapes, own.effective == state.effective, same_keys)
    return found


def test_nested_units_and_tied_weights_train_as_under_ddp():
    for found in run_ranks(_tied, 2):
        for distance, *same in found.values():
            assert distance < 1e-3 and all(same), found


def _values_one_by_one(rank: int) -> dict[str, float]:
    """One matrix a unit against one parameter a bucket of DDP: then even blocks and thresholds are the same.

    After a dense step, since only then DDP has cut its buckets.
    """
    found = {}
    for method in (Quantized(block=16), Quantized(bits=4, block=32, rotate=True), Sparse(density=0.1)):
        whole = DistributedDataParallel(Tied(), bucket_cap_mb=1e-5)
        state = GradientSync(whole, method, start_step=1)
        whole.register_comm_hook(state, commcomp.comm_hook)
        expected = f.train(whole, rank, 0, 1, 2)
        for strategy in (FULL, ShardingStrategy.NO_SHARD):
            net = Tied()
            matrices = [one for one in net.modules() if isinstance(one, nn.Linear | nn.Conv1d) and one is not net.head]
            model = f.flatten(net, *matrices, sharding_strategy=strategy, use_orig_params=False)
            own = GradientSync(model, method, start_step=1)
            model.register_comm_hook(own, commcomp.comm_hook)
            seen = f.train(model, rank, 0, 1, 2)
            errors = [f.difference(left, right) for left, right in zip(seen, expected, strict=True)]
            found[f"{method} {strategy.name}"] = max(errors)
    return found


def test_values_one_by_one_are_those_of_ddp():
    for found in run_ranks(_values_one_by_one, 2):
        assert all(error < 1e-5 for error in found.values()), found


def _variants(rank: int) -> dict[str, float]:
    """Ways in which torch lets users shard and train; each against the mean of the true gradients.

    Offloading to the CPU is not among them: torch's own code for it needs an accelerator.
    """
    found = {}
    true = [f.true_mean(dist.get_world_size(), step) for step in range(3)]
    twice = {name: true[0][name] + true[1][name] for name in true[0]}
    for strategy in STRATEGIES:
        for original in (True, False):
            what = f"{strategy.name}, {original}"
            model = _flat(Dense(), strategy, original)
            f.backward(model, rank, 0)
            f.backward(model, rank, 1)
            found[f"accumulated, each synchronised, {what}"] = f.difference(f.gradients(model), twice)
            model.zero_grad()
            with model.no_sync():
                f.backward(model, rank, 0)
            f.backward(model, rank, 1)
            found[f"accumulated before the exchange, {what}"] = f.difference(f.gradients(model), twice)
            thrice = {name: twice[name] + true[2][name] for name in twice}
            f.backward(model, rank, 2)
            found[f"and after it, {what}"] = f.difference(f.gradients(model), thrice)

            model = _flat(Dense(), strategy, original)
            with model.no_sync():  # before any hook call
                f.backward(model, rank, 0)
            f.backward(model, rank, 1)
            found[f"accumulated first, {what}"] = f.difference(f.gradients(model), twice)
        found.update(_frozen(rank, strategy, true))
    return found


def _frozen(rank: int, strategy: ShardingStrategy, true: list[f.Gradients]) -> dict[str, float]:
    found = {}
    for method in (Dense(), LowRank(rank=64, min_ratio=0.01)):
        net = f.Net()
        for frozen in (net.blocks[1], net.blocks[0].wide, net.blocks[2].narrow.bias):
            frozen.requires_grad_(False)
        options = {"sharding_strategy": strategy, "use_orig_params": True}
        model, state = f.wrap("fsdp1", method, model=net, strict=False, fsdp=options)
        f.backward(model, rank, 0)
        seen = f.gradients(model)
        assert state is not None and set(state.parameters) == set(seen) and len(seen) == 11
        found[f"frozen, {strategy.name}, {method.method}"] = f.difference(seen, {name: true[0][name] for name in seen})
        squares = sum(unit.handle.flat_param.grad.square().sum() for unit in state.sharded.units)
        if strategy is not ShardingStrategy.NO_SHARD:
            dist.all_reduce(squares)
        trained = sum(float(value.square().sum()) for value in seen.values())
        found[f"nothing else, {strategy.name}, {method.method}"] = abs(float(squares) / trained - 1)
    return found


def test_what_users_may_do_works():
    for found in run_ranks(_variants, 2, timeout=120):
        bad = {what: error for what, error in found.items() if not error < 1e-4}
        assert not bad and len(found) == 36, bad


def _low_precision(rank: int) -> dict[str, float]:
    true, found = f.true_mean(dist.get_world_size(), 0), {}
    for strategy in STRATEGIES:
        for what, settings in {
            "reduced in fp32": MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
            "bf16": MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
            "kept": MixedPrecision(param_dtype=torch.bfloat16, keep_low_precision_grads=True),
        }.items():
            for method in (Dense(), LowRank(rank=64, min_ratio=0)):
                options = {"mixed_precision": settings, "sharding_strategy": strategy}
                model, _ = f.wrap("fsdp1", method, strict=False, fsdp=options)
                f.backward(model, rank, 0)
                found[f"{what}, {method.method}, {strategy.name}"] = f.difference(f.gradients(model), true)
    return found


def test_mixed_precision_works():
    for found in run_ranks(_low_precision, 2):
        assert all(error < 0.05 for error in found.values()), found


class _Reentrant(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inside = module

    def forward(self, values: Tensor) -> Tensor:
        return checkpoint(self.inside, values, use_reentrant=True)


def _checkpointed(rank: int) -> dict[str, Any]:
    """Backward passes inside the backward pass: one step all the same."""
    true, found = f.true_mean(dist.get_world_size(), 1), {}
    for strategy in STRATEGIES:
        net = f.Net()
        for index, block in enumerate(net.blocks):
            net.blocks[index] = _Reentrant(block)
        model, state = f.wrap("fsdp1", Dense(), model=net, fsdp={"sharding_strategy": strategy})
        assert state is not None
        for step in (0, 1):
            model.zero_grad()
            model(f.inputs(rank, step).requires_grad_()).square().sum().backward()
        seen = {name.replace("inside.", ""): value for name, value in f.gradients(model).items()}
        found[strategy.name] = (f.difference(seen, true), state.step)
    parts = nn.Sequential(_Reentrant(nn.Linear(f.WIDTH, f.WIDTH)), _Reentrant(nn.Linear(f.WIDTH, f.WIDTH)))
    whole = f.flatten(parts, sharding_strategy=ShardingStrategy.NO_SHARD)  # sharded, torch itself fails
    whole.register_comm_hook(GradientSync(whole, Dense()), commcomp.comm_hook)
    try:
        whole(f.inputs(rank, 0).requires_grad_()).sum().backward()
        found["parts of a unit"] = "accepted"
    except RuntimeError as error:
        found["parts of a unit"] = str(error)
    return found


def test_reentrant_checkpoints_are_one_step():
    for found in run_ranks(_checkpointed, 2):
        text = found.pop("parts of a unit")
        assert "twice" in text and "0.inside.weight" in text and "use_reentrant" in text
        assert all(error < 1e-6 and step == 2 for error, step in found.values()), found


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        block = nn.ModuleDict({"attn": nn.Linear(16, 16), "mlp": nn.Linear(16, 64)})
        self.blocks = nn.ModuleList([block])
        self.head = nn.Linear(16, 32)


def _roles(rank: int) -> list[Any]:
    def chosen(model: nn.Module) -> dict[str, str]:
        state = GradientSync(model, Sparse(density=0.01, layers="transformer"))
        return {name: method.method for name, method in state.effective.items()}

    found = [chosen(DistributedDataParallel(_Attention()))]
    for original in (True, False):
        net = _Attention()
        found.append(chosen(f.flatten(net, net.blocks[0].attn, net.blocks[0], use_orig_params=original)))
    return found


def test_layers_of_a_transformer_are_told_apart():
    for whole, *flat in run_ranks(_roles, 2):
        assert whole["blocks.0.mlp.weight"] == "sparse" and whole["blocks.0.attn.weight"] == "dense"
        assert all(one == whole for one in flat)


def _counted(rank: int) -> list[Any]:
    """Bytes by strategy, dense and low rank: sent, of plain training, of one matrix, and the residual's memory."""
    found = []
    for strategy in (FULL, ShardingStrategy.NO_SHARD):
        for method in (Dense(), RANK_4):
            model, state = f.wrap("fsdp1", method, fsdp={"sharding_strategy": strategy})
            assert state is not None
            f.backward(model, rank, 0)
            stats = state.stats()
            parts = sum(item["wire_bytes"] for item in stats["parameters"].values())
            found.append((stats["wire_bytes"], stats["dense_wire_bytes"], parts, stats["memory_bytes"]["residual"]))
    return found


def test_bytes_are_counted_as_they_are_sent():
    numel = sum(value.numel() for value in f.Net().parameters())
    matrices = sum(value.numel() for value in f.Net().parameters() if value.dim() > 1 and len(value) > 5)
    for dense, low_rank, dense_whole, low_rank_whole in run_ranks(_counted, 2):
        for sent, plain, parts, kept in (dense, dense_whole):
            assert sent == plain and abs(parts - sent) < 400 and kept == 0
        assert abs(dense[0] - 2 * numel) < 400 and abs(dense_whole[0] - 4 * numel) < 400  # fp32, half of it a rank
        assert low_rank[0] == low_rank_whole[0] < dense[1] and low_rank[3] >= 4 * matrices


def _interrupt(*arguments: Any) -> None:
    raise RuntimeError("interrupted")


def _refusals(rank: int) -> dict[str, str]:
    texts = {}

    def attempt(what: str, action: Any) -> None:
        texts[what] = f.said(action, TypeError, ValueError, RuntimeError)

    mesh = init_device_mesh("cpu", (1, 2))
    hybrid = f.flatten(f.Net(), sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=mesh)
    attempt("hybrid", lambda: GradientSync(hybrid, RANK_4))
    whole = f.Net()
    before = GradientSync(whole, RANK_4)
    late = f.flatten(whole)
    late.register_comm_hook(before, commcomp.comm_hook)
    attempt("constructed before", lambda: f.backward(late, rank, 0))
    model = _flat(RANK_4)
    model.module.blocks[1].module.wide.weight.requires_grad_(False)
    attempt("frozen later", lambda: f.backward(model, rank, 0))
    embedding = f.flatten(nn.Embedding(5, 4, sparse=True))
    attempt("sparse", lambda: GradientSync(embedding, RANK_4))
    attempt("fp64", lambda: GradientSync(f.flatten(nn.Linear(5, 4).double()), RANK_4))
    unused = f.flatten(f.Net(), use_orig_params=True)
    idle = GradientSync(unused, RANK_4)
    attempt("never registered", lambda: _train(unused, rank))
    idle.close()
    broken = _flat(Dense())
    guard = broken.module.blocks[0].module.narrow.register_full_backward_hook(_interrupt)
    attempt("interrupted", lambda: f.backward(broken, rank, 0))
    guard.remove()
    attempt("going on", lambda: f.backward(broken, rank, 0))
    return texts


def test_what_cannot_work_is_refused_by_name():
    for texts in run_ranks(_refusals, 2):
        assert "HYBRID_SHARD" in texts["hybrid"] and "fully_shard" in texts["hybrid"]
        assert "before FullyShardedDataParallel wrapped" in texts["constructed before"]
        assert "blocks.1.wide.weight" in texts["frozen later"] and "requires_grad" in texts["frozen later"]
        assert "sparse=False" in texts["sparse"]
        assert "'weight'" in texts["fp64"] and "float64" in texts["fp64"]
        assert "never ran" in texts["never registered"]
        assert texts["interrupted"] == "interrupted" and "did not end" in texts["going on"]
