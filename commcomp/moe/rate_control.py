"""How near tokens of a cluster must be, or how finely they are hashed, so that a given share of rows is sent."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from commcomp.compressors.token_hash import most_coords

EVERY = 64
"""Passes between two looks at what rows are like; at first they are looked at after 1, 2, 4, ... of them."""


def due(passes: int) -> bool:
    """Whether rows are looked at before the pass after `passes` of them."""
    if passes >= EVERY:
        return passes % EVERY == 0
    return passes > 0 and passes & (passes - 1) == 0


class RateControl(ABC):
    """A setting that is changed by what rate it gave."""

    every_pass: bool
    """Whether it is changed after every pass, or when rows are looked at."""

    def __init__(
        self, target: float, value: float, *, gain: float, largest_change: float, bounds: tuple[float, float]
    ) -> None:
        self.target, self.value = target, value
        self._gain, self._largest_change, self._bounds = gain, largest_change, bounds

    def adapt(self, rows: int, tokens: int) -> None:
        """After a pass that sent `rows` rows for `tokens` tokens, of all ranks."""
        if tokens:
            change = self._gain * math.log2(self.target * tokens / max(rows, 1))
            change = max(-self._largest_change, min(self._largest_change, change))
            self.value = max(self._bounds[0], min(self._bounds[1], self._changed(change)))

    @abstractmethod
    def _changed(self, change: float) -> float: ...


class ReachControl(RateControl):
    """`value`: how far a token may be from its leader, relative to its distance from the mean of its expert's."""

    every_pass = True

    def __init__(self, target: float, start: float) -> None:
        # Measured: the rate falls with the power 1.5 to 2 of the reach; tight clusters make it fall faster.
        super().__init__(target, start, gain=-0.12, largest_change=0.15, bounds=(0.01, 4.0))

    def _changed(self, change: float) -> float:
        return self.value * 2**change


class HashControl(RateControl):
    """`value`: bits of a token's hash."""

    every_pass = False
    _BITS_PER_HASH = 5.0

    def __init__(self, target: float) -> None:
        # Measured: the rate doubles for every 3 to 7 bits.
        super().__init__(target, 10.0, gain=4.0, largest_change=3.0, bounds=(2.0, 40.0))

    def _changed(self, change: float) -> float:
        return self.value + change

    def shape(self, length: int) -> tuple[int, int]:
        """(hashes, coords) for rows of `length` values."""
        hashes = max(1, round(self.value / self._BITS_PER_HASH))
        while hashes > 1 and most_coords(length, hashes) < 2:
            hashes -= 1
        coords = round(2 ** (self.value / hashes - 1))
        return hashes, max(1, min(coords, most_coords(length, hashes)))
