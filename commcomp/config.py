"""The one schema of commcomp's settings: dataclasses, and their strict reading from plain dictionaries.

The dictionaries are what Hydra's YAML files and a DeepSpeed JSON block hold; a wrong key names the nearest right one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

FLOAT_WIRE_DTYPES = ("fp32", "fp16", "bf16")
FACTOR_DTYPES = (*FLOAT_WIRE_DTYPES, "int8")
RESIDUAL_DTYPES = ("fp32", "bf16", "int8", "none")
ROUNDINGS = ("nearest", "stochastic")
SPARSE_VALUE_DTYPES = ("fp32", "bf16", "int8")
SPARSE_LAYERS = ("transformer", "transformer+attention", "all")


def _require_choice(owner: str, field: str, value: object, choices: Sequence[object]) -> None:
    if not any(value is choice or (value == choice and type(value) is type(choice)) for choice in choices):
        raise ValueError(f"{owner}.{field} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def _require_integer(owner: str, field: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{owner}.{field} is {value!r}; expected an integer of at least {minimum}")


@dataclass(frozen=True)
class Dense:
    """Send a gradient whole, as plain training does, in the given number format.

    No residual is kept: what rounding to `dtype` loses is lost, as with torch's fp16 hook. A gradient that is itself
    16 bits wide is never widened on the wire. Contributions are summed in fp32 whatever the dtype.
    """

    method: ClassVar[str] = "dense"

    dtype: str = "fp32"
    """Number format on the wire: fp32, fp16 or bf16."""

    def __post_init__(self) -> None:
        _require_choice("Dense", "dtype", self.dtype, FLOAT_WIRE_DTYPES)


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Send each matrix as two thin factors found by one warm-started power iteration, with error feedback.

    PowerSGD, Vogels et al. 2019 (arXiv:1905.13727), Algorithms 1 and 2. Vectors, and matrices for which the factors
    would not be smaller than the matrix, travel dense in the same collective.
    """

    method: ClassVar[str] = "low_rank"

    rank: int = 4
    """Columns of each factor; cut to min(n, m) for smaller matrices. Bytes and loss quality grow with it."""

    factor_dtype: str = "fp32"
    """Number format of the factors on the wire: fp32, bf16, or fp16 and int8 with one fp32 scale per column.
    The rounding error goes into the residual."""

    rounds: int = 2
    """2: both factors every step, as published. 1: P on even steps and Q on odd ones, one collective and half the
    bytes a step (Alternate Compressed SGD's schedule, arXiv:2306.08881)."""

    dense_dtype: str = "fp32"
    """Number format for what travels dense under this rule: fp32, fp16 or bf16 (see `Dense`)."""

    min_ratio: float = 1.0
    """A matrix is factored only if dense bytes / factor bytes exceeds this; 0 factors every matrix."""

    def __post_init__(self) -> None:
        _require_integer("LowRank", "rank", self.rank, 1)
        _require_choice("LowRank", "factor_dtype", self.factor_dtype, FACTOR_DTYPES)
        _require_choice("LowRank", "rounds", self.rounds, (1, 2))
        _require_choice("LowRank", "dense_dtype", self.dense_dtype, FLOAT_WIRE_DTYPES)
        if isinstance(self.min_ratio, bool) or not isinstance(self.min_ratio, (int, float)) or not self.min_ratio >= 0:
            raise ValueError(f"LowRank.min_ratio is {self.min_ratio!r}; expected a number of at least 0")


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Send each value in 8 or 4 bits, with a scale a block, summed exactly in fp32 and quantised once more on the way
    back; with error feedback.

    Two-shot quantised all-reduce as in ZeRO++ (Wang et al. 2023, arXiv:2306.10209); of the second rounding, the rank
    that makes it keeps the error. Bytes a value and direction: bits / 8 + 2 / block. Vectors travel dense.
    """

    method: ClassVar[str] = "quantized"

    bits: int = 8
    """8 or 4."""

    block: int = 128
    """Values that share a scale; even, and a power of 2 with `rotate`."""

    rounding: str = "nearest"
    """nearest, or stochastic: unbiased, for use without error feedback (residual_dtype none)."""

    rotate: bool = False
    """Multiply each block by random signs and a Hadamard matrix first, so that outliers do not take 4 bits' range."""

    dense_dtype: str = "fp32"
    """Number format for what travels dense under this rule: fp32, fp16 or bf16 (see `Dense`)."""

    def __post_init__(self) -> None:
        _require_choice("Quantized", "bits", self.bits, (8, 4))
        _require_integer("Quantized", "block", self.block, 2)
        _require_choice("Quantized", "rounding", self.rounding, ROUNDINGS)
        _require_choice("Quantized", "rotate", self.rotate, (True, False))
        _require_choice("Quantized", "dense_dtype", self.dense_dtype, FLOAT_WIRE_DTYPES)
        if self.block % 2 or (self.rotate and self.block & (self.block - 1)):
            expected = "a power of 2, for the rotation" if self.rotate else "an even number"
            raise ValueError(f"Quantized.block is {self.block}; expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """Send the largest values and where they lie; the rest waits in the residual until it is large.

    The largest of all that travels under one rule in a bucket (FSDP2: for one owner of a group), so give a matrix whose
    gradients are much smaller than its neighbours' a rule with another density.

    TAGC (arXiv:2504.05638) chooses the layers and the values so; its index and sketch are replaced by positions and
    values sent to the rank that owns them, summed exactly there. Bytes a value: (1 + bytes of `value_dtype`) x 1.1
    density, and 1/256 for counts; from a density of 11 % on a bitmap, 1/8, in place of a byte a position. Vectors
    travel dense.
    """

    method: ClassVar[str] = "sparse"

    layers: str = "transformer"
    """transformer: a transformer's MLP matrices, embeddings and head (of other models: every matrix);
    transformer+attention: those and attention; all: every matrix. The rest travels dense."""

    density: float = 0.5
    """Share of the values to send, above 0 and at most 1. By sampling: at 0.01, 4 % more or less. Low densities cost
    loss under Adam: docs/values.md."""

    value_dtype: str = "int8"
    """Number format of the values: fp32, bf16, or int8 with a scale for every 64 of them."""

    dense_dtype: str = "fp32"
    """Number format for what travels dense under this rule: fp32, fp16 or bf16 (see `Dense`)."""

    def __post_init__(self) -> None:
        _require_choice("Sparse", "layers", self.layers, SPARSE_LAYERS)
        number = isinstance(self.density, (int, float)) and not isinstance(self.density, bool)
        if not (number and 0 < self.density <= 1):
            raise ValueError(f"Sparse.density is {self.density!r}; expected a number above 0 and at most 1")
        _require_choice("Sparse", "value_dtype", self.value_dtype, SPARSE_VALUE_DTYPES)
        _require_choice("Sparse", "dense_dtype", self.dense_dtype, FLOAT_WIRE_DTYPES)


Method = Dense | LowRank | Quantized | Sparse
METHODS: dict[str, type[Method]] = {cls.method: cls for cls in (Dense, LowRank, Quantized, Sparse)}
"""Every gradient compression method by its name in configuration files."""


@dataclass(frozen=True)
class Rule:
    """One line of a policy: parameters whose name matches the glob `params` use `method`."""

    params: str
    method: Method

    def __post_init__(self) -> None:
        if not isinstance(self.params, str) or not self.params:
            raise ValueError(f"policy rule pattern is {self.params!r}; expected a glob such as '*.mlp.*'")
        if not isinstance(self.method, tuple(METHODS.values())):
            raise ValueError(
                f"policy rule {self.params!r} has method {self.method!r}; expected an instance of "
                f"{' or '.join(cls.__name__ for cls in METHODS.values())}, for example LowRank(rank=4)"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "policy rule") -> Rule:
        """Read `{params: glob, method: name, ...the method's fields}`. Raises ValueError naming what is wrong."""
        require_mapping(data, where)
        values = dict(data)
        if "params" not in values:
            hint = _nearest("params", values)
            raise ValueError(f"{where} has no key 'params'{hint}; expected a glob, '*' for all parameters")
        pattern = values.pop("params")
        return cls(pattern, _method_from_dict(values, f"{where} {pattern!r}", also_known={"params", "method"}))

    def to_dict(self) -> dict[str, Any]:
        return {"params": self.params, "method": self.method.method, **asdict(self.method)}


@dataclass(frozen=True, kw_only=True)
class GradientConfig:
    """Everything that decides how gradients are synchronised; equal on all ranks (checked at construction)."""

    policy: tuple[Rule, ...]
    """Ordered rules; the first whose glob matches a parameter's name decides."""

    start_step: int = 0
    """Synchronised steps that travel dense (gradient's own dtype) before compression starts."""

    residual_dtype: str = "fp32"
    """Number format in which residuals are kept: fp32 (exact), bf16 or int8 with a scale for every 128 values (half and
    a quarter of the memory; their rounding is lost), or none: no error feedback, what is not delivered is lost."""

    measure_every: int = 50
    """Steps between measurements of the relative compression error; 0 never measures. One pass over the gradient."""

    strict: bool = True
    """Raise instead of warning when something is off: rules that match nothing, compression that enlarges, ..."""

    seed: int = 0
    """Seed of the first right factors; with the parameter's name it fixes them on every rank."""

    def __post_init__(self) -> None:
        if not self.policy:
            raise ValueError("gradient.policy is empty; expected at least one rule, for example ('*', LowRank(rank=4))")
        _require_integer("gradient", "start_step", self.start_step, 0)
        _require_choice("gradient", "residual_dtype", self.residual_dtype, RESIDUAL_DTYPES)
        _require_integer("gradient", "measure_every", self.measure_every, 0)
        _require_integer("gradient", "seed", self.seed, 0)
        _require_choice("gradient", "strict", self.strict, (True, False))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GradientConfig:
        """Read the `gradient` block, in its long form (`policy: [...]`) or short form (`method: low_rank, ...`).

        Raises ValueError naming the unknown key, its place and the nearest known key.
        """
        require_mapping(data, "gradient")
        values = {key: value for key, value in data.items()}
        own_keys = {field.name for field in fields(cls)}
        if "policy" in values:
            rules = values.pop("policy")
            if isinstance(rules, (str, Mapping)) or not isinstance(rules, Sequence):
                raise ValueError(f"gradient.policy is {rules!r}; expected a list of rules")
            policy = tuple(Rule.from_dict(rule, f"gradient.policy[{index}]") for index, rule in enumerate(rules))
            reject_unknown(values, own_keys, "gradient")
        elif "method" in values:
            method = {key: values.pop(key) for key in list(values) if key not in own_keys}
            policy = (Rule("*", _method_from_dict(method, "gradient", also_known=own_keys)),)
        else:
            raise ValueError("gradient has neither 'policy' (a list of rules) nor 'method' (one method for all)")
        return cls(policy=policy, **values)

    def to_dict(self) -> dict[str, Any]:
        """The long form; `from_dict` reads it back to an equal object."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "policy"}
        return {"policy": [rule.to_dict() for rule in self.policy], **plain}


def require_mapping(data: object, where: str) -> None:
    """Raise ValueError unless it is one."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is {data!r}; expected a mapping of settings")


def _method_from_dict(data: Mapping[str, Any], where: str, also_known: set[str] | None = None) -> Method:
    values = dict(data)
    name = values.pop("method", None)
    if not isinstance(name, str) or name not in METHODS:
        hint = _nearest(str(name), METHODS)
        raise ValueError(f"{where}: method is {name!r}; expected one of {', '.join(sorted(METHODS))}{hint}")
    cls = METHODS[name]
    own = {field.name for field in fields(cls)}
    reject_unknown(values, own, f"{where} (method {name})", also_known)
    return cls(**values)


def reject_unknown(values: Mapping[str, Any], known: set[str], where: str, also_known: set[str] | None = None) -> None:
    """Raise ValueError naming a key that is not known, and the nearest of those that are."""
    candidates = known | (also_known or set())
    for key in values:
        if key not in known:
            raise ValueError(
                f"{where}: unknown key {key!r}{_nearest(str(key), candidates)}; known: {', '.join(sorted(candidates))}"
            )


def _nearest(word: str, candidates: Any) -> str:
    close = difflib.get_close_matches(word, list(candidates), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
