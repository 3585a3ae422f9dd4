"""Ranks that disagree, hooks that never run, compression that enlarges, and ranks that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commcomp
from commcomp import Dense, GradientSync, LowRank
from commcomp.compressors import native
from commcomp.exchange.mean import AllReduceMean
from tests import ddp_training as t
from tests import ranks
from tests.ranks import run_ranks

BASE: dict[str, Any] = {"method": LowRank(rank=2)}
POLICY = {"policy": [("*.weight", LowRank(rank=2)), ("*", Dense())]}
DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "rank": (BASE, {"method": LowRank(rank=3)}, ["rank=2", "rank=3"]),
    "method": (BASE, {"method": Dense("bf16")}, ["LowRank", "Dense"]),
    "factor_dtype": (BASE, {"method": LowRank(rank=2, factor_dtype="int8")}, ["fp32", "int8"]),
    "policy": (POLICY, {"policy": [("*.bias", Dense()), ("*", LowRank(rank=2))]}, ["*.weight", "*.bias"]),
    "longer policy": (BASE, POLICY, ["policy"]),
    "seed": ({**BASE, "seed": 1}, {**BASE, "seed": 2}, ["seed=1", "seed=2"]),
    "strict": (BASE, {**BASE, "strict": False}, ["strict=True", "strict=False"]),
    "start_step": (BASE, {**BASE, "start_step": 7}, ["start_step=0", "start_step=7"]),
    "residual_dtype": (BASE, {**BASE, "residual_dtype": "bf16"}, ["residual_dtype=fp32", "residual_dtype=bf16"]),
}
"""settings of rank 0, those of the other ranks, and words that the error must hold."""


def _construct_all(rank: int, odd_rank: int) -> dict[str, str]:
    texts = {}
    for what, (common, odd, _) in DIFFERENCES.items():
        model = DistributedDataParallel(t.Net())
        try:
            GradientSync(model, **(odd if rank == odd_rank else common))
        except ValueError as error:
            texts[what] = str(error)
    return texts


@pytest.fixture(scope="module")
def disagreements() -> list[dict[str, str]]:
    return run_ranks(_construct_all, 3, 2)


@pytest.mark.parametrize("what", DIFFERENCES)
def test_every_rank_raises_the_same_error(disagreements: list[dict[str, str]], what: str) -> None:
    texts = [outcome.get(what, "accepted") for outcome in disagreements]
    assert len(set(texts)) == 1, texts
    assert "disagree" in texts[0] and "rank 0" in texts[0] and "rank 2" in texts[0], texts[0]
    assert all(word in texts[0] for word in DIFFERENCES[what][2]), texts[0]


def _other_arithmetic(rank: int, what: str) -> str:
    if rank == 1 and what == "threads":
        torch.set_num_threads(3)
    with mock.patch.object(native, "available", not (rank == 1 and what == "native")):
        try:
            GradientSync(t.Net(), LowRank(rank=2))
        except ValueError as error:
            return str(error)
    return "accepted"


@pytest.mark.parametrize(("what", "word"), [("threads", "3 threads"), ("native", "torch passes"), ("none", "accepted")])
def test_ranks_that_round_otherwise_find_out_together(what: str, word: str) -> None:
    left, right = run_ranks(_other_arithmetic, 2, what)
    assert left == right and word in left


def _fail_in_second_exchange(rank: int) -> tuple[str, str]:
    model, state = t.wrap(t.Net())
    t.train(model, rank, 1)
    with mock.patch.object(AllReduceMean, "finish", side_effect=RuntimeError("connection closed")):
        try:
            t.train(model, rank, 1)
        except RuntimeError as error:
            raised = str(error)
    try:
        state.state_dict()
    except RuntimeError as error:
        return raised, str(error)
    return raised, "handed out"


def test_a_state_that_failed_half_way_is_not_handed_out() -> None:
    ((raised, refused),) = run_ranks(_fail_in_second_exchange, 1)
    assert "connection closed" in raised
    assert "step 1" in refused and "connection closed" in refused and "checkpoint" in refused


def _loaded_on_one_rank(rank: int, rounds: int) -> list[str]:
    model, state = t.wrap(t.Net(), LowRank(rank=2, rounds=rounds))
    t.train(model, rank, 3)
    saved = {key: value.clone() for key, value in state.state_dict().items()}
    model, state = t.wrap(t.Net(), LowRank(rank=2, rounds=rounds))
    if rank == 0:
        state.load_state_dict(saved)
    texts = []
    for _ in range(2):
        try:
            t.train(model, rank, 1)
            texts.append("trained")
        except RuntimeError as error:
            texts.append(str(error))
    return texts


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_checkpoint_loaded_on_one_rank_only_is_found_out_in_the_first_step(rounds: int) -> None:
    for first, second in run_ranks(_loaded_on_one_rank, 2, rounds):
        for part in ("disagree on step", "rank 0 has 3", "rank 1 has 0", "same checkpoint"):
            assert part in first
        assert "cannot go on" in second


def _frozen_later(rank: int, strict: bool) -> tuple[str, list[str]]:
    module = t.Net()
    model, state = t.wrap(module, strict=strict)
    t.train(model, rank, 2)
    module.head.requires_grad_(False)
    again = DistributedDataParallel(module)
    again.register_comm_hook(state, commcomp.comm_hook)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            t.train(again, rank, 2)
        except RuntimeError as error:
            return str(error), []
    return "trained", [str(warning.message) for warning in caught if "no gradient bucket" in str(warning.message)]


def test_a_parameter_that_is_in_no_bucket_any_more_is_named() -> None:
    for text, _ in run_ranks(_frozen_later, 2, True):
        assert "no gradient bucket" in text and "head" in text and "construct a new" in text
    for text, said in run_ranks(_frozen_later, 2, False):
        assert text == "trained" and len(said) == 1


def _converted_later(rank: int) -> str:
    module = t.Net()
    state = GradientSync(module, LowRank(rank=2))
    module.bfloat16()
    model = DistributedDataParallel(module)
    model.register_comm_hook(state, commcomp.comm_hook)
    try:
        sum(value.sum() for value in model(torch.zeros(2, t.WIDTH, dtype=torch.bfloat16))).backward()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "trained"


def test_a_model_that_is_converted_after_construction_is_refused() -> None:
    for text in run_ranks(_converted_later, 2):
        assert "bfloat16" in text and "float32" in text and "after converting" in text, text


def _wrong_models(rank: int) -> list[str]:
    with torch.device("meta"):
        meta = nn.Linear(3, 3)
    cases: list[Any] = [meta, nn.LazyLinear(3), LowRank(), t.Net().parameters()]
    texts = []
    for model in cases:
        try:
            GradientSync(model, LowRank(rank=1, min_ratio=0))
            texts.append("accepted")
        except ValueError as error:
            texts.append(str(error))
    try:
        GradientSync(t.Net(), LowRank(rank=2), grad_scaler=True)  # type: ignore[arg-type]
        texts.append("accepted")
    except ValueError as error:
        texts.append(str(error))
    return texts


def test_models_and_arguments_that_cannot_work_are_named() -> None:
    meta, lazy, swapped, generator, scaler = run_ranks(_wrong_models, 1)[0]
    assert "'weight'" in meta and "materialised" in meta
    assert "'weight'" in lazy and "materialised" in lazy
    assert "LowRank as model" in swapped and "generator as model" in generator
    assert "grad_scaler is True" in scaler


def _closed(rank: int) -> tuple[int, str]:
    before = len(dist.distributed_c10d._world.pg_names)
    for _ in range(3):
        model, state = t.wrap(t.Net())
        t.train(model, rank, 1)
        state.close()
        state.close()
    after = len(dist.distributed_c10d._world.pg_names)
    try:
        t.train(model, rank, 1)
    except RuntimeError as error:
        return after - before, str(error)
    return after - before, "trained"


def test_closed_states_leave_no_process_group_behind() -> None:
    for groups, text in run_ranks(_closed, 2):
        assert groups == 0
        assert "closed" in text


def _other_parameters(rank: int, what: str) -> str:
    module = t.Net()
    if rank == 1 and what == "frozen":
        module.head.requires_grad_(False)
    if rank == 1 and what == "shape":
        module.head = nn.Linear(t.WIDTH, t.CLASSES + 1)
    if rank == 1 and what == "name":
        module.other = module.head
        del module.head
    if rank == 1 and what == "dtype":
        module.head.bfloat16()
    try:
        GradientSync(module, LowRank(rank=2))  # DDP itself would refuse most of these first
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(("what", "word"), [("frozen", "head"), ("shape", "head"), ("name", "head"), ("dtype", "head")])
def test_ranks_with_other_parameters_find_out_together(what: str, word: str) -> None:
    left, right = run_ranks(_other_parameters, 2, what)
    assert left == right
    assert "parameters" in left and word in left and "rank 1" in left


def _invalid_on_one_rank(rank: int) -> tuple[str, str]:
    glob = "*.wieght" if rank == 1 else "*.weight"  # the typing error is on rank 1 only
    try:
        GradientSync(t.Net(), policy=[(glob, LowRank(rank=2)), ("*", Dense())])
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", "accepted"


def test_settings_that_are_invalid_on_one_rank_only_are_refused_by_all() -> None:
    left, right = run_ranks(_invalid_on_one_rank, 2, timeout=12)
    assert left[0] == right[0] == "ValueError", (left, right)
    assert "wieght" in left[1] and "wieght" in right[1]


def test_without_a_process_group_the_error_says_what_to_call() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        GradientSync(t.Net(), LowRank(rank=2))


def _never_registered(rank: int, strict: bool, num_states: int) -> list[tuple[int, str]]:
    models = [DistributedDataParallel(t.Net(seed)) for seed in range(num_states)]
    states = [GradientSync(model, LowRank(rank=2), strict=strict) for model in models]
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.01)
    unrelated = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    events = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            unrelated.step()
            for model in models:
                t.backward(model, t.inputs(rank, step))
            try:
                optimizer.step()
            except RuntimeError as error:
                events.append((step, f"error: {error}"))
            events += [(step, f"warning: {one.message}") for one in caught if "hook" in str(one.message)]
            caught.clear()
    assert len(states) == num_states
    return events


def test_a_hook_that_never_runs_raises_at_the_second_step() -> None:
    for events in run_ranks(_never_registered, 2, True, 1):
        assert [step for step, _ in events] == [1]
        assert events[0][1].startswith("error") and "register_comm_hook" in events[0][1]


@pytest.mark.parametrize("num_states", [1, 2])
def test_a_hook_that_never_runs_warns_once_a_state_if_not_strict(num_states: int) -> None:
    for events in run_ranks(_never_registered, 2, False, num_states):
        assert [step for step, _ in events] == [1] * num_states, events
        assert all(text.startswith("warning") and "register_comm_hook" in text for _, text in events)


def _registered(rank: int) -> int:
    model, state = t.wrap(t.Net())
    t.train(model, rank, 4)
    del model
    late = DistributedDataParallel(t.Net())
    state = GradientSync(late, LowRank(rank=2))
    t.train(late, rank, 1)  # one plain step is no mistake yet
    late.register_comm_hook(state, commcomp.comm_hook)
    t.train(late, rank, 3)
    return state.step


def test_a_hook_that_runs_is_left_in_peace() -> None:
    assert run_ranks(_registered, 2) == [3, 3]


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(8, 8, bias=False)
        self.large = nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.large(x).sum() + self.small(x[..., :8]).sum()


def _enlarging(rank: int, strict: bool, rounds: int, start_step: int) -> list[tuple[int, str]]:
    method = LowRank(rank=64, min_ratio=0, rounds=rounds)
    model, _ = t.wrap(Wide(), method, strict=strict, start_step=start_step)
    events = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(start_step + 3):
            model.zero_grad()
            try:
                model(t.inputs(rank, step, (4, 64))).backward()
            except RuntimeError as error:
                events.append((step, str(error)))
                break
            events += [(step, str(one.message)) for one in caught if "plain training sends" in str(one.message)]
            caught.clear()
    return events


@pytest.mark.parametrize("start_step", [0, 2])
@pytest.mark.parametrize("strict", [True, False])
def test_compression_that_enlarges_is_reported_after_the_first_compressed_step(strict: bool, start_step: int) -> None:
    for events in run_ranks(_enlarging, 2, strict, 2, start_step):
        assert [step for step, _ in events] == [start_step], events
        assert "large.weight" in events[0][1] and "rank" in events[0][1]


def _killed(rank: int, cap: float, factor_dtype: str) -> str:
    model, _ = t.wrap(t.Net(), LowRank(rank=2, factor_dtype=factor_dtype), bucket_cap_mb=cap)
    t.train(model, rank, 2)
    if rank == 1:
        model.module.layers[1].weight.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGKILL))
    try:
        t.train(model, rank, 1)
    except RuntimeError as error:
        return str(error)
    return "no error"


def _survive(rank: int, folder: str, *arguments: Any) -> None:
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    text = _killed(rank, *arguments)
    (Path(folder) / "survivor").write_text(text)


@pytest.mark.parametrize("factor_dtype", ["fp32", "int8"])
@pytest.mark.parametrize("cap", [t.ONE, t.MANY], ids=["one", "many"])
def test_the_backward_pass_of_a_killed_ranks_peer_raises(tmp_path: Path, cap: float, factor_dtype: str) -> None:
    processes = [
        ranks._context.Process(target=_survive, args=(rank, str(tmp_path), cap, factor_dtype), daemon=True)
        for rank in range(2)
    ]
    try:
        for process in processes:
            process.start()
        processes[0].join(60)
        assert processes[0].exitcode is not None, "the surviving rank hangs"
        assert (tmp_path / "survivor").read_text() != "no error"
        assert processes[0].exitcode == 0, "the surviving rank did not end cleanly"
        processes[1].join(10)
        assert processes[1].exitcode == -signal.SIGKILL
    finally:
        for process in processes:
            process.kill()
            process.join()


def _stuck(rank: int, folder: str, cap: float) -> tuple[str, bool]:
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=4))
    model, _ = t.wrap(t.Net(), bucket_cap_mb=cap)
    t.train(model, rank, 2)
    if rank == 1:
        deadline = time.monotonic() + 12
        while not (Path(folder) / "raised").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        return "waited", (Path(folder) / "raised").exists()
    try:
        t.train(model, rank, 1)
    except RuntimeError as error:
        (Path(folder) / "raised").touch()
        return str(error), True
    return "no error", False


def test_a_stuck_rank_ends_the_others_backward_pass_after_the_groups_timeout(tmp_path: Path) -> None:
    (text, raised), (_, seen) = run_ranks(_stuck, 2, str(tmp_path), t.MANY, timeout=40, init=False)
    assert raised and seen, text


SCRIPT = """
import sys, torch, torch.distributed as dist, commcomp
from tests import ddp_training as t
store = dist.FileStore(sys.argv[1], 1)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
model, state = t.wrap(t.Net())
t.train(model, 0, 3)
print(state.step)
"""


def test_a_process_that_cleans_up_nothing_ends_by_itself_with_status_zero(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "store")],
        env={**os.environ, "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
