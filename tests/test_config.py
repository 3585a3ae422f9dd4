"""The schema is strict, says what is wrong and what was meant, and reads back what it writes."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import commcomp
from commcomp import Dense, GradientConfig, LowRank, Quantized, Rule, Sparse
from commcomp.config import FACTOR_DTYPES, FLOAT_WIRE_DTYPES, METHODS, RESIDUAL_DTYPES

dense_methods = st.builds(Dense, st.sampled_from(FLOAT_WIRE_DTYPES))
low_rank_methods = st.builds(
    LowRank,
    rank=st.integers(1, 10_000),
    factor_dtype=st.sampled_from(FACTOR_DTYPES),
    rounds=st.sampled_from([1, 2]),
    dense_dtype=st.sampled_from(FLOAT_WIRE_DTYPES),
    min_ratio=st.one_of(st.integers(0, 10), st.floats(0, 100)),
)
methods = st.one_of(dense_methods, low_rank_methods)
configs = st.builds(
    GradientConfig,
    policy=st.lists(st.builds(Rule, st.text(min_size=1), methods), min_size=1, max_size=4).map(tuple),
    start_step=st.integers(0, 10**9),
    residual_dtype=st.sampled_from(RESIDUAL_DTYPES),
    measure_every=st.integers(0, 10**9),
    strict=st.booleans(),
    seed=st.integers(0, 2**31),
)


def test_public_names_are_frozen():
    assert sorted(commcomp.__all__) == [
        "Dense",
        "GradientConfig",
        "GradientSync",
        "LowRank",
        "Quantized",
        "Rule",
        "Sparse",
        "__version__",
        "comm_hook",
        "config",
    ]
    assert all(hasattr(commcomp, name) for name in commcomp.__all__)


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Dense, {"dtype": "fp32"}),
        (LowRank, {"rank": 4, "factor_dtype": "fp32", "rounds": 2, "dense_dtype": "fp32", "min_ratio": 1.0}),
        (Rule, {"params": None, "method": None}),
        (
            GradientConfig,
            {
                "policy": None,
                "start_step": 0,
                "residual_dtype": "fp32",
                "measure_every": 50,
                "strict": True,
                "seed": 0,
            },
        ),
    ],
)
def test_fields_and_defaults_are_frozen(cls, expected):
    found = {
        field.name: None if field.default is dataclasses.MISSING else field.default for field in dataclasses.fields(cls)
    }
    assert found == expected


def test_methods_are_registered_by_their_name_in_files():
    assert dict(METHODS) == {"dense": Dense, "low_rank": LowRank, "quantized": Quantized, "sparse": Sparse}


@given(config=configs)
@settings(max_examples=60, deadline=None)
def test_to_dict_reads_back_as_an_equal_config(config):
    again = GradientConfig.from_dict(config.to_dict())
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert hash(again) == hash(config)


def test_to_dict_holds_plain_values_only():
    config = GradientConfig(policy=(Rule("*.mlp.*", LowRank(rank=2)), Rule("*", Dense("bf16"))))

    def check(value):
        if isinstance(value, dict):
            assert all(type(key) is str for key in value)
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                check(item)
        else:
            assert type(value) in (str, int, float, bool)

    check(config.to_dict())


def test_short_form_is_one_rule_for_all_parameters():
    short = GradientConfig.from_dict(
        {"method": "low_rank", "rank": 8, "factor_dtype": "int8", "rounds": 1, "start_step": 5, "seed": 3}
    )
    rule = Rule("*", LowRank(rank=8, factor_dtype="int8", rounds=1))
    assert short == GradientConfig(policy=(rule,), start_step=5, seed=3)
    assert GradientConfig.from_dict({"method": "dense", "dtype": "bf16"}).policy == (Rule("*", Dense("bf16")),)


def test_long_form_keeps_the_order_of_rules():
    rules = [{"params": "*.mlp.*", "method": "low_rank", "rank": 1}, {"params": "*", "method": "dense"}]
    config = GradientConfig.from_dict({"policy": rules, "strict": False})
    assert config.policy == (Rule("*.mlp.*", LowRank(rank=1)), Rule("*", Dense()))
    assert config.strict is False


def test_from_dict_leaves_its_input_alone():
    data = {"policy": [{"params": "*", "method": "low_rank", "rank": 2}], "seed": 1}
    GradientConfig.from_dict(data)
    assert data == {"policy": [{"params": "*", "method": "low_rank", "rank": 2}], "seed": 1}


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"method": "low_rank", "rnak": 4}, ["gradient", "'rnak'", "'rank'"]),
        ({"method": "low_rank", "strat_step": 4}, ["gradient", "'strat_step'", "'start_step'"]),
        ({"method": "low_rank", "dtype": "bf16"}, ["gradient", "'dtype'"]),
        ({"method": "dense", "rank": 4}, ["gradient", "'rank'", "dense"]),
        ({"policy": [{"method": "dense"}]}, ["policy[0]", "'params'", "'*'"]),
        (
            {"policy": [{"params": "*", "method": "dense"}], "residual_dytpe": "bf16"},
            ["'residual_dytpe'", "'residual_dtype'"],
        ),
        ({"policy": [{"params": "*", "method": "dense"}, {"method": "dense", "param": "*"}]}, ["policy[1]", "'param'"]),
        ({"policy": [{"params": "a.*", "method": "low_rank", "factor_type": 1}]}, ["a.*", "'factor_dtype'"]),
        ({"policy": [{"params": "a.*", "method": "lowrank"}]}, ["policy[0]", "a.*", "'lowrank'", "'low_rank'"]),
        ({"policy": [{"params": "*"}]}, ["policy[0]", "method"]),
        ({"method": "lowrank"}, ["gradient", "'lowrank'", "'low_rank'"]),
        ({"method": None}, ["method"]),
        ({"method": ["low_rank"]}, ["method"]),
        ({"method": "low_rank", "policy": [{"params": "*", "method": "dense"}]}, ["'method'"]),
        ({"policy": []}, ["policy"]),
        ({"policy": "low_rank"}, ["policy", "'low_rank'"]),
        ({"policy": {"params": "*"}}, ["policy"]),
        ({"policy": ["*"]}, ["policy[0]", "'*'"]),
        ({"policy": [{"params": 3, "method": "dense"}]}, ["3", "glob"]),
        ({"policy": [{"params": "", "method": "dense"}]}, ["''", "glob"]),
        ({}, ["policy", "method"]),
        ("low_rank", ["gradient", "'low_rank'"]),
        (None, ["gradient"]),
        ([], ["gradient"]),
    ],
)
def test_wrong_dictionaries_are_refused_by_name(data, parts):
    with pytest.raises(ValueError) as caught:
        GradientConfig.from_dict(data)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        *((LowRank, "rank", value) for value in (0, -1, 1.5, "4", None, True)),
        *((LowRank, "factor_dtype", value) for value in ("int4", "float32", None, 8)),
        *((LowRank, "rounds", value) for value in (0, 3, "2", None, True, 1.5)),
        *((LowRank, "dense_dtype", value) for value in ("int8", "", None)),
        *((LowRank, "min_ratio", value) for value in (-0.1, "1", None, True, float("nan"))),
        *((Dense, "dtype", value) for value in ("int8", "float16", None)),
    ],
)
def test_wrong_method_fields_are_refused_by_name(cls, field, value):
    with pytest.raises(ValueError, match=f"{cls.__name__}.{field}"):
        cls(**{field: value})
    with pytest.raises(ValueError, match=field):
        GradientConfig.from_dict({"policy": [{"params": "*", "method": cls.method, field: value}]})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("start_step", value) for value in (-1, 1.0, "1", None, True)),
        *(("residual_dtype", value) for value in ("fp16", "int4", None)),
        *(("measure_every", value) for value in (-1, 0.5, None)),
        *(("strict", value) for value in ("yes", None, 2)),
        *(("seed", value) for value in (-1, 0.5, None)),
    ],
)
def test_wrong_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"gradient.{field}"):
        GradientConfig(policy=(Rule("*", Dense()),), **{field: value})
    with pytest.raises(ValueError, match=field):
        GradientConfig.from_dict({"method": "dense", field: value})


def test_rules_take_methods_only():
    for method in (LowRank, "low_rank", None, 4):
        with pytest.raises(ValueError, match="attn"):
            Rule("attn.*", method)


def test_settings_cannot_be_changed_after_the_check():
    for settings_object, field in [(LowRank(), "rank"), (Dense(), "dtype"), (Rule("*", Dense()), "params")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings_object, field, "changed")


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63])
def test_every_seed_that_is_accepted_gives_first_factors(seed):
    from commcomp.low_rank_part import warm_start_fields

    try:
        GradientConfig(policy=(Rule("*", LowRank()),), seed=seed)
    except ValueError as error:
        assert "gradient.seed" in str(error)
        return
    for field in warm_start_fields(5, 4, 2, 1, seed=seed).values():
        assert field.initial is None or field.initial("w").isfinite().all()
