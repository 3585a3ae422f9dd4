"""Ordered glob rules: the first match wins, and nothing is left uncovered or unmatched in silence."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commcomp import Dense, LowRank, Rule, Sparse
from commcomp.policy import as_rules, assign_methods, require_effect

NAMES = ["embed.weight", "h.0.mlp.up.weight", "h.0.mlp.up.bias", "h.0.attn.q.weight", "head.weight"]


def test_first_match_wins():
    rules = as_rules([("*.mlp.*", LowRank(rank=8)), ("*.weight", LowRank(rank=2)), ("*", Dense("bf16"))])
    assert assign_methods(rules, NAMES) == {
        "embed.weight": LowRank(rank=2),
        "h.0.mlp.up.weight": LowRank(rank=8),
        "h.0.mlp.up.bias": LowRank(rank=8),
        "h.0.attn.q.weight": LowRank(rank=2),
        "head.weight": LowRank(rank=2),
    }
    reordered = [("*.weight", LowRank(rank=2)), ("*.mlp.*", LowRank(rank=8)), ("*", Dense())]
    assert assign_methods(as_rules(reordered), NAMES)["h.0.mlp.up.weight"] == LowRank(rank=2)


def test_globs_cover_the_whole_name_and_mind_the_case():
    rules = as_rules([("head.weight", LowRank(rank=1)), ("h.[01].attn.?.weight", LowRank(rank=2)), ("*", Dense())])
    assigned = assign_methods(rules, [*NAMES, "lm.head.weight", "head.weight_g"])
    assert assigned["head.weight"] == LowRank(rank=1)
    assert assigned["h.0.attn.q.weight"] == LowRank(rank=2)
    assert assigned["lm.head.weight"] == assigned["head.weight_g"] == Dense()
    with pytest.raises(ValueError, match=r"HEAD\.\*"):
        assign_methods(as_rules([("HEAD.*", LowRank()), ("*", Dense())]), NAMES)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_every_parameter_gets_the_method_of_the_first_rule_that_names_it(data):
    names = data.draw(st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=6, unique=True))
    chosen = data.draw(st.lists(st.sampled_from(names), max_size=6, unique=True))
    rules = [Rule(name, LowRank(rank=1 + index)) for index, name in enumerate(chosen)] + [Rule("*", Dense())]
    assigned = assign_methods(rules, names)
    assert list(assigned) == names
    for name in names:
        assert assigned[name] == (LowRank(rank=1 + chosen.index(name)) if name in chosen else Dense())


@pytest.mark.parametrize("strict", [True, False])
def test_an_uncovered_parameter_is_refused_with_a_remedy(strict):
    rules = as_rules([("*.mlp.*", LowRank()), ("embed.*", Dense())])
    with pytest.raises(ValueError) as caught:
        assign_methods(rules, NAMES, strict=strict)
    for part in ("'h.0.attn.q.weight'", "'*.mlp.*'", "'embed.*'", "('*', Dense())"):
        assert part in str(caught.value)


def test_a_glob_that_matches_nothing_is_refused_or_warned_about():
    rules = as_rules([("*.mpl.*", LowRank()), ("*", Dense())])
    with pytest.raises(ValueError) as caught:
        assign_methods(rules, NAMES)
    assert "'*.mpl.*'" in str(caught.value) and "embed.weight" in str(caught.value)
    with pytest.warns(UserWarning, match=r"\*\.mpl\.\*"):
        assigned = assign_methods(rules, NAMES, strict=False)
    assert assigned == dict.fromkeys(NAMES, Dense())


def test_a_rule_whose_parameters_are_all_taken_and_a_last_star_are_fine():
    rules = as_rules([("*.weight", LowRank()), ("*.bias", Dense()), ("*", Dense("fp16"))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert assign_methods(rules, NAMES)["head.weight"] == LowRank()


@pytest.mark.parametrize("first", ["*", "*.weight"])
def test_a_rule_behind_one_that_takes_all_its_parameters_is_refused_or_warned_about(first):
    rules = as_rules([(first, Dense("bf16")), ("head.*", LowRank()), ("*", Dense())])
    with pytest.raises(ValueError) as caught:
        assign_methods(rules, NAMES)
    for part in ("'head.*'", "'head.weight'", repr(first), "narrower rule first"):
        assert part in str(caught.value)
    with pytest.warns(UserWarning, match="decides nothing"):
        assert assign_methods(rules, NAMES, strict=False)["head.weight"] == Dense("bf16")


def test_a_rule_that_makes_nothing_smaller_is_refused_or_warned_about():
    shapes = {"a": (64, 64), "b": (80, 64), "b.bias": (80,)}
    rules = as_rules([("b*", LowRank(rank=60)), ("*", LowRank(rank=2))])
    methods = assign_methods(rules, shapes)
    require_effect(rules, methods, {**methods, "b.bias": Dense()}, shapes, strict=True)
    effective = {"a": LowRank(rank=2), "b": Dense(), "b.bias": Dense()}
    with pytest.raises(ValueError) as caught:
        require_effect(rules, methods, effective, shapes, strict=True)
    for part in ("'b*'", "rank=60", "'b'", "(80, 64)", "lower rank"):
        assert part in str(caught.value)
    with pytest.warns(UserWarning, match="compresses nothing"):
        require_effect(rules, methods, effective, shapes, strict=False)


def test_a_rule_whose_layers_leave_its_matrices_whole_says_so():
    rules = as_rules([("*attn*", Sparse(layers="transformer"))])
    methods = assign_methods(rules, {"attn": None}, strict=False)
    with pytest.raises(ValueError, match=r"layers='transformer' leaves its 1 matrices whole.*use layers='all'"):
        require_effect(rules, methods, {"attn": Dense()}, {"attn": (64, 64)}, strict=True)


def test_pairs_and_rules_mix_and_other_forms_are_refused():
    rules = as_rules([Rule("a", Dense()), ("b", LowRank(rank=2)), ["c", Dense()]])
    assert rules == (Rule("a", Dense()), Rule("b", LowRank(rank=2)), Rule("c", Dense()))
    for wrong in (("*",), ("*", Dense(), 1), "*", Dense(), {"params": "*", "method": "dense"}):
        with pytest.raises(ValueError, match=r"policy\[1\]"):
            as_rules([("*", Dense()), wrong])
    for wrong in (("*", "dense"), (3, Dense()), ("", Dense())):
        with pytest.raises(ValueError, match="policy rule"):
            as_rules([wrong])
