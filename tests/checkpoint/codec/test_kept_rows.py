"""Rows that training leaves alone stay what the parent snapshot decodes to, in the lossy modes too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from commcomp.checkpoint import SnapshotStore
from commcomp.checkpoint.codec import matrices
from commcomp.checkpoint.codec.float_tensor import Other
from commcomp.checkpoint.codec.lattice import decode_chunk, encode_on_lattice
from commcomp.checkpoint.codec.models import Model
from commcomp.checkpoint.coded import PREVIOUS, HostTensor, Input, SideData
from tests.checkpoint.codec.training import Training

MODES = ("cautious", "standard", "compact")


class _Words:
    """An embedding of which few rows are used, trained so that only these change."""

    def __init__(self, words: int = 400) -> None:
        torch.manual_seed(0)
        self.embedding = nn.Embedding(words, 48, sparse=True)
        self.head = nn.Linear(48, 40, bias=False)
        self.optimizer = torch.optim.SparseAdam(list(self.embedding.parameters()), lr=3e-3)

    def step(self, count: int, most: int) -> None:
        for _ in range(count):
            tokens = torch.randint(0, most, (64,))
            loss = nn.functional.cross_entropy(self.head(self.embedding(tokens)), tokens % 40)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {"model": self.embedding.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.embedding.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def _tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    moments = state["optimizer"]["state"][0]
    return {"w": state["model"]["weight"], "m": moments["exp_avg"], "v": moments["exp_avg_sq"]}


def _is_the_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("keep_reference", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_rows_that_a_resumed_run_does_not_touch_stay_bit_for_bit(
    tmp_path: Path, mode: str, keep_reference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "CHUNK_VALUES", 48 * 150)  # chunks with some such rows, all, and few
    words, store = _Words(), SnapshotStore(tmp_path, mode=mode, threads=2, keep_reference=keep_reference)
    words.step(20, 400)
    store.save(1, words.state())
    words.load(store.load())
    before = _tensors(store.load())
    for step in (2, 3):
        words.step(10, 60)
        given = {name: value.clone() for name, value in _tensors(words.state()).items()}
        store.save(step, words.state())
        loaded = _tensors(store.load(step))
        for name in loaded:
            assert _is_the_same(loaded[name][60:], before[name][60:]), name
            assert not _is_the_same(loaded[name][:60], before[name][:60]), name
        assert (loaded["w"] - given["w"]).std() < 1.1 * (given["w"] - before["w"])[:60].std()
        words.load(store.load(step))
        before = loaded
    name = "optimizer/state/0/exp_avg"
    part = store.load_tensor(3, name, 48 * 140, 48 * 310)
    assert _is_the_same(part, loaded["m"].flatten()[48 * 140 : 48 * 310]) and store.verify() == []


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_never_change_are_the_same_in_all_deltas(tmp_path: Path, mode: str) -> None:
    """Of a run that is not resumed, so that they are not what the parent decodes to."""
    words, store = _Words(), SnapshotStore(tmp_path, mode=mode, threads=1)
    loaded = []
    for step in range(1, 5):
        words.step(15, 200)
        store.save(step, words.state())
        loaded.append(_tensors(store.load())["w"][200:])
    assert all(torch.equal(loaded[0], one) for one in loaded[1:])


def test_all_rows_or_one_may_be_kept_in_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "CHUNK_VALUES", 40 * 10)
    random = np.random.default_rng(0)
    before = random.normal(size=(37, 40)).astype(np.float32)
    before[3, 4], before[3, 5] = -0.0, np.nan
    for rows in ([3], range(10), range(37), [36]):
        kept = np.zeros(37, bool)
        kept[list(rows)] = True
        values = np.where(kept[:, None], before, before + random.normal(size=before.shape).astype(np.float32))
        tensor = HostTensor("w", "float32", (37, 40), np.ascontiguousarray(values).view(np.uint8).ravel())
        others = {"previous": Other(Input(PREVIOUS, "w"), before.view(np.uint8).ravel())}
        for model in (Model("previous", "constant", "linear", 3), Model("none", "constant", "linear", 3)):
            coded = encode_on_lattice(tensor, model, "even", 0.5, others, 8, "max", kept)
            assert coded.inputs == (Input(PREVIOUS, "w"),) and coded.reconstruction is not None
            made, side = [], SideData(coded.side)
            for number, chunk in enumerate(coded.chunks):
                start = number * coded.chunk_values
                count = min(coded.chunk_values, 37 * 40 - start)
                part = [others["previous"].data[4 * start : 4 * (start + count)]]
                made.append(decode_chunk(coded.header, side, chunk, start, count, part))
                for spoiled in (chunk[:-1], chunk + b"x", chunk[:-1][:-4] + b"\x00\x00\x00\x00"):
                    with pytest.raises(ValueError):
                        decode_chunk(coded.header, side, spoiled, start, count, part)
            back = np.concatenate(made)
            assert (back == coded.reconstruction).all()
            found = back.view(np.float32).reshape(37, 40)
            assert (found.view(np.int32)[kept] == before.view(np.int32)[kept]).all()
            error = np.abs(found - values)[~kept]
            assert (error[~np.isnan(error)] <= 0.5001).all()


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_second_moments_of_zero_in_an_exact_parent_do_not_stay(tmp_path: Path, mode: str, amsgrad: bool) -> None:
    training = Training("AdamW", amsgrad=amsgrad)
    training.step(10)
    moments = training.optimizer.state_dict()["state"][0]
    names = [name for name in moments if name.endswith("exp_avg_sq")]
    with torch.no_grad():
        for name in names:
            moments[name][:60, 3] = 0
    SnapshotStore(tmp_path, mode="lossless").save(1, training.state())
    with torch.no_grad():
        training.model["embedding"].weight[100:] *= 1.01
        moments["exp_avg"][100:] *= 0.9
    store = SnapshotStore(tmp_path, mode=mode)
    assert not store.save(2, training.state()).keyframe
    loaded = store.load(2)["optimizer"]["state"][0]
    assert len(names) == 1 + amsgrad
    for name in names:
        assert (loaded[name] > 0).all() and loaded[name][:60, 3].max() < 1e-30
    assert torch.equal(loaded["exp_avg"][60:100], moments["exp_avg"][60:100])  # such rows do stay
