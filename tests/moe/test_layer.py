"""The expert-parallel layer: the same model on 1, 2 and 4 ranks, alone and in DistributedDataParallel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from commcomp.moe import LSH, MoELayer, Quantized, TokenCompressor, clip_grad_norm_, local_experts_of
from tests.moe.layers import clustered
from tests.ranks import run_ranks

WIDTH, EXPERTS, BATCH, LENGTH, STEPS = 16, 4, 4, 12, 8


class _Model(nn.Module):
    def __init__(
        self,
        methods: tuple[LSH | Quantized, ...],
        recompute: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.before = nn.Linear(WIDTH, WIDTH)
        compressor = TokenCompressor(*methods) if methods else None
        self.moe = MoELayer(WIDTH, 24, EXPERTS, 2, compressor=compressor, group=group)
        self.after = nn.Linear(WIDTH, 1)
        self._recompute = recompute

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.before(tokens))
        if self._recompute:
            made, balance = checkpoint(self.moe, x, use_reentrant=False)
        else:
            made, balance = self.moe(x)
        return (self.after(x + made) - tokens.sum(-1, keepdim=True)).square().mean() + 0.01 * balance


def _data(step: int) -> torch.Tensor:
    return clustered((BATCH, LENGTH, WIDTH), seed=step % 3, noise=0.2)


def _train(
    rank: int, methods: tuple[LSH | Quantized, ...], recompute: bool = False, steps: int = STEPS, groups: bool = False
) -> Any:
    """Every rank takes its part of each batch. Losses and norms, means over ranks; this rank's state at the end.

    With `groups` the experts are dealt out over ranks 0 and 1, and again over 2 and 3.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    with_all = with_equal = None
    if groups:
        pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3], [0, 2], [1, 3])]
        with_all, with_equal = pairs[rank // 2], pairs[2 + rank % 2]
    model: nn.Module = _Model(methods, recompute, with_all)
    wrapped = model
    if ranks > 1:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, local_experts_of(model))
        wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, norms = [], []
    for step in range(steps):
        loss = wrapped(_data(step).chunk(ranks)[rank])
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.moe.experts.parameters() if with_equal else ():
            dist.all_reduce(parameter.grad, group=with_equal)
            parameter.grad /= dist.get_world_size(with_equal)
        norms.append(float(clip_grad_norm_(model, 1.0)))
        optimizer.step()
        total = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(total)
        losses.append(float(total) / ranks)
    state = {name: value for name, value in model.state_dict().items() if "extra" not in name}
    return losses, norms, state, model.moe.compressor.stats() if methods else None


@pytest.mark.parametrize(("num_ranks", "groups"), [(2, False), (4, False), (4, True)])
def test_one_two_and_four_ranks_train_the_same_model(num_ranks, groups):
    alone = _train(0, ())
    state: dict[str, torch.Tensor] = {}
    for losses, norms, own, _ in run_ranks(_train, num_ranks, (), False, STEPS, groups):
        # The balance loss is each rank's own, of its own tokens: a mean of products is no product of means.
        assert losses == pytest.approx(alone[0], rel=1e-3)
        assert norms == pytest.approx(alone[1], rel=1e-2)
        state |= own
    assert state.keys() == alone[2].keys()
    for name, value in alone[2].items():
        torch.testing.assert_close(state[name], value, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("methods", [(Quantized(),), (Quantized(dtype="int4", block=16),)], ids=str)
def test_quantized_rows_train_the_same_model_on_any_number_of_ranks(methods):
    alone = _train(0, methods)
    for losses, *_ in run_ranks(_train, 2, methods):
        assert losses == pytest.approx(alone[0], rel=0.01)


@pytest.mark.parametrize("methods", [(LSH(rate=0.5),), (LSH(rate=0.5), Quantized())], ids=str)
def test_runs_with_one_seed_are_the_same(methods):
    first, second = (run_ranks(_train, 2, methods) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one[0] == other[0] and one[3] == other[3]
        assert all(torch.equal(value, other[2][name]) for name, value in one[2].items())
    dense = [first[0][2][name] for name in ("before.weight", "after.weight", "moe.gate.weight")]
    assert all(torch.equal(value, other) for value, other in zip(dense, [
        first[1][2][name] for name in ("before.weight", "after.weight", "moe.gate.weight")
    ]))


@pytest.mark.parametrize("methods", [(), (LSH(rate=0.5), Quantized())], ids=str)
def test_activation_checkpointing_changes_nothing(methods):
    plain, recomputed = (run_ranks(_train, 2, methods, recompute) for recompute in (False, True))
    for one, other in zip(plain, recomputed, strict=True):
        assert one[0] == other[0]


def _copied(rank: int) -> bool:
    """Gradients of experts in copies, and with weights that were put in their place, are the mean over ranks too."""
    torch.manual_seed(rank)
    tokens, layer = torch.randn(2, LENGTH, WIDTH), MoELayer(WIDTH, 24, EXPERTS, 2)
    twin = copy.deepcopy(layer)
    replaced = copy.deepcopy(layer)
    replaced.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()}, assign=True)
    gradients = []
    for one in (layer, twin, replaced):
        one(tokens)[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in one.parameters()])
    assert all(gradient is not None and gradient.any() for gradient in gradients[0])
    return all(torch.equal(*pair) for other in gradients[1:] for pair in zip(gradients[0], other, strict=True))


def test_copies_of_a_layer_train_as_it_does():
    assert run_ranks(_copied, 2) == [True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("methods", [(), (LSH(rate=0.5),), (Quantized(),)], ids=str)
def test_autocast_changes_neither_choices_nor_clusters(methods, dtype):
    layers = [MoELayer(WIDTH, 24, EXPERTS, 2, compressor=TokenCompressor(*methods)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for step in range(6):
        made = []
        for layer, enabled in zip(layers, (False, True), strict=True):
            layer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=enabled):
                output, balance = layer(_data(step))
            (output.square().sum() + balance).backward()
            made.append((output.detach(), balance.detach(), layer.compressor.stats()))
        (plain, balance, stats), (lower, lower_balance, lower_stats) = made
        assert (lower - plain).norm() <= 0.02 * plain.norm()
        assert torch.equal(lower_balance, balance)
        assert lower_stats == stats


def _rank_without_tokens(rank: int) -> bool:
    torch.manual_seed(0)
    layer = MoELayer(WIDTH, 24, EXPERTS, 2, compressor=TokenCompressor(LSH(rate=0.5), Quantized()))
    for step in range(4):
        tokens = _data(step)[: BATCH * rank].requires_grad_()
        output, balance = layer(tokens)
        (output.sum() + balance).backward()
        assert output.shape == tokens.shape and tokens.grad is not None and balance.isfinite()
    return all(one.grad is not None and bool(one.grad.isfinite().all()) for one in layer.parameters())


def test_a_rank_may_have_no_tokens():
    assert run_ranks(_rank_without_tokens, 2) == [True, True]


def _overflown(rank: int) -> list[bool]:
    """The gradient of one rank's experts alone is no number."""
    layer = MoELayer(WIDTH, 24, EXPERTS, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = ShardedGradScaler("cpu", process_group=layer.group)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    scaler.scale(layer(_data(rank))[0].square().sum()).backward()
    if rank == 1:
        next(layer.experts.parameters()).grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    return [torch.equal(*pair) for pair in zip(before, layer.parameters(), strict=True)] + [scaler.get_scale() < 65536]


def test_the_scaler_of_the_docs_leaves_a_step_out_on_all_ranks():
    assert all(all(kept) for kept in run_ranks(_overflown, 2))


def test_clipping_is_that_of_the_whole_model():
    torch.manual_seed(0)
    model = _Model(())
    model(_data(0)).backward()
    expected = torch.nn.utils.get_total_norm([one.grad for one in model.parameters()])
    before = [one.grad.clone() for one in model.parameters()]
    torch.testing.assert_close(clip_grad_norm_(model, 0.5), expected)
    for gradient, parameter in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient * min(1.0, 0.5 / float(expected)), rtol=1e-4, atol=1e-8)


def test_a_bad_number_reaches_the_loss_and_spoils_nothing_kept():
    published = LSH(rate=0.5, search="hash", centroid="mean", compensate="both", farthest=None)
    quantized = Quantized(dtype="int4", block=16)
    for methods in [(LSH(rate=0.5),), (LSH(rate=0.5), Quantized()), (quantized,), (published,)]:
        torch.manual_seed(0)
        compressor = TokenCompressor(*methods)
        layer = MoELayer(WIDTH, 24, EXPERTS, 2, compressor=compressor)
        for step in range(7):
            layer(_data(step))
        tokens = _data(7)
        tokens[1, 3, 2] = torch.nan
        made, _ = layer(tokens)
        assert made[1, 3].isnan().all()
        untouched = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        untouched[1, 3] = False
        assert made[untouched].isfinite().all()
        for kept in (compressor.learnt.centres, compressor.learnt.next_centres):
            assert kept is None or kept.isfinite().all()
        made, _ = layer(_data(8))
        assert made.isfinite().all()


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="top_k is 5; expected 1 to 4"):
        MoELayer(8, 8, 4, 5)
    with pytest.raises(ValueError, match="capacity_factor is 0"):
        MoELayer(8, 8, 4, 2, capacity_factor=0)
