"""Which parameter gets which method: ordered glob rules, the first match wins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from commcomp.complaint import complain
from commcomp.config import Dense, Method, Rule, Sparse

PolicyLike = Sequence["Rule | tuple[str, Method]"]


def as_rules(policy: PolicyLike) -> tuple[Rule, ...]:
    """Turn `[("*.mlp.*", LowRank()), ...]` or a sequence of `Rule` into rules. Raises ValueError on other forms."""
    rules = []
    for index, entry in enumerate(policy):
        if isinstance(entry, Rule):
            rules.append(entry)
        elif isinstance(entry, (tuple, list)) and len(entry) == 2:
            rules.append(Rule(*entry))
        else:
            raise ValueError(
                f"policy[{index}] is {entry!r}; expected a (glob, method) pair or a Rule, in a list: "
                "policy=[('*.mlp.*', LowRank(rank=4)), ('*', Dense())]"
            )
    return tuple(rules)


def assign_methods(rules: Sequence[Rule], names: Iterable[str], *, strict: bool = True) -> dict[str, Method]:
    """Return {parameter name: method} by the first matching rule.

    Raises ValueError if no rule covers a parameter, or (under `strict`; else a warning) if a rule decides none: its
    glob matches nothing, which is nearly always a typing error, or an earlier rule takes all that it matches.
    """
    names = list(names)
    deciding: dict[str, Rule] = {}
    for name in names:
        rule = next((rule for rule in rules if fnmatchcase(name, rule.params)), None)
        if rule is None:
            raise ValueError(
                f"parameter {name!r} is covered by no rule of the policy "
                f"({', '.join(repr(rule.params) for rule in rules)}); end the policy with ('*', Dense())"
            )
        deciding[name] = rule
    for index, rule in enumerate(rules):
        if not any(chosen is rule for chosen in deciding.values()):
            _complain_of_idle(rule, is_last=index == len(rules) - 1, deciding=deciding, strict=strict)
    return {name: rule.method for name, rule in deciding.items()}


def _complain_of_idle(rule: Rule, *, is_last: bool, deciding: dict[str, Rule], strict: bool) -> None:
    taken = [(name, other) for name, other in deciding.items() if fnmatchcase(name, rule.params)]
    if not taken:
        message = f"policy rule {rule.params!r} matches no parameter; the names are such as {list(deciding)[:4]}"
        remedy = "correct the glob"
    elif rule.params == "*" and is_last:
        return  # a catch-all at the end may well have nothing left to catch
    else:
        name, other = taken[0]
        message = f"policy rule {rule.params!r} decides nothing: {name!r} and the rest go to {other.params!r} before it"
        remedy = "put the narrower rule first"
    complain(f"{message}; {remedy}", strict=strict)


def require_effect(
    rules: Sequence[Rule],
    methods: Mapping[str, Method],
    effective: Mapping[str, Method],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    strict: bool,
) -> None:
    """ValueError (a warning unless `strict`) if a rule that compresses makes none of its matrices smaller.

    `effective`: what each parameter really gets under its rule's method, see layout.effective_method.
    """
    for rule in rules:
        mine = [name for name, method in methods.items() if method is rule.method and len(shapes[name]) > 1]
        if isinstance(rule.method, Dense) or not mine or any(type(effective[name]) is not Dense for name in mine):
            continue
        name = max(mine, key=lambda name: torch.Size(shapes[name]).numel())
        if isinstance(rule.method, Sparse) and rule.method.layers != "all":
            cause = f"layers={rule.method.layers!r} leaves its {len(mine)} matrices whole, or Sparse makes none smaller"
            remedy = "use layers='all' to compress what the rule names, or give them Dense()"
        else:
            cause = f"{rule.method} makes none of its {len(mine)} matrices smaller"
            remedy = "choose a lower rank, density or bits, or give them Dense()"
        largest = f"the largest is {name!r}, {tuple(shapes[name])}"
        message = f"policy rule {rule.params!r} compresses nothing: {cause} ({largest})"
        complain(f"{message}; {remedy}", strict=strict)
