"""What a compressor learns and keeps, when it acts, and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from commcomp.moe import LSH, MoEConfig, MoELayer, Quantized, TokenCompressor, compressing
from commcomp.moe.rate_control import EVERY, HashControl, ReachControl, due
from tests.moe.layers import clustered
from tests.ranks import run_ranks

WIDTH, EXPERTS = 24, 4


def _layer(*methods: Any) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(WIDTH, 16, EXPERTS, 2, compressor=TokenCompressor(*methods))


def _tokens(step: int, rank: int = 0) -> torch.Tensor:
    return clustered((8, 64, WIDTH), seed=100 * rank + step, points=60, noise=0.25)


@pytest.mark.parametrize("rate", [0.3, 0.6])
@pytest.mark.parametrize("search", ["nearest", "hash"])
def test_the_rate_comes_to_what_it_is_to_be(search, rate):
    layer = _layer(LSH(rate=rate, search=search, coords=16, farthest=None if search == "hash" else 0.9))
    for step in range(65 if search == "hash" else 40):
        layer(_tokens(step))
    rates = []
    for step in range(80, 90):
        layer(_tokens(step))
        rates.append(layer.compressor.stats()["rate"])
    # Of hashes and coordinates there are whole numbers, few of them, and they are changed seldom.
    assert sum(rates) / len(rates) == pytest.approx(rate, abs=0.15 if search == "hash" else 0.05)
    assert 0 < layer.compressor.stats()["residual"] < 1


def test_the_first_pass_goes_whole():
    layer = _layer(LSH(rate=0.3))
    layer(_tokens(0))
    assert layer.compressor.stats()["rate"] == 1.0
    layer(_tokens(1))
    assert layer.compressor.stats()["rate"] < 0.9


def _learnt(rank: int, passes: int) -> str:
    layer = _layer(LSH(rate=0.4, search="hash", coords=8))
    for step in range(passes):
        layer(_tokens(step, rank))
    return layer.compressor.get_extra_state()


@pytest.mark.parametrize("passes", [1, 2, 9])
def test_what_is_learnt_is_the_same_on_all_ranks_and_of_all_tokens(passes):
    one, other = run_ranks(_learnt, 2, passes)
    assert one == other
    assert one != _learnt(0, passes)


def _resumed(rank: int, folder: str) -> bool:
    """Saved at every pass in turn: the next ones are as if it had not been."""
    straight = _layer(LSH(rate=0.4), Quantized())
    states, outputs = [], []
    for step in range(10):
        states.append(copy.deepcopy(straight.state_dict()))
        outputs.append(straight(_tokens(step, rank))[0])
    for at, state in enumerate(states):
        path = f"{folder}/{rank}.pt"
        torch.save(state, path)
        layer = _layer(LSH(rate=0.4), Quantized())
        layer.load_state_dict(torch.load(path, weights_only=True))
        for step in range(at, 10):
            if not torch.equal(layer(_tokens(step, rank))[0], outputs[step]):
                return False
    return dist.get_world_size() == 2


def test_what_is_learnt_goes_through_a_state_dict(tmp_path):
    assert run_ranks(_resumed, 2, str(tmp_path)) == [True, True]


def test_evaluation_is_without_compression_unless_asked_for():
    layer, plain = _layer(LSH(rate=0.3), Quantized(dtype="int4")), _layer()
    for step in range(5):
        layer(_tokens(step))
    layer.eval(), plain.eval()
    state = layer.compressor.get_extra_state()
    with torch.no_grad():
        assert torch.equal(layer(_tokens(9))[0], plain(_tokens(9))[0])
        with compressing(layer):
            assert not torch.equal(layer(_tokens(9))[0], plain(_tokens(9))[0])
        assert torch.equal(layer(_tokens(9))[0], plain(_tokens(9))[0])
    assert layer.compressor.get_extra_state() == state


def test_settings_are_looked_at_often_at_first():
    assert [passes for passes in range(3 * EVERY) if due(passes)] == [1, 2, 4, 8, 16, 32, 64, 128]


def test_controls_move_the_right_way_and_stay_in_bounds():
    reach = ReachControl(0.3, 0.6)
    reach.adapt(60, 100)
    assert reach.value > 0.6
    risen = reach.value
    reach.adapt(10, 100)
    assert reach.value < risen
    hashes = HashControl(0.3)
    before = hashes.shape(64)
    hashes.adapt(10, 100)
    bits = [count * math.log2(2 * coords) for count, coords in (before, hashes.shape(64))]
    assert bits[1] > bits[0] + 2
    for rows in (0, 1000):
        for _ in range(100):
            reach.adapt(rows, 1000), hashes.adapt(rows, 1000)
            count, coords = hashes.shape(20)
            assert count * coords <= 32 and coords >= 1 and 0 < reach.value <= 4
    kept = hashes.value
    hashes.adapt(0, 0)
    assert hashes.value == kept


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LSH(rate=1.5), "LSH.rate is 1.5; expected a number between 0 and 1"),
        (lambda: LSH(rate=True), "LSH.rate is True"),
        (lambda: LSH(hashes=0), "LSH.hashes is 0; expected an integer of at least 1"),
        (lambda: LSH(coords=2.5), "LSH.coords is 2.5"),
        (lambda: LSH(search="tree"), "LSH.search is 'tree'; expected 'nearest' or 'hash'"),
        (lambda: LSH(centroid="last"), "LSH.centroid is 'last'"),
        (lambda: LSH(compensate=True), "LSH.compensate is True; expected 'gradient', 'both' or 'none'"),
        (lambda: LSH(farthest=-1), "LSH.farthest is -1"),
        (lambda: LSH(farthest=None), "expected a number with search='nearest'"),
        (lambda: Quantized(dtype="int2"), "Quantized.dtype is 'int2'; expected one of 'fp32'"),
        (lambda: Quantized(backward_dtype="x"), "Quantized.backward_dtype is 'x'"),
        (lambda: Quantized(block=3), "Quantized.block is 3; expected a power of 2"),
        (lambda: TokenCompressor(LSH(), LSH()), "two LSH; expected at most one of each kind"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_a_configuration_goes_there_and_back():
    lsh, quantized = LSH(rate=None, farthest=0.2), Quantized(dtype="fp8")
    for config in (MoEConfig(), MoEConfig(lsh=lsh), MoEConfig(lsh=lsh, quantized=quantized)):
        assert MoEConfig.from_dict(config.to_dict()) == config
        made = TokenCompressor.from_config(config)
        assert (made.lsh, made.quantized) == (config.lsh, config.quantized)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"lhs": {}}, "moe: unknown key 'lhs' (did you mean 'lsh'?)"),
        ({"lsh": {"rat": 0.3}}, "moe.lsh: unknown key 'rat' (did you mean 'rate'?)"),
        ({"quantized": "int8"}, "moe.quantized is 'int8'; expected a mapping of settings"),
        ([], "moe is []; expected a mapping of settings"),
        ({"quantized": {"dtype": "int3"}}, "Quantized.dtype is 'int3'"),
    ],
)
def test_a_wrong_configuration_is_named(data, message):
    with pytest.raises(ValueError) as error:
        MoEConfig.from_dict(data)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"passed": 1}',
        '{"passes": "many"}',
        '{"passes": -1}',
        '{"rows": 1.5}',
        '{"setting": NaN}',
        '{"setting": "far"}',
        '{"centres": [1.0]}',
        '{"centres": {"shape": [1], "fp32": "AAAAAA=="}}',
        '{"centres": {"shape": [2, 2], "fp32": "AAAA"}}',
        None,
    ],
)
def test_what_was_not_learnt_is_refused(text):
    with pytest.raises(ValueError, match="is not what a TokenCompressor has learnt"):
        TokenCompressor(LSH()).set_extra_state(text)


def test_a_compressor_takes_settings_only():
    with pytest.raises(TypeError, match=r"expected commcomp\.moe\.LSH"):
        TokenCompressor("int8")
