"""A store: chains, parents, keyframes, pruning, locks and saving in the background."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from commcomp.checkpoint import (
    DamagedFileError,
    MissingSnapshotError,
    SnapshotError,
    SnapshotStore,
    StoreLockedError,
    WrongParentError,
    hashing,
)
from commcomp.checkpoint.exact_codec import ExactEncoder
from tests.checkpoint.codecs import RoundingEncoder, XorEncoder
from tests.checkpoint.states import assert_same, changing_state, random_tensor, states, training_state


def _files(store: SnapshotStore) -> list[str]:
    return sorted(name for name in os.listdir(store.path) if name != ".lock")


@pytest.mark.parametrize("keep_reference", [True, False])
@pytest.mark.parametrize("encoder", [ExactEncoder(), XorEncoder(33)])
def test_a_chain_of_twenty(tmp_path, with_codecs, encoder, keep_reference):
    store = SnapshotStore(tmp_path, keyframe_every=20, keep_reference=keep_reference, encoder=encoder)
    for step in range(20):
        state = {**changing_state(step), "same": torch.arange(3000)}
        report = store.save(step, state, {"step": step})
        assert report.parent == (step - 1 if step else None)
        assert report.bytes == os.path.getsize(report.path) and report.ratio == report.raw_bytes / report.bytes
        assert report.kept_bytes == (report.raw_bytes if keep_reference else 0)
    assert store.verify() == []
    for step in (19, 0, 7):
        assert_same({**changing_state(step), "same": torch.arange(3000)}, store.load(step))
    assert store.info(7).metadata == {"step": 7} and store.steps() == list(range(20))
    assert store.save(20, changing_state(20)).keyframe


def test_copies_for_the_background_take_turns_in_two_memories(tmp_path, with_codecs):
    """From the second call on no memory is new, whatever became of the states before."""
    store = SnapshotStore(tmp_path, encoder=XorEncoder(33))
    kept = []
    for step in range(4):
        report = store.save_async(step, changing_state(step)).result()
        assert report.kept_bytes == 2 * report.raw_bytes
        arrays = [*store._saver._reference.arrays.values(), *store._saver._spare.values()]
        kept.append({array.ctypes.data for array in arrays})
        assert len(kept[-1]) == len(arrays)
    assert kept[0] == kept[1] == kept[2] == kept[3]
    for step in range(4):
        assert_same(changing_state(step), store.load(step))


def test_reserved_memory_is_what_the_first_copy_is_made_in(tmp_path):
    store = SnapshotStore(tmp_path)
    store.reserve(training_state(0))
    reserved = {name: array.ctypes.data for name, array in store._saver._spare.items()}
    store.reserve(training_state(1))  # a second time takes nothing
    assert {name: array.ctypes.data for name, array in store._saver._spare.items()} == reserved
    store.save_async(1, training_state(1)).result()
    reference = store._saver._reference.arrays
    assert {name: array.ctypes.data for name, array in reference.items()} == reserved
    store.reserve({**training_state(1), "more": torch.ones(9)})
    assert {"more", *reserved} == store._saver._spare.keys()
    with pytest.raises(TypeError, match="set"):
        store.reserve({"a": {1, 2}})
    store.save_async(2, training_state(2)).result()
    for step in (1, 2):
        assert_same(training_state(step), store.load(step))


def test_training_states_through_reopened_stores(tmp_path):
    for step in range(6):
        store = SnapshotStore(tmp_path, keyframe_every=3)
        store.save(step * 10, training_state(step))
    for step in range(6):
        loaded = SnapshotStore(tmp_path).load(step * 10)
        assert_same(training_state(step), loaded)
        assert loaded["model"]["weight"] is loaded["model"]["tied"]
    assert [store.info(step).parent for step in store.steps()] == [None, 0, 10, None, 30, 40]


def test_a_resumed_optimizer_goes_on_as_before(tmp_path):
    def made():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            model(torch.randn(16, 5, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()

    model, optimizer = made()
    store = SnapshotStore(tmp_path)
    train(model, optimizer, range(3))
    store.save(3, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(3, 6))
    other, its_optimizer = made()
    loaded = store.load()
    other.load_state_dict(loaded["model"])
    its_optimizer.load_state_dict(loaded["optimizer"])
    train(other, its_optimizer, range(3, 6))
    assert_same(model.state_dict(), other.state_dict())
    assert_same(optimizer.state_dict(), its_optimizer.state_dict())


@pytest.mark.parametrize("keep_reference", [True, False])
def test_lossy_chains_hold_their_bound_and_survive_pruning(tmp_path, with_codecs, keep_reference):
    """Each delta is against what decoding the parent gives, not against what was saved."""
    store = SnapshotStore(tmp_path, encoder=RoundingEncoder(), keep_reference=keep_reference)
    given_values = [torch.linspace(-1, 1, 400) * (1 + step / 50) for step in range(6)]
    for step, values in enumerate(given_values):
        store.save(step, {"w": values, "n": torch.arange(40)})
    before = [store.load(step)["w"] for step in range(6)]
    assert any(store.info(step).parent is not None for step in range(6))
    for step in range(6):
        assert 0 < (before[step] - given_values[step]).abs().max() <= RoundingEncoder.step / 2 * 1.001
    report = store.prune(steps=[0, 2])
    assert report.removed == (0, 2) and report.recoded == (1, 3)
    for step in (1, 3, 4, 5):
        assert_same(before[step], store.load(step)["w"])
        bounds = {tensor.name: tensor.bound for tensor in store.info(step).tensors}
        assert bounds == {"w": {"absolute": RoundingEncoder.step / 2}, "n": None}
    assert store.info(1).parent is None and store.info(4).parent == 3 and store.verify() == []


def test_files_do_not_depend_on_threads_or_the_way_of_saving(tmp_path):
    small = [random_tensor("int8", (9,), seed) for seed in range(30)]
    big = {"w": random_tensor("float32", (700_000,)), "z": torch.zeros(900_000), "s": small}
    contents = set()
    for number, threads in enumerate((1, 2, 8)):
        for way in ("save", "save_async"):
            store = SnapshotStore(tmp_path / f"{number}{way}", threads=threads, keep_reference=way == "save")
            for step in (0, 1):
                result = getattr(store, way)(step, {**big, "step": torch.tensor(step)})
                if way == "save_async":
                    result.result()
            contents.add(tuple((Path(store.path) / name).read_bytes() for name in _files(store)))
    assert len(contents) == 1


def test_unchanged_and_repeated_tensors_are_stored_once(tmp_path):
    store = SnapshotStore(tmp_path)
    big = random_tensor("float32", (100_000,))
    first = store.save(0, {"a": big, "b": big.clone(), "c": big.clone()})
    second = store.save(1, {"a": big, "b": big.clone(), "c": big.clone()})
    assert first.bytes < 1.01 * 400_000 + 2000 and second.bytes < 4000 and second.parent == 0
    assert store.load(1)["a"] is not store.load(1)["b"]


def test_a_wrong_a_missing_and_a_changed_parent(tmp_path):
    store = SnapshotStore(tmp_path / "one")
    for step in range(3):
        store.save(step, changing_state(1))
    other = SnapshotStore(tmp_path / "other")
    other.save(0, changing_state(2))
    parent, kept = Path(store._files.path_of(0)), tmp_path / "kept"
    shutil.copy(parent, kept)
    shutil.copy(other._files.path_of(0), parent)
    for step in (1, 2):
        with pytest.raises(WrongParentError, match=r"step 0 with state hash .* put that file back"):
            store.load(step)
    assert_same(changing_state(2), store.load(0))
    parent.unlink()
    with pytest.raises(WrongParentError, match=r"step-000000000000\.ccsnap is missing"):
        store.load(2)
    problems = store.verify()
    assert [problem.split(":")[0] for problem in problems] == ["step 1", "step 2"]
    shutil.copy(kept, parent)
    assert store.verify() == []
    data = bytearray(parent.read_bytes())
    data[len(data) // 2] ^= 4
    parent.write_bytes(data)
    with pytest.raises((DamagedFileError, WrongParentError), match=parent.name):
        store.load(2)


@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_a_parent_that_is_damaged_is_not_built_upon(tmp_path, damage):
    SnapshotStore(tmp_path).save(0, changing_state(0))
    SnapshotStore(tmp_path).save(1, changing_state(0))
    path = tmp_path / f"step-{0 if damage == 'missing' else 1:012d}.ccsnap"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "cut" else data[:30] + b"\xff" + data[31:])
    store = SnapshotStore(tmp_path)
    with pytest.warns(UserWarning, match=f"step 2 is saved without a parent: .*{path.name}"):
        assert store.save(2, changing_state(0)).keyframe
    assert_same(changing_state(0), store.load())


def test_a_damaged_payload_found_while_encoding(tmp_path, with_codecs):
    store = SnapshotStore(tmp_path, encoder=XorEncoder(100), keep_reference=False)
    store.save(0, changing_state(0))
    path = Path(store._files.path_of(0))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="without a parent"):
        assert store.save(1, changing_state(1)).keyframe
    assert_same(changing_state(1), store.load(1))
    assert sorted(_files(store)) == [path.name, "step-000000000001.ccsnap"]


def test_a_delta_that_gains_nothing_is_no_delta(tmp_path):
    store = SnapshotStore(tmp_path)
    assert store.save(0, {"w": torch.zeros(10_000), "n": torch.zeros(100)}).keyframe
    state = {"w": random_tensor("float32", (10_000,)), "n": torch.zeros(100)}
    assert store.save(1, state).parent is None  # "n" alone would be less of a file, but not by much
    assert store.save(2, {"w": random_tensor("float32", (10_000,), 1), "m": torch.ones(3)}).parent is None
    assert len(_files(store)) == 3


def test_steps_in_between_and_from_numpy(tmp_path):
    import numpy as np

    store = SnapshotStore(tmp_path)
    store.save(np.int64(10), changing_state(1))
    store.save(20, changing_state(1))
    assert store.save(15, changing_state(1)).parent == 10 and store.info(20).parent == 10
    for wrong in (-1, 10**12):
        with pytest.raises(ValueError, match=f"step={wrong}"):
            store.save(wrong, {})
    for wrong in (1.0, True, "1"):
        with pytest.raises(TypeError, match="expected an int"):
            store.save(wrong, {})


def test_saving_a_step_again(tmp_path):
    store = SnapshotStore(tmp_path)
    for step in (0, 1):
        store.save(step, changing_state(0))
    with pytest.raises(SnapshotError, match=r"has a snapshot of step 1; pass overwrite=True"):
        store.save(1, changing_state(1))
    with pytest.raises(SnapshotError, match=r"step-0+\.ccsnap cannot be overwritten: .*step-0+1\.ccsnap was coded"):
        store.save(0, changing_state(1), overwrite=True)
    store.save(1, changing_state(5), overwrite=True)
    assert_same(changing_state(5), store.load(1))
    store.save(2, changing_state(5))
    assert_same(changing_state(5), store.load(2))
    assert store.verify() == []


def test_what_is_missing_is_told_with_what_is_there(tmp_path):
    store = SnapshotStore(tmp_path / "new")
    for call in (store.load, store.info):
        with pytest.raises(MissingSnapshotError, match="no snapshot yet"):
            call()
    assert not (tmp_path / "new").exists() and store.steps() == [] and store.verify() == []
    store.save(5, {"model": {"w": torch.ones(2)}})
    with pytest.raises(MissingSnapshotError, match="no snapshot of step 4; it has the steps 5"):
        store.load(4)
    with pytest.raises(MissingSnapshotError, match=r"no tensor like x\*; it has 'model/w'"):
        store.load(tensors="x*")
    with pytest.raises(NotADirectoryError, match="a store of snapshots is one"):
        SnapshotStore(store._files.path_of(5))


def test_loading_a_part(tmp_path):
    store = SnapshotStore(tmp_path)
    state = training_state(3)
    store.save(3, state)
    loaded = store.load(3, tensors=["model/*", "*exp_avg"])
    assert_same(state["model"], loaded["model"])
    assert list(loaded["optimizer"]["state"][0]) == ["exp_avg"] and "table" not in loaded and loaded["step"] == 3


@pytest.mark.parametrize(
    "settings_, words",
    [
        ({"mode": "loud"}, "mode='loud'; expected one of 'lossless'"),
        ({"keyframe_every": 0}, "keyframe_every=0; expected 1 to"),
        ({"threads": 0}, "threads=0; expected at least 1"),
    ],
)
def test_wrong_settings(tmp_path, settings_, words):
    with pytest.raises(ValueError, match=words):
        SnapshotStore(tmp_path, **settings_)


def test_metadata_is_json(tmp_path):
    store = SnapshotStore(tmp_path)
    for wrong in ({"a": float("nan")}, {"a": torch.ones(1)}, [1]):
        with pytest.raises(TypeError, match="metadata"):
            store.save(0, {}, wrong)
    assert _files(store) == []


def test_a_renamed_file_is_told(tmp_path):
    store = SnapshotStore(tmp_path)
    store.save(1, changing_state(0))
    os.rename(store._files.path_of(1), store._files.path_of(2))
    with pytest.raises(DamagedFileError, match="holds step 1; the name says 2"):
        store.load(2)


# Pruning


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(removed=st.sets(st.integers(0, 7)), every=st.integers(1, 5))
def test_pruning_keeps_what_it_keeps(tmp_path_factory, with_codecs, removed, every):
    store = SnapshotStore(tmp_path_factory.mktemp("prune"), keyframe_every=every, encoder=XorEncoder(100))
    for step in range(8):
        store.save(step, changing_state(step))
    report = store.prune(steps=removed)
    assert report.removed == tuple(sorted(removed))
    kept = sorted(set(range(8)) - removed)
    assert store.steps() == kept and store.verify() == []
    for step in kept:
        assert_same(changing_state(step), store.load(step))
    store.save(9, changing_state(9))
    assert_same(changing_state(9), store.load())


def test_pruning_by_number(tmp_path):
    store = SnapshotStore(tmp_path)
    for step in range(6):
        store.save(step, changing_state(0))
    report = store.prune(keep=2)
    assert (report.removed, report.recoded) == ((0, 1, 2, 3), (4,)) and store.steps() == [4, 5]
    assert store.prune(keep=9).removed == () and store.verify() == []
    for wrong in ({}, {"keep": 1, "steps": [4]}, {"keep": 0}):
        with pytest.raises(ValueError):
            store.prune(**wrong)
    with pytest.raises(MissingSnapshotError, match="no snapshot of step 3"):
        store.prune(steps=[3])


def test_pruning_refuses_when_a_child_cannot_be_read(tmp_path):
    store = SnapshotStore(tmp_path)
    for step in range(3):
        store.save(step, changing_state(0))
    path = Path(store._files.path_of(1))
    data = path.read_bytes()
    path.write_bytes(data[:-9])
    before = _files(store)
    with pytest.raises(DamagedFileError, match=path.name):
        store.prune(steps=[0])
    assert _files(store) == before
    assert store.prune(steps=[1, 2]).removed == (1, 2) and store.verify() == []


def test_a_reader_meets_pruning(tmp_path):
    """The parent goes after the child was opened: the child was coded anew by then, and is opened once more."""
    store = SnapshotStore(tmp_path)
    for step in (0, 1):
        store.save(step, changing_state(0))
    calls = []

    def read(chain):
        calls.append(chain)
        if len(calls) == 1:
            SnapshotStore(tmp_path).prune(steps=[0])
        return [reader.header.step for reader in chain.open_all()]

    assert store._files.read(1, read) == [1] and len(calls) == 2


# Writers


def _exit_code_of_a_child(call) -> int:
    """7 if the call raises StoreLockedError in another process."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            call()
            code = 0
        except StoreLockedError as error:
            code = 7 if f"process {os.getppid()}" in str(error) else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_second_writer_is_refused_at_once(tmp_path):
    store, other = SnapshotStore(tmp_path), SnapshotStore(tmp_path)
    entered, leave = threading.Event(), threading.Event()

    class Waits(ExactEncoder):
        def __call__(self, *args):
            entered.set()
            assert leave.wait(60)
            return super().__call__(*args)

    future = SnapshotStore(tmp_path, encoder=Waits()).save_async(1, changing_state(1))
    assert entered.wait(60)
    for call in (lambda: store.save(2, {}), lambda: store.save_async(2, {}), lambda: other.prune(keep=1)):
        with pytest.raises(StoreLockedError, match=rf"another writer \(process {os.getpid()}\); wait for it"):
            call()
    assert _exit_code_of_a_child(lambda: store.save(3, {})) == 7
    assert store.steps() == []  # readers may look
    leave.set()
    future.result(60)
    assert _exit_code_of_a_child(lambda: SnapshotStore(tmp_path, threads=1).save(2, {})) == 0
    assert store.steps() == [1, 2]


def test_leftovers_of_dead_writers_go(tmp_path):
    store = SnapshotStore(tmp_path)
    store.save(0, {})
    (tmp_path / ".tmp-1-abc").write_bytes(b"half a snapshot")
    assert store.steps() == [0]
    store.save(1, {})
    assert len(_files(store)) == 2


def test_another_writers_snapshot_is_taken_as_parent(tmp_path):
    one, other = SnapshotStore(tmp_path), SnapshotStore(tmp_path)
    one.save(0, changing_state(0))
    other.save(1, changing_state(1))
    assert one.save(2, changing_state(1)).parent == 1
    assert_same(changing_state(1), one.load())


# In the background


def test_what_changes_after_the_call_changes_nothing(tmp_path):
    state = training_state(1)
    state["array"] = state["table"].numpy()
    expected = {**training_state(1), "array": training_state(1)["table"].numpy()}
    with SnapshotStore(tmp_path) as store:
        futures = []
        for step in range(4):
            future = store.save_async(step, state)
            state["model"]["weight"].add_(1)
            state["table"].zero_()
            state["optimizer"]["param_groups"][0]["lr"] = 5.0
            state["model"]["bias"].fill_(3)
            state["new"] = 1
            assert_same(expected, store.load(step))  # waits
            futures.append(future)
            for name in ("weight", "bias"):
                state["model"][name].copy_(training_state(1)["model"][name])
            state["table"].copy_(training_state(1)["table"])
            state["optimizer"]["param_groups"][0]["lr"] = 1e-3
            del state["new"]
        assert [future.result().parent for future in futures] == [None, 0, 1, 2]


class _Fails(ExactEncoder):
    def __call__(self, *args):
        raise RuntimeError("the encoder failed")
        yield


def test_errors_in_the_background_come_out(tmp_path):
    store = SnapshotStore(tmp_path, encoder=_Fails())
    future = store.save_async(0, changing_state(0))
    with pytest.raises(RuntimeError, match="the encoder failed"):
        future.result()
    store.close()  # it was seen
    for call in (lambda: store.save(1, {}), lambda: store.load(), store.close, lambda: store.save_async(1, {})):
        store.save_async(0, changing_state(0))
        with pytest.raises(SnapshotError, match="saved in the background failed: the encoder failed"):
            call()
    assert _files(store) == []
    SnapshotStore(tmp_path).save(0, {})  # the lock is free


def test_errors_before_the_background_come_at_once(tmp_path):
    store = SnapshotStore(tmp_path)
    with pytest.raises(TypeError, match=r"builtins\.set"):
        store.save_async(0, {"a": {1}})
    store.save_async(0, {}).result()
    with pytest.raises(SnapshotError, match="overwrite=True"):
        store.save_async(0, {})
    store.save(1, {})


def test_verify_saves_reads_what_was_written(tmp_path, with_codecs, monkeypatch):
    from commcomp.checkpoint import codec_registry

    store = SnapshotStore(tmp_path, encoder=XorEncoder(50), verify_saves=True)
    store.save(0, changing_state(0))
    store.save(1, changing_state(1))
    decode = codec_registry.decoders["xor"]
    monkeypatch.setitem(codec_registry.decoders, "xor", lambda *args: decode(*args) ^ 1)
    with pytest.raises(DamagedFileError, match="decoded values have hash"):
        store.save(2, changing_state(2))
    assert store.steps() == [0, 1] and len(_files(store)) == 2


def test_a_failed_save_leaves_the_reference_as_it_was(tmp_path):
    class Sometimes(ExactEncoder):
        fails = False

        def __call__(self, *args):
            for number, coded in enumerate(super().__call__(*args)):
                if self.fails and number == 1:
                    raise RuntimeError("halfway")
                yield coded

    encoder = Sometimes()
    store = SnapshotStore(tmp_path, encoder=encoder)
    store.save(0, changing_state(0))
    encoder.fails = True
    with pytest.raises(RuntimeError, match="halfway"):
        store.save(1, changing_state(1))
    encoder.fails = False
    assert store.save(1, changing_state(0)).parent == 0
    assert_same(changing_state(0), store.load(1))
    assert store.verify() == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(st.lists(states, min_size=2, max_size=4))
def test_any_states_one_after_the_other(tmp_path_factory, with_codecs, chain):
    """Tensors come, go and change dtype and shape under the same names."""
    store = SnapshotStore(tmp_path_factory.mktemp("any"), encoder=XorEncoder(3), threads=1)
    for step, state in enumerate(chain):
        store.save(step, state)
    for step, state in enumerate(chain):
        assert_same(state, store.load(step))


def test_without_xxhash_the_remedy_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xxhash", None)
    importlib.reload(hashing)  # importing needs none
    with pytest.raises(ImportError, match=re.escape("pip install 'commcomp[checkpoint]'")):
        SnapshotStore(tmp_path)


# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("way", ["save", "save_async"])
def test_tensors_on_a_gpu_come_back_on_the_cpu(tmp_path, way):
    names = ("float32", "bfloat16", "float8_e4m3fn", "bool", "complex64", "int64")
    tensors = {name: random_tensor(name, (30, 7)) for name in names}
    state = {name: tensor.cuda() for name, tensor in tensors.items()}
    state |= {"transposed": state["float32"].T, "part": state["bfloat16"][3:9], "again": state["int64"]}
    store = SnapshotStore(tmp_path)
    for step in range(3):
        result = getattr(store, way)(step, state)
        if way == "save_async":
            state["float32"].zero_()
            result.result()
            state["float32"].copy_(tensors["float32"])
        expected = {**tensors, "transposed": tensors["float32"].T, "part": tensors["bfloat16"][3:9]}
        assert_same({**expected, "again": tensors["int64"]}, store.load())


def test_a_relative_path_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = SnapshotStore("runs/store")
    store.save(1, {"w": torch.ones(3)})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.save(2, {"w": torch.ones(3)})
    assert store.steps() == [1, 2] and SnapshotStore(tmp_path / "runs/store").steps() == [1, 2]
