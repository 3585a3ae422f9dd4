"""How tokens travel between ranks: the settings of commcomp.moe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from commcomp.compressors.wire import Format, RowFormat
from commcomp.compressors.wire_blocks import BlockFormat
from commcomp.config import reject_unknown, require_mapping

ROW_DTYPES = ("fp32", "bf16", "fp16", "fp8", "int8", "int4")
CENTROIDS = ("first", "mean")
SEARCHES = ("nearest", "hash")
COMPENSATIONS = ("gradient", "both", "none")


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Send each value of a token's row, and of its gradient, in fewer bits."""

    method: ClassVar[str] = "quantized"

    dtype: str = "int8"
    """Number format of rows on the wire: bf16, fp16, fp8 or int8 with a scale a row, or int4 with a scale for every
    `block` values; fp32 sends a row whole."""

    backward_dtype: str | None = None
    """The same for gradients of rows; None: as `dtype`."""

    block: int = 32
    """int4: values that share a scale; a power of 2."""

    def __post_init__(self) -> None:
        for name in ("dtype", "backward_dtype"):
            value = getattr(self, name)
            if value not in ROW_DTYPES and not (name == "backward_dtype" and value is None):
                expected = ", ".join(map(repr, ROW_DTYPES))
                raise ValueError(f"moe Quantized.{name} is {value!r}; expected one of {expected}")
        whole = isinstance(self.block, int) and not isinstance(self.block, bool)
        if not whole or self.block < 2 or self.block & (self.block - 1):
            raise ValueError(f"moe Quantized.block is {self.block!r}; expected a power of 2 of at least 2")

    def forward_format(self) -> Format:
        """Of rows."""
        return self._format(self.dtype)

    def backward_format(self) -> Format:
        """Of gradients of rows."""
        return self._format(self.backward_dtype or self.dtype)

    def _format(self, dtype: str) -> Format:
        return BlockFormat(4, self.block) if dtype == "int4" else RowFormat(dtype)


@dataclass(frozen=True, kw_only=True)
class LSH:
    """Send one row for every cluster of similar ones; each token gets its expert's answer for that row, and what the
    token differs from it by is added.

    LSH-MoE, Nie et al. 2024 (arXiv:2411.08446), section 3.2, with its backward pass, a centroid that no later token
    takes part in, and a rate that is kept.
    """

    method: ClassVar[str] = "lsh"

    rate: float | None = 0.35
    """Rows sent / tokens to keep to, above 0 and below 1: `farthest`, or `hashes` and `coords`, are then found while
    training. None: these as given."""

    search: str = "nearest"
    """How a token finds its cluster. nearest: the nearest of earlier ones that are sent, by distances of `coords`
    turned coordinates. hash: those with the same hashes."""

    coords: int = 64
    """nearest: coordinates that are compared; at most the width of a row is used. hash: of each hash."""

    hashes: int = 2
    """hash: tokens share a cluster if in each of so many groups of `coords` coordinates the same is the largest."""

    centroid: str = "first"
    """What stands for a cluster. first: its first token, so no token sees anything of later ones, if the rows of an
    expert come in the order of time (decoders). mean: the mean of its tokens, as published (encoders)."""

    compensate: str = "gradient"
    """What becomes of what a token differs from its centroid by. both: it is added to the expert's answer, forward and
    backward, as published. gradient: only the gradient is as if it were added, so what differs between a cluster's
    tokens' gradients is not lost, and an answer is the expert's own. none: neither. But with `both`, the gradient of a
    first token is shared by its cluster."""

    farthest: float | None = 0.6
    """A token goes alone whose distance from the first of its cluster exceeds this many times that from the mean of
    what its expert got lately. hash: may be None, no limit."""

    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("hashes", 1), ("coords", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"moe LSH.{name} is {value!r}; expected an integer of at least {least}")
        if self.search not in SEARCHES:
            raise ValueError(f"moe LSH.search is {self.search!r}; expected 'nearest' or 'hash'")
        if self.farthest is None and self.search == "nearest":
            raise ValueError("moe LSH.farthest is None; expected a number with search='nearest'")
        if self.rate is not None and not (_is_number(self.rate) and 0 < self.rate < 1):
            raise ValueError(f"moe LSH.rate is {self.rate!r}; expected a number between 0 and 1, or None")
        if self.farthest is not None and not (_is_number(self.farthest) and self.farthest >= 0):
            raise ValueError(f"moe LSH.farthest is {self.farthest!r}; expected a number of at least 0, or None")
        if self.centroid not in CENTROIDS:
            raise ValueError(f"moe LSH.centroid is {self.centroid!r}; expected 'first' or 'mean'")
        if self.compensate not in COMPENSATIONS:
            raise ValueError(f"moe LSH.compensate is {self.compensate!r}; expected 'gradient', 'both' or 'none'")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The `moe` block of a configuration: how one layer's tokens travel."""

    lsh: LSH | None = None
    quantized: Quantized | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MoEConfig:
        """Read `{lsh: {...} or null, quantized: {...} or null}`. Raises ValueError naming what is wrong."""
        require_mapping(data, "moe")
        reject_unknown(data, {"lsh", "quantized"}, "moe")
        return cls(lsh=_from_dict(LSH, data.get("lsh")), quantized=_from_dict(Quantized, data.get("quantized")))

    def to_dict(self) -> dict[str, Any]:
        """`from_dict` reads it back to an equal object."""
        return asdict(self)


def _from_dict(method: type[Any], values: Mapping[str, Any] | None) -> Any:
    if values is None:
        return None
    where = f"moe.{method.method}"
    require_mapping(values, where)
    reject_unknown(values, {field.name for field in fields(method)}, where)
    return method(**values)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
