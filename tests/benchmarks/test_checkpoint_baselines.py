"""How lossless coders are measured on snapshots: which values, and that a wrong decoding is no result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.byte_coders import CODERS, size_of
from benchmarks.checkpoint_baselines import classes_of, measure, measure_parts
from benchmarks.checkpoint_training import TrainingRun, adam_tensors, settings, with_bf16_weights

TINY = {"layers": 1, "heads": 2, "width": 16, "context": 16, "vocabulary": 256}


@pytest.fixture
def run() -> TrainingRun:
    run = TrainingRun(settings(TINY, steps=20, warmup_steps=2, batch=2, eval_batches=1, eval_batch=2))
    run.advance(2)
    return run


def test_moments_belong_to_their_weights(run: TrainingRun) -> None:
    by_parameter = {parameter: name for name, parameter in run.model.named_parameters()}
    tensors = adam_tensors(run.state())
    assert set(tensors) == set(by_parameter.values())
    for parameter, moments in run.optimizer.state.items():
        weight, first, second = tensors[by_parameter[parameter]]
        assert torch.equal(weight, parameter)
        assert torch.equal(first, moments["exp_avg"])
        assert torch.equal(second, moments["exp_avg_sq"])


def test_classes_hold_all_bits(run: TrainingRun) -> None:
    state = run.state()
    classes = classes_of(state)
    names = list(adam_tensors(state))
    weights = torch.cat([state["model"][name].flatten() for name in names])
    np.testing.assert_array_equal(classes["w"].view(np.float32), weights.numpy())
    rounded = with_bf16_weights(state)["model"]
    expected = torch.cat([rounded[name].flatten() for name in names]).float()
    np.testing.assert_array_equal((classes["bf16 w"].astype(np.uint32) << 16).view(np.float32), expected.numpy())


def test_a_wrong_decoding_is_refused() -> None:
    values = np.arange(100, dtype=np.uint32)
    wrong = replace(CODERS["zstd-3"], decode=lambda streams, previous: values[::-1].copy())
    with pytest.raises(ValueError, match="zstd-3 did not give back the 100 values"):
        measure(wrong, values, values)


def test_parts_stand_for_the_whole() -> None:
    values = np.random.default_rng(0).standard_normal(3 * 2**19).astype(np.float32).view(np.uint32)
    parts = measure_parts(CODERS["zstd-3"], values, values, 2**20)
    whole = measure_parts(CODERS["zstd-3"], values, values, 2**30)
    assert parts["sampled_share"] == pytest.approx(1 / 6)
    assert parts["raw_bytes"] == pytest.approx(whole["raw_bytes"])
    assert parts["bytes"] == pytest.approx(whole["bytes"], rel=0.01)
    assert "sampled_share" not in whole
    assert whole["bytes"] == size_of(CODERS["zstd-3"].encode(values, values))
