"""DeltaStorageWriter and DeltaStorageReader on real ranks: chains, other world sizes, crashes, damage."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from commcomp.checkpoint import DamagedFileError, DeltaStorageReader, DeltaStorageWriter, parallel
from commcomp.checkpoint.container_reader import SnapshotReader
from commcomp.checkpoint.distributed.run_folder import RunFolder
from tests.checkpoint.distributed.training import Training, emptied, whole
from tests.ranks import run_ranks

STEPS = (20, 21, 40)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def _save(rank: int, run: str, kind: str, steps: tuple[int, ...], options: dict[str, Any]) -> dict[str, Any]:
    training = Training(kind, flat=options.pop("flat", False))
    for step in steps:
        training.train(step)
        dcp.save(training.state(), storage_writer=DeltaStorageWriter(run, step, threads=1, **options))
    return whole(training.state())


def _load(rank: int, run: str, kind: str, step: int | None, flat: bool = False) -> dict[str, Any]:
    training = Training(kind, flat=flat)
    training.train(1)  # so that the optimizer has its state
    state = emptied(training.state())
    dcp.load(state, storage_reader=DeltaStorageReader(run, step, threads=1))
    return whole(state)


def _save_alone(run: Path | str, steps: tuple[int, ...], **options: Any) -> list[dict[str, Any]]:
    training, states = Training("alone"), []
    for step in steps:
        training.train(step)
        dcp.save(training.state(), storage_writer=DeltaStorageWriter(run, step, threads=1, **options))
        states.append(whole(training.state()))
    return states


def _load_alone(run: Path | str, step: int | None = None, **options: Any) -> dict[str, Any]:
    training = Training("alone")
    training.train(1)
    state = emptied(training.state())
    dcp.load(state, storage_reader=DeltaStorageReader(run, step, threads=1, **options))
    return whole(state)


def _centers(path: str | Path) -> dict[str, str]:
    with SnapshotReader(path) as reader:
        return {n: str(t.header.settings.get("center", t.header.method)) for n, t in reader.tensors.items()}


@pytest.mark.parametrize(("kind", "flat"), [("fsdp", False), ("ddp", True)])
def test_saved_on_two_ranks_a_chain_loads_exactly_on_one_two_and_four(tmp_path: Path, kind: str, flat: bool) -> None:
    run = str(tmp_path / "run")
    saved = run_ranks(_save, 2, run, kind, STEPS, {"flat": flat})[0]
    folder = RunFolder(run)
    assert folder.steps() == list(STEPS)
    assert [folder.read(step).chain for step in STEPS] == [1, 2, 3]
    for ranks, loading in ((2, kind), (4, "fsdp")):
        for loaded in run_ranks(_load, ranks, run, loading, None, flat):
            assert loaded == saved
    training = Training("alone", flat=flat)
    training.train(1)
    state = emptied(training.state())
    dcp.load(state, storage_reader=DeltaStorageReader(run))
    alone = whole(state)
    assert alone == saved
    assert run_ranks(_load, 2, run, kind, 20, flat)[0]["step"] == 20
    for rank in (0, 1):  # weights meet their moments on both ranks, one step of Adam is replayed
        first, second, third = (_centers(folder.rank_file(step, rank)) for step in STEPS)
        assert "first growth" in first.values(), first
        assert {"squared", "adam", "decayed"} <= set(second.values()), second
        assert {"growth", "previous"} <= set(third.values()), third


@pytest.mark.parametrize("where", ["state", "group"])
def test_steps_that_are_no_tensors_are_replayed_too(tmp_path: Path, where: str) -> None:
    run = str(tmp_path)
    run_ranks(_save_with_whole_steps, 2, run, where)
    for rank in (0, 1):
        assert {"squared", "adam", "decayed"} <= set(_centers(RunFolder(run).rank_file(21, rank)).values())


def _save_with_whole_steps(rank: int, run: str, where: str) -> None:
    training = Training("ddp")
    for step in (20, 21):
        training.train(step)
        state = training.state()
        group = dict(state["optim"]["param_groups"][0])
        states = {name: dict(moments) for name, moments in state["optim"]["state"].items()}
        state["optim"] = {"state": states, "param_groups": [group]}
        for moments in states.values():
            count = int(moments.pop("step"))
            (moments if where == "state" else group)["step"] = count
        dcp.save(state, storage_writer=DeltaStorageWriter(run, step, threads=1))


def test_moving_averages_and_amsgrad_meet_their_weights(tmp_path: Path) -> None:
    training = Training("alone")
    training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=1e-3, amsgrad=True)
    ema = {name: value.clone() for name, value in training.model.state_dict().items()}
    for step in (1, 2):
        training.train(step)
        for name, value in training.model.state_dict().items():
            ema[name].lerp_(value, 0.1)
        dcp.save({**training.state(), "ema": ema}, storage_writer=DeltaStorageWriter(tmp_path, step, threads=1))
    centers = _centers(RunFolder(tmp_path).rank_file(2, 0))
    assert centers["ema.wide.weight/(0, 0)"] == "average"
    assert centers["optim.state.wide.weight.max_exp_avg_sq/(0, 0)"] == "largest"
    back = {"ema": {name: torch.zeros_like(value) for name, value in ema.items()}}
    dcp.load(back, storage_reader=DeltaStorageReader(tmp_path))
    assert all(torch.equal(back["ema"][name], value) for name, value in ema.items())


def test_a_save_on_other_ranks_starts_anew_where_shards_changed(tmp_path: Path) -> None:
    run = str(tmp_path)
    run_ranks(_save, 2, run, "fsdp", (20,), {})
    saved = _save_alone(run, (22,))[-1]
    assert RunFolder(run).read(22).parent in (None, 20)
    with SnapshotReader(RunFolder(run).rank_file(22, 0)) as reader:
        assert not any(t.header.inputs for n, t in reader.tensors.items() if n.startswith("model.wide.weight"))
    assert _load_alone(run) == saved


def test_shards_of_columns_are_read_as_rows_and_back(tmp_path: Path) -> None:
    run_ranks(_save_sharded, 2, str(tmp_path), 1)
    run_ranks(_save_sharded, 2, str(tmp_path), 0)
    assert all(run_ranks(_load_resharded, 4, str(tmp_path)))


def _matrix(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(70.0).reshape(7, 10).to(dtype)


def _save_sharded(rank: int, run: str, dim: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    state = {
        str(dtype): distribute_tensor(_matrix(dtype), mesh, [Shard(dim)]) for dtype in (torch.bfloat16, torch.int64)
    }
    dcp.save(state, storage_writer=DeltaStorageWriter(run, dim, threads=1))


def _load_resharded(rank: int, run: str) -> bool:
    """Over a mesh of two dims, one of which has copies; bit for bit."""
    mesh, same = init_device_mesh("cpu", (2, 2)), []
    for saved_dim in (0, 1):
        for placements in ([Replicate(), Shard(1)], [Shard(0), Shard(1)], [Shard(0), Replicate()]):
            state = {
                str(dtype): distribute_tensor(_matrix(dtype) * 0, mesh, placements)
                for dtype in (torch.bfloat16, torch.int64)
            }
            dcp.load(state, storage_reader=DeltaStorageReader(run, saved_dim, threads=1))
            same += [torch.equal(value.full_tensor(), _matrix(value.dtype)) for value in state.values()]
    return all(same)


def test_async_save_saves_what_was_there_when_it_was_called(tmp_path: Path) -> None:
    assert all(run_ranks(_save_async, 2, str(tmp_path)))


def _save_async(rank: int, run: str) -> bool:
    training, states = Training("fsdp"), {}
    for step in (5, 6):
        training.train(step)
        states[step] = whole(training.state())
        future = dcp.async_save(training.state(), storage_writer=DeltaStorageWriter(run, step, threads=1))
        training.optimizer.zero_grad()
        for parameter in training.model.parameters():
            parameter.data.mul_(1.0 + 1e-3)  # a trainer that goes on
        future.result()
    return all(_load(rank, run, "fsdp", step) == states[step] for step in (5, 6))


def test_a_rank_that_dies_before_the_end_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    run = str(tmp_path)
    saved = run_ranks(_save, 2, run, "ddp", (10,), {})[0]
    with pytest.raises(AssertionError, match="died"):
        run_ranks(_save_and_die, 2, run, timeout=30)
    assert any(name.startswith(".tmp-") for name in os.listdir(RunFolder(run).folder(11)))  # it had begun
    assert RunFolder(run).steps() == [10]
    assert _load_alone(run) == saved
    again = run_ranks(_save, 2, run, "ddp", (11,), {})[0]
    assert _load_alone(run, 11) == again and RunFolder(run).read(11).parent == 10
    assert not [name for name in os.listdir(RunFolder(run).folder(11)) if name.startswith(".tmp-")]


def _save_and_die(rank: int, run: str) -> None:
    class Dying(DeltaStorageWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            if rank == 1:
                Path(self._run.unfinished_file(11)).write_bytes(b"half")
                os._exit(9)
            return super().write_data(plan, planner)

    training = Training("ddp")
    training.train(11)
    with contextlib.suppress(RuntimeError):  # of rank 0, which loses rank 1
        dcp.save(training.state(), storage_writer=Dying(run, 11, threads=1))


def test_a_save_that_fails_on_one_rank_completes_nothing(tmp_path: Path) -> None:
    run = str(tmp_path)
    _save_alone(run, (1,))
    state = {"bad": torch.randn(3).to_sparse(), "good": torch.ones(3)}
    with pytest.raises(CheckpointException, match=r"bad.*not strided"):
        dcp.save(state, storage_writer=DeltaStorageWriter(run, 2))
    assert RunFolder(run).steps() == [1]


@pytest.mark.parametrize("mode", ["standard", "stored"])
def test_other_modes_keep_their_word(tmp_path: Path, mode: str) -> None:
    saved = _save_alone(tmp_path, (20, 25), mode=mode)[-1]
    loaded = _load_alone(tmp_path)
    assert loaded.keys() == saved.keys()
    exact = [name for name, value in saved.items() if loaded[name] == value]
    assert {"step", "extra.text", "extra.wide", "optim.state.wide.bias.step"} <= set(exact)
    if mode == "stored":
        assert len(exact) == len(saved)
    else:
        name = "optim.state.wide.weight.exp_avg_sq"
        assert name not in exact
        assert torch.frombuffer(bytearray(loaded[name]), dtype=torch.float32).gt(0).all()


def test_keyframes_come_as_often_as_asked_and_later_checkpoints_do_not_need_earlier_ones(tmp_path: Path) -> None:
    saved = _save_alone(tmp_path, (1, 2, 3, 4), keyframe_every=2)[-1]
    folder = RunFolder(tmp_path)
    assert [folder.read(step).parent for step in folder.steps()] == [None, 1, None, 3]
    for step in (1, 2):
        for name in os.listdir(folder.folder(step)):
            os.unlink(os.path.join(folder.folder(step), name))
    assert _load_alone(tmp_path) == saved


@pytest.mark.parametrize("keyframe_every", [1, 2])
def test_a_lossy_keyframe_is_no_coarser_than_a_delta(tmp_path: Path, keyframe_every: int) -> None:
    """Every save has a writer of its own, which knows nothing of the one before."""
    finest = []
    for name, most in (("keyframes", keyframe_every), ("deltas", 9)):
        run = tmp_path / name
        _save_alone(run, (20, 40, 43), mode="standard", keyframe_every=most)
        assert RunFolder(run).read(43).parent == (None if name == "keyframes" else 40)
        with SnapshotReader(RunFolder(run).rank_file(43, 0)) as reader:
            headers = {n: t.header for n, t in reader.tensors.items() if n.startswith("model.")}
        finest.append({n: h.bound["error"] for n, h in headers.items() if h.bound is not None})
    assert finest[0].keys() == finest[1].keys() and len(finest[0]) > 1
    assert all(finest[0][n] <= 1.1 * finest[1][n] for n in finest[0]), finest



def test_a_part_of_a_tensor_is_read_from_a_part_of_the_file(tmp_path: Path) -> None:
    weight = torch.randn(4000, 1000)
    dcp.save({"w": weight, "n": 1}, storage_writer=DeltaStorageWriter(tmp_path, 1, threads=1))
    opened: list[Any] = []

    class Watching(DeltaStorageReader):
        def _open(self, rank: int) -> Any:
            opened.append(super()._open(rank))
            return opened[-1]

    reader = Watching(tmp_path)
    size, index, out = torch.Size, MetadataIndex("w", torch.Size([0, 0])), torch.zeros(7, 300)
    item = ReadItem(LoadItemType.TENSOR, index, size([0, 0]), index, size([2001, 600]), size([7, 300]))

    class Planner:
        def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
            return out

        def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
            pass

    reader.read_metadata()
    reader.read_data(LoadPlan([item]), Planner())  # type: ignore[arg-type]
    assert torch.equal(out, weight[2001:2008, 600:900])
    assert opened[0].bytes_read < 0.4 * os.path.getsize(opened[0][0].path)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(CheckpointException, match="no complete checkpoint"):
        _load_alone(tmp_path)
    _save_alone(tmp_path, (20, 21))
    with pytest.raises(CheckpointException, match="step-000000000021 has a complete checkpoint"):
        _save_alone(tmp_path, (21,))
    with pytest.raises(CheckpointException, match=r"no complete checkpoint of step 5; .*20, 21"):
        _load_alone(tmp_path, 5)
    path = run.rank_file(21, 0)
    with SnapshotReader(path) as reader:
        chunk = reader.tensors["model.wide.weight/(0, 0)"].chunks[0]
    data = bytearray(Path(path).read_bytes())
    data[chunk.offset + 5] ^= 1
    Path(path).write_bytes(data)
    with pytest.raises(CheckpointException, match=r"step-000000000021/rank-00000.*model\.wide\.weight.*chunk 0"):
        _load_alone(tmp_path)
    data[chunk.offset + 5] ^= 1
    Path(path).write_bytes(data)
    os.rename(run.rank_file(20, 0), tmp_path / "away")
    with pytest.raises(CheckpointException, match=r"coded against step 20.*step-000000000020/rank-00000.*missing"):
        _load_alone(tmp_path)
    os.rename(path, run.rank_file(20, 0))
    with pytest.raises(CheckpointException, match=r"step-000000000021/rank-00000.ccsnap is missing"):
        _load_alone(tmp_path)
    with pytest.raises(CheckpointException, match=r"step-000000000020/rank-00000.*it was replaced"):
        _load_alone(tmp_path, 20)


def test_a_changed_description_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    _save_alone(tmp_path, (1,))
    path = Path(RunFolder(tmp_path).description_file(1))
    content = json.loads(path.read_bytes())
    content["checkpoint"]["items"][0][1]["size"] = [1 << 40]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointException, match=r"checkpoint\.json.*crc32"):
        _load_alone(tmp_path)
    for text in (b"", b"\x80\x04}.", b"[]", b'{"checkpoint": {}}', b"[" * 100000):
        path.write_bytes(text)
        with pytest.raises(CheckpointException, match=r"checkpoint\.json"):
            _load_alone(tmp_path)


def test_whatever_a_description_says_the_error_names_the_file(tmp_path: Path) -> None:
    """Nodes of it replaced at random, the checksum made anew."""
    _save_alone(tmp_path, (1,))
    folder, chance = RunFolder(tmp_path), random.Random(0)
    path = Path(folder.description_file(1))
    text, refused = path.read_text(), 0
    for _ in range(300):
        outer = json.loads(text)
        node: Any = outer["checkpoint"]
        while True:
            key = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], (dict, list)) or not node[key] or chance.random() < 0.1:
                node[key] = chance.choice([None, -1, 1 << 70, 0.5, "x", [], {}, [[1]], True, {"tensor": "x"}])
                break
            node = node[key]
        canonical = json.dumps(outer["checkpoint"], separators=(",", ":"), sort_keys=True).encode()
        path.write_text(json.dumps({**outer, "crc32": zlib.crc32(canonical)}))
        try:
            folder.read(1)
        except DamagedFileError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100


def test_what_a_description_cannot_express_is_named(tmp_path: Path) -> None:
    class Planner(DefaultSavePlanner):
        def create_global_plan(self, all_plans: Any) -> Any:
            plans, metadata = super().create_global_plan(all_plans)
            metadata.planner_data = {**metadata.planner_data, "mine": {1, 2}}
            return plans, metadata

    with pytest.raises(CheckpointException, match=r"planner's data cannot be kept.*'mine'.*set"):
        dcp.save({"t": torch.ones(1)}, storage_writer=DeltaStorageWriter(tmp_path, 1), planner=Planner())
    assert RunFolder(tmp_path).steps() == []


def test_a_rank_takes_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_cores", lambda: 32)
    found = []
    for ranks in ("", "4", "8", "64"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        found.append(parallel.default_threads_of_rank())
    assert found == [8, 8, 4, 1]


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def test_items_that_could_run_code_need_trust(tmp_path: Path) -> None:
    dcp.save({"a": _Evil(), "t": torch.ones(2)}, storage_writer=DeltaStorageWriter(tmp_path, 1))
    with pytest.raises(CheckpointException, match=r"item 'a' could run code.*trusted=True"):
        dcp.load({"a": 0, "t": torch.zeros(2)}, storage_reader=DeltaStorageReader(tmp_path))
    state = {"a": 0, "t": torch.zeros(2)}
    dcp.load(state, storage_reader=DeltaStorageReader(tmp_path, trusted=True))
    assert torch.equal(state["t"], torch.ones(2))  # type: ignore[arg-type]


def test_settings_are_checked(tmp_path: Path) -> None:
    for wrong in ({"mode": "best"}, {"keyframe_every": 0}, {"threads": 0}, {"step": -1}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            DeltaStorageWriter(tmp_path, **{"step": 1, **wrong})  # type: ignore[arg-type]
    writer = pickle.loads(pickle.dumps(DeltaStorageWriter(tmp_path, 1)))  # as dcp.async_save in a process does
    with pytest.raises(ValueError, match="leave checkpoint_id out"):
        dcp.save({"t": torch.ones(1)}, checkpoint_id="elsewhere", storage_writer=writer)
    planner = DefaultSavePlanner(enable_plan_caching=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"t": torch.ones(1)}, storage_writer=writer, planner=planner)
        with pytest.raises(CheckpointException, match="enable_plan_caching"):
            dcp.save({"t": torch.ones(1)}, storage_writer=DeltaStorageWriter(tmp_path, 2), planner=planner)
