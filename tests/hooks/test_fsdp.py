"""FSDP2 and HSDP: the same gradients as DDP, conservation, bad numbers, and what torch lets users do with sharding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import commcomp
import commcomp.fsdp
from commcomp import Dense, GradientSync, LowRank, Quantized, Sparse
from tests import fsdp_training as f
from tests.ranks import run_ranks

RANK_4 = LowRank(rank=4, min_ratio=0)
LAYOUTS = [("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4)]
EVERYWHERE = pytest.mark.parametrize(("parallel", "num_ranks"), LAYOUTS)
FSDP1_TOO = pytest.mark.parametrize(("parallel", "num_ranks"), [*LAYOUTS, ("fsdp1", 3)])
COMPRESSING = {
    "low rank": RANK_4,
    "low rank alternating": LowRank(rank=4, min_ratio=0, rounds=1),
    "low rank int8": LowRank(rank=4, min_ratio=0, factor_dtype="int8"),
    "8 bits": Quantized(block=16),
    "4 bits rotated": Quantized(bits=4, block=32, rotate=True),
    "sparse": Sparse(density=0.1),
    "sparse fp32": Sparse(density=0.05, value_dtype="fp32"),
}


def _against(rank: int, parallel: str, methods: list[Any]) -> list[tuple[float, float]]:
    """For each method: distance from DDP with the same method, and from the true mean."""
    true = [f.true_mean(dist.get_world_size(), step) for step in range(3)]
    found = []
    for method in methods:
        sharded, whole = f.run(parallel, rank, method), f.run("ddp", rank, method)
        from_ddp = max(f.difference(left, right) for left, right in zip(sharded, whole))
        found.append((from_ddp, max(f.difference(left, right) for left, right in zip(sharded, true))))
    return found


@FSDP1_TOO
def test_dense_is_what_fsdp_gives(parallel, num_ranks):
    methods = [None, Dense(), Dense("bf16"), Dense("fp16")]
    for found in run_ranks(_against, num_ranks, parallel, methods):
        for (_, error), bound in zip(found, (1e-6, 1e-6, 1e-2, 2e-3), strict=True):
            assert error < bound


@pytest.mark.parametrize(("parallel", "num_ranks"), [("fsdp2", 2), ("fsdp2", 3), ("fsdp1", 3)])
def test_low_rank_on_shards_gives_the_numbers_of_ddp(parallel, num_ranks):
    # Six samples a rank: gradients have no more than a few large singular values, and beyond them a factor that is
    # orthonormalised once more amplifies rounding.
    ranks_and_rounds = [(1, 1), (1, 2), (4, 1), (4, 2), (7, 2)]
    methods = [LowRank(rank=rank, rounds=rounds, min_ratio=0) for rank, rounds in ranks_and_rounds]
    for found in run_ranks(_against, num_ranks, parallel, methods):
        assert all(from_ddp < 2e-5 for from_ddp, _ in found), found


@FSDP1_TOO
def test_full_rank_is_lossless_and_eight_bits_nearly(parallel, num_ranks):
    methods = [LowRank(rank=64, min_ratio=0), Quantized(block=16)]
    for full, quantized in run_ranks(_lossless, num_ranks, parallel, methods):
        assert full < 1e-4 and quantized < 0.02


def _lossless(rank: int, parallel: str, methods: list[Any]) -> list[float]:
    true = [f.true_mean(dist.get_world_size(), step) for step in range(3)]
    runs = [f.run(parallel, rank, method, strict=False) for method in methods]
    return [max(f.difference(left, right) for left, right in zip(seen, true)) for seen in runs]


def _conserve(rank: int, parallel: str, residual_dtype: str) -> dict[str, float]:
    """By method: how far what was decoded and what is owed is from the gradients."""
    steps, found = 4, {}
    true = [f.true_mean(dist.get_world_size(), step) for step in range(steps)]
    for what, method in COMPRESSING.items():
        model, state = f.wrap(parallel, method, residual_dtype=residual_dtype, measure_every=1)
        assert state is not None
        found[what] = f.conservation_error(f.train(model, rank, *range(steps)), state, true)
        memory = state.stats()["memory_bytes"]
        assert memory["residual"] > 0 and memory["planned"] == memory["residual"] + memory["warm_start"]
        assert state.stats()["relative_error"] > 0
    return found


@pytest.mark.parametrize("residual_dtype", ["fp32", "bf16", "int8"])
@FSDP1_TOO
def test_what_was_decoded_and_what_is_owed_are_the_gradients(parallel, num_ranks, residual_dtype):
    for found in run_ranks(_conserve, num_ranks, parallel, residual_dtype, timeout=120):
        bound = {"fp32": 2e-5, "bf16": 0.03, "int8": 0.06}[residual_dtype]
        assert all(error < bound for error in found.values()), found


def _replicas_agree(rank: int) -> bool:
    """Whether replicas hold the same bits of every shard after steps with lossy methods."""
    equal = True
    methods = [*COMPRESSING.values(), Quantized(bits=4, block=16, rounding="stochastic")]
    for method in methods:
        model, state = f.wrap("hsdp", method)
        assert state is not None and state.sharded is not None
        for step in range(3):
            f.backward(model, rank, step)
        for value in model.parameters():
            own = f.local(value.grad)
            others = [torch.empty_like(own) for _ in range(state.num_ranks)]
            dist.all_gather(others, own.contiguous(), group=state.sharded.process_group)
            equal &= all(torch.equal(other, own) for other in others) and bool(own.any() or not own.numel())
    return equal


def test_replicas_hold_the_same_bits():
    assert all(run_ranks(_replicas_agree, 4))


def _bad_step(rank: int, parallel: str) -> dict[str, list[bool]]:
    """By method: every gradient bad in the bad step; nothing kept changed; the next step finite."""
    found = {}
    for what, method in COMPRESSING.items():
        model, state = f.wrap(parallel, method)
        assert state is not None
        f.train(model, rank, 0, 1)
        before = {key: f.local(value).clone() for key, value in state.state_dict().items()}
        model.zero_grad()
        f.backward(model, rank, 2, bad=float("nan") if rank == 1 else None)
        bad = f.gradients(model)
        after = {key: f.local(value) for key, value in state.state_dict().items() if key != "step"}
        same = all(torch.equal(value, before[key]) for key, value in after.items())
        model.zero_grad()
        f.backward(model, rank, 3)
        good = all(value.isfinite().all() for value in f.gradients(model).values())
        found[what] = [not any(value.isfinite().all() for value in bad.values()), same, good]
    return found


@FSDP1_TOO
def test_bad_numbers_reach_every_rank_and_leave_no_trace(parallel, num_ranks):
    for found in run_ranks(_bad_step, num_ranks, parallel, timeout=120):
        assert all(all(flags) for flags in found.values()), found


def _spoil_one(rank: int, parallel: str) -> dict[str, tuple[bool, bool, int, bool]]:
    """By method and place: the bad element arrived; nothing kept changed; steps skipped; the next step is finite."""
    found = {}
    for what, method in COMPRESSING.items():
        for place in (("weight", 4), ("bias", 0)):  # of the last and of the first owner
            net = f.SpoiledNet()
            model, state = f.wrap(parallel, method, model=net)
            assert state is not None
            f.train(model, rank, 0, 1)
            before = {key: f.local(value).clone() for key, value in state.state_dict().items()}
            model.zero_grad()
            net.spoil = place if rank == 1 else None
            f.backward(model, rank, 2)
            net.spoil = None
            arrived = not f.gradients(model)[f"head.{place[0]}"].isfinite().all()
            after = {key: f.local(value) for key, value in state.state_dict().items() if key != "step"}
            same = all(torch.equal(value, before[key]) for key, value in after.items())
            model.zero_grad()
            f.backward(model, rank, 3)
            good = all(value.isfinite().all() for value in f.gradients(model).values())
            found[f"{what}, {place}"] = (bool(arrived), same, state.stats()["skipped_steps"], good)
    return found


@EVERYWHERE
def test_one_bad_element_is_found_out_by_ranks_that_do_not_receive_it(parallel, num_ranks):
    for found in run_ranks(_spoil_one, num_ranks, parallel, timeout=120):
        assert all(seen == (True, True, 1, True) for seen in found.values()), found


def _variants(rank: int, parallel: str) -> dict[str, float]:
    """Ways in which torch lets users shard and train; each against the mean of the true gradients."""
    num_ranks, found = dist.get_world_size(), {}
    true = [f.true_mean(num_ranks, step) for step in range(3)]
    twice = {name: true[0][name] + true[1][name] for name in true[0]}

    def once(**options: Any) -> nn.Module:
        model, _ = f.wrap(parallel, Dense(), **options)
        return model

    model = once()
    f.backward(model, rank, 0)
    f.backward(model, rank, 1)
    found["accumulated, each synchronised"] = f.difference(f.gradients(model), twice)

    model = once()
    model.set_requires_gradient_sync(False)
    f.backward(model, rank, 0)
    model.set_requires_gradient_sync(True)
    f.backward(model, rank, 1)
    found["accumulated before the exchange"] = f.difference(f.gradients(model), twice)

    model = once()
    if parallel == "hsdp":
        model.set_requires_all_reduce(False)
        f.backward(model, rank, 0)
        model.set_requires_all_reduce(True)
        f.backward(model, rank, 1)
        found["accumulated in shards"] = f.difference(f.gradients(model), twice)

    for divisor in (1.0, 8.0):
        model = once()
        for module in model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(divisor)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
        f.backward(model, rank, 0)
        expected = {name: value * num_ranks / divisor for name, value in true[0].items()}
        found[f"divided by {divisor}"] = f.difference(f.gradients(model), expected)

    if num_ranks == 1 or parallel == "fsdp2":
        model = once()
        model.set_requires_all_reduce(False)  # for replicas: here it means nothing
        f.backward(model, rank, 0)
        found["no replicas"] = f.difference(f.gradients(model), true[0])

    model = once(fsdp={"offload_policy": CPUOffloadPolicy(pin_memory=False)})
    f.backward(model, rank, 0)
    found["offloaded"] = f.difference(f.gradients(model), true[0])

    model = once(fsdp={"reshard_after_forward": False})
    f.backward(model, rank, 0)
    found["not resharded"] = f.difference(f.gradients(model), true[0])

    net = f.Net()
    net.blocks[1].requires_grad_(False)
    model, _ = f.wrap(parallel, Dense(), model=net)
    f.backward(model, rank, 0)
    frozen = f.gradients(model)
    assert not any("blocks.1." in name for name in frozen)
    found["frozen"] = f.difference(frozen, {name: true[0][name] for name in frozen})
    return found


@EVERYWHERE
def test_what_users_may_do_with_sharding_works(parallel, num_ranks):
    for found in run_ranks(_variants, num_ranks, parallel):
        assert all(error < 1e-6 for error in found.values()), found


def _low_precision(rank: int, parallel: str) -> dict[str, float]:
    true, found = f.true_mean(dist.get_world_size(), 0), {}
    for what, policy in {
        "bf16, reduced in fp32": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        "bf16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
    }.items():
        for method in (Dense(), Quantized(block=16), RANK_4):
            model, _ = f.wrap(parallel, method, fsdp={"mp_policy": policy})
            f.backward(model, rank, 0)
            error = f.difference(f.gradients(model), true)
            if not isinstance(method, LowRank):
                found[f"{what}, {method.method}"] = error
            assert all(value.grad.dtype == torch.float32 for value in model.parameters())
    return found


@EVERYWHERE
def test_mixed_precision_policies_work(parallel, num_ranks):
    for found in run_ranks(_low_precision, num_ranks, parallel):
        assert all(error < 0.05 for error in found.values()), found


def _refusals(rank: int) -> dict[str, str]:
    texts = {}

    def attempt(what: str, action: Any) -> None:
        texts[what] = f.said(action, TypeError, ValueError, RuntimeError)

    whole = f.Net()
    before = GradientSync(whole, RANK_4)
    attempt("not sharded", lambda: commcomp.fsdp.register_comm_hook(f.Net(), before))
    f.shard(whole, "fsdp2")
    attempt("constructed before", lambda: commcomp.fsdp.register_comm_hook(whole, before))
    attempt("no state", lambda: commcomp.fsdp.register_comm_hook(whole, RANK_4))
    sideways = f.Net()
    mesh = f.mesh_of("fsdp2")
    fully_shard(sideways, mesh=mesh, shard_placement_fn=lambda value: Shard(1) if value.shape == (18, 18, 3) else None)
    attempt("sideways", lambda: GradientSync(sideways, RANK_4))
    flat = FullyShardedDataParallel(f.Net(), device_id=torch.device("cpu"))
    attempt("FSDP1", lambda: commcomp.fsdp.register_comm_hook(flat, GradientSync(flat, RANK_4)))
    model, _ = f.wrap("fsdp2", RANK_4)
    model.blocks[0].wide.weight.requires_grad_(False)
    attempt("frozen later", lambda: f.backward(model, rank, 0))
    hooked, _ = f.wrap("fsdp2", RANK_4)
    hooked.head.weight.register_post_accumulate_grad_hook(lambda value: None)
    attempt("hooked", lambda: f.backward(hooked, rank, 0))
    leaves = f.Net()
    fully_shard(leaves.blocks[0], mesh=mesh)
    attempt("root left out", lambda: GradientSync(leaves, Dense()))
    with pytest.warns(UserWarning, match="in no fully_shard group"):
        GradientSync(leaves, Dense(), strict=False)
    later = f.Net()
    fully_shard(later.blocks[0], mesh=mesh)
    f.hook(later, Dense(), strict=False)
    fully_shard(later, mesh=mesh)
    attempt("sharded later", lambda: f.backward(later, rank, 0))
    return texts


def test_what_cannot_work_is_refused_by_name():
    for texts in run_ranks(_refusals, 2):
        assert "fully_shard" in texts["not sharded"] and "register_comm_hook" in texts["not sharded"]
        assert "before fully_shard" in texts["constructed before"]
        assert "LowRank" in texts["no state"] and "GradientSync" in texts["no state"]
        assert "mix.weight" in texts["sideways"] and "dimension 1" in texts["sideways"]
        assert "model.register_comm_hook" in texts["FSDP1"] and "fully_shard" in texts["FSDP1"]
        assert "head.weight" in texts["hooked"] and "zeros" in texts["hooked"]
        assert "blocks.1.wide.weight" in texts["root left out"] and "root module" in texts["root left out"]
        assert "Net" in texts["sharded later"] and "last fully_shard" in texts["sharded later"]
        assert "blocks.0.wide.weight was changed" in texts["frozen later"]
        assert "Block" in texts["frozen later"] and "requires_grad" in texts["frozen later"], texts["frozen later"]


def _other_meshes(rank: int) -> dict[str, str]:
    """What is said of models over several meshes, by what they are: two ranks, one dimension of one of them."""
    square = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))
    texts, line = {}, f.mesh_of("fsdp2")

    def attempt(what: str, model: nn.Module) -> None:
        texts[what] = f.said(lambda: GradientSync(model, RANK_4), TypeError, ValueError, RuntimeError)

    tensor_parallel = f.Net()
    parallelize_module(tensor_parallel, square["tensor"], {"head": ColwiseParallel()})
    attempt("tensor parallel", fully_shard(tensor_parallel, mesh=square["data"]))
    attempt("replicated", replicate(f.Net(), mesh=line))
    alone = f.Net()
    fully_shard(alone.head, mesh=square["tensor"])
    attempt("other ranks", fully_shard(alone, mesh=line))
    split, expert = f.Net(), FSDPMeshInfo(square["tensor"], shard_mesh_dim=0)
    fully_shard(
        split,
        mesh=line,
        shard_placement_fn=lambda value: ShardPlacementResult(Shard(0), expert) if value.shape == (5, 18) else None,
    )
    attempt("two meshes", split)
    attempt("float64", f.shard(f.Net(), "fsdp2", mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float64)))
    return texts


def test_models_over_several_meshes_are_refused_by_name():
    for texts in run_ranks(_other_meshes, 2):
        assert "head.weight" in texts["tensor parallel"] and "tensor parallelism" in texts["tensor parallel"]
        assert "DistributedDataParallel" in texts["replicated"], texts["replicated"]
        assert "'head'" in texts["other ranks"] and "one mesh" in texts["other ranks"], texts["other ranks"]
        assert "shard_placement_fn" in texts["two meshes"] and "the root module" in texts["two meshes"], texts
        assert "torch.float64" in texts["float64"] and "reduce_dtype" in texts["float64"], texts["float64"]


def _odd_settings(rank: int, odd_rank: int, odd: Any) -> str:
    model = f.shard(f.Net(), "hsdp")
    try:
        GradientSync(model, odd if rank == odd_rank else RANK_4)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("odd", [LowRank(rank=3, min_ratio=0), LowRank(rank=4), "no method"], ids=str)
@pytest.mark.parametrize("odd_rank", [0, 3])
def test_ranks_of_both_groups_find_out_together(odd_rank, odd):
    texts = run_ranks(_odd_settings, 4, odd_rank, odd)
    for rank, text in enumerate(texts):
        assert "disagree" in text or (odd == "no method" and rank == odd_rank), texts
        # A number in the whole world: in its group of replicas, 1 and 3, rank 3 is the second.
        assert odd == "no method" or f"rank {odd_rank} has" in text, texts


def _factored(rank: int) -> list[str]:
    """The methods of two matrices: of one, both factors are more bytes than its pieces sent to their owners."""
    methods = []
    for parallel in ("ddp", "fsdp2"):
        model: nn.Module = nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 480))
        if parallel == "fsdp2":
            fully_shard(model, mesh=f.mesh_of("fsdp2"))
        state = GradientSync(model, LowRank(rank=30))
        methods += [state.effective[name].method for name in ("0.weight", "1.weight")]
    return methods


def test_a_matrix_is_factored_only_where_that_sends_less_to_its_owners():
    assert run_ranks(_factored, 2) == [["low_rank", "low_rank", "dense", "low_rank"]] * 2
