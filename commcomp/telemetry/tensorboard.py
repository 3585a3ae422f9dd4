"""TensorBoard scalars of a run: your own, and `GradientSync.stats()` by layer group."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping
from typing import Any


class TensorBoardWriter:
    """Writes scalars to `folder`; make one on rank 0 only.

    Raises ImportError, naming the package to install, where tensorboard is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoardWriter needs the package tensorboard; install it with: pip install tensorboard"
            ) from error
        self._writer = SummaryWriter(os.fspath(folder))
        self._last_steps = 0
        self._last_wire_bytes = 0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write each of `values` under its name, at `step`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def stats(self, step: int, stats: Mapping[str, Any]) -> None:
        """Write what `GradientSync.stats()` returned, under `gradient/`.

        `gradient/wire_bytes_per_step` is the mean over the steps since the previous call.
        """
        self.scalars(step, self._byte_scalars(stats))
        self.scalars(step, error_scalars(stats))

    def close(self) -> None:
        """Flush and close the log file."""
        self._writer.close()

    def _byte_scalars(self, stats: Mapping[str, Any]) -> dict[str, float]:
        steps = stats["steps"] - self._last_steps
        wire_bytes = stats["wire_bytes"] - self._last_wire_bytes
        self._last_steps, self._last_wire_bytes = stats["steps"], stats["wire_bytes"]
        scalars = {
            "gradient/ratio": stats["ratio"],
            "gradient/skipped_steps": stats["skipped_steps"],
            **{f"gradient/memory_bytes/{kind}": size for kind, size in stats["memory_bytes"].items()},
        }
        if steps > 0:
            scalars["gradient/wire_bytes_per_step"] = wire_bytes / steps
        return scalars


def error_scalars(stats: Mapping[str, Any]) -> dict[str, float]:
    """Relative compression error over all parameters, and the mean of that of each layer group's parameters.

    Errors that have not been measured yet (None or NaN) are left out.
    """
    scalars = {"gradient/relative_error": stats["relative_error"]}
    groups: dict[str, list[float]] = defaultdict(list)
    for name, parameter in stats["parameters"].items():
        if _is_measured(parameter["relative_error"]):
            groups[layer_group(name)].append(parameter["relative_error"])
    for group, errors in groups.items():
        scalars[f"gradient/relative_error/{group}"] = sum(errors) / len(errors)
    return {name: value for name, value in scalars.items() if _is_measured(value)}


def layer_group(parameter: str) -> str:
    """Return the group of layers that a parameter belongs to: what follows the number of its block.

    >>> layer_group("blocks.3.mlp.0.weight"), layer_group("module.head.weight")
    ('mlp', 'head')
    """
    parts = [part for part in parameter.split(".")[:-1] if part not in ("module", "_orig_mod")]
    for position, part in enumerate(parts):
        if part.isdigit():
            after, before = parts[position + 1 : position + 2], parts[max(0, position - 1) : position]
            return (after or before or [part])[0]
    return parts[0] if parts else parameter


def _is_measured(value: float | None) -> bool:
    return value is not None and not math.isnan(value)
