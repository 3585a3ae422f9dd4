"""What a `GradientSync` hands to collectives, counted as it does so."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from commcomp.bucket_part import Measurement
from commcomp.complaint import complain
from commcomp.config import LowRank
from commcomp.exchange.exchange import MeanExchange
from commcomp.exchange.mean import ring_bytes, sent_bytes
from commcomp.layout import sections

if TYPE_CHECKING:
    from commcomp.gradient_sync import GradientSync

_PADDING_ALLOWED = 4096
"""Bytes a step that alignment and slicing may add before compression counts as enlarging."""


class TrafficCounters:
    """Totals over all steps, and the error figures of the last measured one."""

    def __init__(self, sync: GradientSync) -> None:
        self.compressed_steps = 0
        self.payload_bytes = 0
        self.wire_bytes = 0
        self._steps = 0
        self._skipped: int | Tensor = 0
        self._parameters, self._shapes = sync.parameters, sync.shapes
        self._methods, self._effective, self._num_ranks = sync.methods, sync.effective, sync.num_ranks
        self._sharded, self._dtypes = sync.sharded, sync.gradient_dtypes
        self._plain_payload = self._plain_step_start = self._plain_step = 0
        self._measured: list[Measurement] = []
        self._measured_at: int | None = None
        self._step_start = self._last_step_bytes = 0
        self._checked = False

    def measurement_due(self, every: int) -> bool:
        """Whether this step's error is to be measured: the first compressed step, then after every `every` of them."""
        if every == 0:
            return False
        return self._measured_at is None or self.compressed_steps >= self._measured_at + every

    def add_bucket(self, nbytes: int, *, scattered: bool = False) -> None:
        """Count one gradient bucket as plain training would send it: a reduce-scatter is half of an all-reduce."""
        self._plain_payload += nbytes // 2 if scattered else nbytes

    def add_exchange(self, exchange: MeanExchange) -> None:
        """Count one started exchange; a single rank sends nothing."""
        if self._num_ranks == 1:
            return
        self.add_bytes(exchange.payload_bytes, exchange.wire_bytes)

    def add_bytes(self, payload: int, wire: int) -> None:
        """Count what else was handed over and sent."""
        self.payload_bytes += payload
        self.wire_bytes += wire

    def end_step(self, compressed: bool, is_finite: Tensor | bool, measured: list[Measurement]) -> None:
        """Close a step."""
        self._steps += 1
        self._skipped = self._skipped + (~is_finite if isinstance(is_finite, Tensor) else not is_finite)
        if measured:
            self._measured, self._measured_at = measured, self.compressed_steps
        self.compressed_steps += compressed
        self._last_step_bytes, self._step_start = self.wire_bytes - self._step_start, self.wire_bytes
        self._plain_step, self._plain_step_start = self._plain_payload - self._plain_step_start, self._plain_payload

    def abandon_step(self) -> None:
        """A backward pass raised half-way: what it sent belongs to no step."""
        self._step_start = self.wire_bytes
        self._plain_payload = self._plain_step_start

    def require_saving(self, *, strict: bool) -> None:
        """After the first compressed step: RuntimeError (a warning unless strict) if it sent more than plain."""
        if self._checked or self.compressed_steps == 0:
            return
        self._checked = True
        plain = ring_bytes(self._plain_step, self._num_ranks)
        if self._last_step_bytes <= plain + _PADDING_ALLOWED:
            return
        name = max(self._parameters, key=lambda name: self._step_bytes(name) - self._plain_bytes(name))
        message = (
            f"the first compressed step sent {self._last_step_bytes} bytes where plain training sends "
            f"{plain}; parameter {name!r} of shape {tuple(self._parameters[name].shape)} under "
            f"{self._methods[name]} adds most: give it a lower rank, density or bits, or Dense()"
        )
        complain(message, strict=strict, error=RuntimeError)

    def summary(self, step: int, memory_bytes: dict[str, int]) -> dict[str, Any]:
        """The dictionary that `GradientSync.stats()` returns."""
        errors = self._relative_errors()
        totals = self._measured_totals()
        plain = ring_bytes(self._plain_payload, self._num_ranks)
        return {
            "steps": step,
            "compressed_steps": self.compressed_steps,
            "skipped_steps": int(self._skipped),
            "payload_bytes": self.payload_bytes,
            "wire_bytes": self.wire_bytes,
            "dense_wire_bytes": plain,
            "ratio": plain / self.wire_bytes if self.wire_bytes and plain else 1.0,
            "memory_bytes": memory_bytes,
            "relative_error": totals,
            "measured_at": None if self._measured_at is None else self._measured_at + 1,
            "parameters": {
                name: {
                    "method": self._effective[name].method,
                    "wire_bytes": self._step_bytes(name),
                    "dense_wire_bytes": self._plain_bytes(name),
                    "relative_error": errors.get(name),
                }
                for name in self._parameters
            },
        }

    def _relative_errors(self) -> dict[str, float]:
        errors: dict[str, float] = {}
        for measurement in self._measured:
            ratios = (measurement.kept / measurement.total.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
            pairs = zip(measurement.names, ratios.tolist(), strict=True)
            errors.update((name, ratio) for name, ratio in pairs if isfinite(ratio))
        return errors

    def _measured_totals(self) -> float | None:
        if not self._measured:
            return None
        kept = sum(float(measurement.kept.sum()) for measurement in self._measured)
        total = sum(float(measurement.total.sum()) for measurement in self._measured)
        if not isfinite(total):  # on a device a step with NaN is found out only here
            return None
        return (kept / total) ** 0.5 if total else 0.0

    def _plain_bytes(self, name: str) -> int:
        sent = ring_bytes(torch.Size(self._shapes[name]).numel() * self._dtypes[name].itemsize, self._num_ranks)
        return sent // 2 if self._sharded is not None and self._sharded.scatters(name) else sent

    def _step_bytes(self, name: str) -> int:
        """Bytes this rank sends for one parameter in a compressed step (rounds=1: the mean of two steps), without
        the padding that a whole bucket shares."""
        method = self._effective[name]
        crossing = sections(method, self._shapes[name])
        to_owners = self._sharded is not None and self._sharded.to_owners(name, self._effective)
        if to_owners and not isinstance(method, LowRank):
            owned = (section.of_length(-(-section.length // self._num_ranks)) for section in crossing)
            return sum((self._num_ranks - 1) * section.encoded_bytes() for section in owned)
        sent = sum(sent_bytes(section, self._num_ranks) for section in crossing)
        return sent // 2 if isinstance(method, LowRank) and method.rounds == 1 else sent
