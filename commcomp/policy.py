"""Which parameter gets which method: ordered glob rules, the first match wins."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from commcomp.config import Method, Rule

PolicyLike = Sequence["Rule | tuple[str, Method]"]


def as_rules(policy: PolicyLike) -> tuple[Rule, ...]:
    """Turn `[("*.mlp.*", LowRank()), ...]` or a sequence of `Rule` into rules. Raises ValueError on other forms."""
    rules = []
    for index, entry in enumerate(policy):
        if isinstance(entry, Rule):
            rules.append(entry)
        elif isinstance(entry, tuple) and len(entry) == 2:
            rules.append(Rule(*entry))
        else:
            raise ValueError(f"policy[{index}] is {entry!r}; expected a (glob, method) pair or a Rule")
    return tuple(rules)


def assign_methods(rules: Sequence[Rule], names: Iterable[str], *, strict: bool = True) -> dict[str, Method]:
    """Return {parameter name: method} by the first matching rule.

    Raises ValueError if no rule covers a parameter, or (under `strict`; else a warning) if a rule's glob matches no
    parameter at all, which is nearly always a typing error.
    """
    names = list(names)
    assigned: dict[str, Method] = {}
    for name in names:
        method = next((rule.method for rule in rules if fnmatchcase(name, rule.params)), None)
        if method is None:
            raise ValueError(
                f"parameter {name!r} is covered by no rule of the policy "
                f"({', '.join(repr(rule.params) for rule in rules)}); end the policy with ('*', Dense())"
            )
        assigned[name] = method
    for rule in rules:
        if rule.params != "*" and not any(fnmatchcase(name, rule.params) for name in names):
            message = f"policy rule {rule.params!r} matches no parameter; the names are such as {names[:4]}"
            if strict:
                raise ValueError(message + "; correct the glob, or pass strict=False")
            warnings.warn(message, stacklevel=3)
    return assigned
