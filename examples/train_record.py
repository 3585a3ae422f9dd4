"""What examples/train_gpt.py measures, shows and writes: losses, times, bytes, TensorBoard, result.json."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from commcomp import GradientSync
from commcomp.telemetry.environment import git_revision, machine, versions
from commcomp.telemetry.gpu import GpuReader
from commcomp.telemetry.tensorboard import TensorBoardWriter
from train_gradients import Traffic
from train_setup import Place, learning_rate, run_name

_FREE_TO_CHANGE = {
    "steps", "log_every", "eval_every", "eval_batches", "eval_batch", "tensorboard", "name", "output_dir",
    "checkpoint", "resume", "device", "timeout_seconds",
}  # fmt: skip


class StepClock:
    """Times steps without making a GPU wait: losses stay tensors and times stay events until `read`."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._losses: list[Tensor] = []
        self._seconds: list[Any] = []
        self._cpu_seconds: list[float] = []

    def start(self) -> None:
        self._cpu_start = time.process_time()
        self._start = self._now()

    def stop(self, loss: Tensor) -> None:
        self._seconds.append((self._start, self._now()))
        self._cpu_seconds.append(time.process_time() - self._cpu_start)
        self._losses.append(loss.detach())

    def read(self) -> dict[str, list[float]]:
        """Return what was timed since the last call, as means over ranks; a collective call."""
        own = torch.tensor(
            [[float(loss) for loss in self._losses], self._elapsed(), self._cpu_seconds], dtype=torch.float64
        )
        mean = own.to(self._place.device)
        dist.all_reduce(mean)
        loss, seconds, cpu_seconds = (mean / self._place.world_size).tolist()
        own_cpu_seconds = self._cpu_seconds
        self._losses, self._seconds, self._cpu_seconds = [], [], []
        return {
            "train_loss": loss,
            "step_seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "cpu_seconds_rank_0": own_cpu_seconds,
        }

    def _now(self) -> Any:
        if self._place.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _elapsed(self) -> list[float]:
        if self._place.device.type != "cuda":
            return [end - start for start, end in self._seconds]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in self._seconds]


class RunRecord:
    """The history of a run, kept through restarts, and everything that shows it."""

    def __init__(
        self,
        config: DictConfig,
        place: Place,
        traffic: Traffic,
        gradient_sync: GradientSync | None,
        parameters: int,
        layer_stats: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.history: dict[str, Any] = {
            "config": OmegaConf.to_container(config, resolve=True),
            "train_loss": [], "step_seconds": [], "cpu_seconds": [], "cpu_seconds_rank_0": [],
            "held_out": [], "checkpoints": [], "wire_bytes": 0.0, "dense_wire_bytes": 0.0,
        }  # fmt: skip
        self._config, self._place, self._parameters, self._layer_stats = config, place, parameters, layer_stats
        self._traffic, self._sync = traffic, gradient_sync
        self._bytes_before = (0.0, 0.0)
        self._folder = Path(config.output_dir)
        self._gpu = GpuReader(place.device)
        self._is_first = place.rank == 0
        self._tensorboard: TensorBoardWriter | None = None
        if self._is_first and config.tensorboard:
            self._tensorboard = TensorBoardWriter(self._folder / "tensorboard")
        self._progress = _Progress(config.steps) if self._is_first else None

    def require_own_folder(self) -> None:
        """ValueError if the folder holds the result of a run with other settings, which would be overwritten."""
        path = self._folder / "result.json"
        if not path.exists():
            return
        changed = self._changed(json.loads(path.read_text())["config"])
        if changed:
            raise ValueError(
                f"{path} is of a run with other settings of {', '.join(changed)}; choose another output_dir, such as "
                f"output_dir={self._folder}_2, or remove it"
            )

    def _changed(self, old: dict[str, Any]) -> list[str]:
        new = self.history["config"]
        return [key for key in new if key not in _FREE_TO_CHANGE and old.get(key) != new[key]]

    def resume(self, history: dict[str, Any], checkpoint: Path) -> None:
        """Go on from a checkpoint's history. Raises ValueError if it belongs to a run with other settings."""
        if self._config.resume == "auto":
            changed = self._changed(history["config"])
            if changed:
                raise ValueError(
                    f"{checkpoint} was made with other settings of {', '.join(changed)}; choose another "
                    f"output_dir, or resume={checkpoint} to go on from it all the same"
                )
        self.history = {"checkpoints": [], **history, "config": self.history["config"]}
        self._bytes_before = (history["wire_bytes"], history["dense_wire_bytes"])
        if self._progress:
            self._progress.show(len(history["train_loss"]), line=f"resumed from {checkpoint}")

    def extend(self, read: dict[str, list[float]]) -> None:
        """Add what `StepClock.read` returned, and show it."""
        if not read["train_loss"]:
            return
        first = len(self.history["train_loss"])
        for key, values in read.items():
            self.history[key] += values
        wire, dense = self._traffic.totals()
        self.history["wire_bytes"] = self._bytes_before[0] + wire
        self.history["dense_wire_bytes"] = self._bytes_before[1] + dense
        if self._tensorboard:
            for step, (loss, seconds) in enumerate(zip(read["train_loss"], read["step_seconds"]), first):
                self._tensorboard.scalars(step + 1, self._step_scalars(step, loss, seconds))
            last = len(self.history["train_loss"])
            self._tensorboard.scalars(last, self._gpu.read())
            if self._sync is not None:
                self._tensorboard.stats(last, self._sync.stats())
            self._tensorboard.scalars(last, _numbers_of(self._layer_stats()))
        if self._progress:
            self._progress.show(len(self.history["train_loss"]), self._summary())

    def advance(self, step: int) -> None:
        """Move the progress bar to `step` steps done."""
        if self._progress:
            self._progress.show(step)

    def held_out(self, step: int, loss: float) -> None:
        """Add a held-out loss after `step` steps."""
        self.history["held_out"].append([step, sum(self.history["step_seconds"]), loss])
        if self._tensorboard:
            self._tensorboard.scalars(step, {"loss/held_out": loss})
        if self._progress:
            self._progress.show(step, self._summary(), line=f"{self._summary()}  {self._traffic_summary()}")

    def saved(self, step: int, num_bytes: int, raw_bytes: int, seconds: float) -> None:
        """Add a complete checkpoint: bytes of its files and of its tensors, seconds that training waited for it.

        The one that a run went on from is not in its history, which was written before that one was complete.
        """
        entry = {"step": step, "bytes": num_bytes, "ratio": raw_bytes / num_bytes, "seconds_waited": seconds}
        self.history["checkpoints"].append(entry)
        if self._tensorboard:
            self._tensorboard.scalars(step, {f"checkpoint/{key}": entry[key] for key in entry if key != "step"})
        if self._progress:
            size = f"{num_bytes / 1e6:.2f} MB, {entry['ratio']:.1f} times smaller"
            self._progress.show(step, line=f"checkpoint of {size}; training waited {seconds:.2f} s")

    def finish(self) -> None:
        """Write `result.json` and close everything."""
        if self._progress:
            self._progress.close()
            path = self._folder / "result.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".partial")
            aside.write_text(json.dumps(self._result(), indent=1))
            aside.rename(path)
            print(f"wrote {path}", flush=True)
        if self._tensorboard:
            self._tensorboard.close()
        self._gpu.close()

    def _tokens_per_second(self, seconds: float) -> float:
        return self._config.batch * self._config.model.context * self._place.world_size / seconds

    def _step_scalars(self, step: int, loss: float, seconds: float) -> dict[str, float]:
        scalars = {
            "loss/train": loss,
            "speed/tokens_per_second": self._tokens_per_second(seconds),
            "learning_rate": learning_rate(step, self._config),
        }
        if self._sync is None:  # GradientSync reports its own
            scalars["gradient/wire_bytes_per_step"] = self._wire_bytes_per_step()
        return scalars

    def _wire_bytes_per_step(self) -> float:
        return self.history["wire_bytes"] / len(self.history["train_loss"])

    def _summary(self) -> str:
        history = self.history
        seconds = statistics.median(history["step_seconds"][-20:])
        held_out = f"  held-out {history['held_out'][-1][2]:.3f}" if history["held_out"] else ""
        return f"loss {history['train_loss'][-1]:.3f}{held_out}  {seconds:.3f} s/step"

    def _traffic_summary(self) -> str:
        tokens = self._tokens_per_second(statistics.median(self.history["step_seconds"][-20:]))
        return f"{tokens:.0f} tokens/s  {self._wire_bytes_per_step() / 1e6:.3f} MB/step"

    def _result(self) -> dict[str, Any]:
        history, steps = self.history, len(self.history["train_loss"])
        median_seconds = statistics.median(history["step_seconds"])
        warm = min(2, steps - 1)  # the first steps allocate memory and rebuild DDP's buckets
        wire, dense = history["wire_bytes"], history["dense_wire_bytes"]
        return {
            "schema": 1,
            "name": self._config.name or run_name(self._config),
            "config": history["config"],
            "world_size": self._place.world_size,
            "parameters": self._parameters,
            "machine": machine(self._place.device),
            "link_rate": os.environ.get("COMMCOMP_LINK_RATE"),
            "versions": versions(),
            "git_revision": git_revision(Path(__file__).parent),
            "steps": steps,
            "train_loss": history["train_loss"],
            "step_seconds": history["step_seconds"],
            "held_out": history["held_out"],
            "checkpoints": history["checkpoints"],
            "median_step_seconds": median_seconds,
            "tokens_per_second": self._tokens_per_second(median_seconds),
            "cpu_seconds_per_step": {
                "rank_0": statistics.fmean(history["cpu_seconds_rank_0"][warm:]),
                "mean": statistics.fmean(history["cpu_seconds"][warm:]),
            },
            "wire_bytes_per_step": wire / steps,
            "dense_wire_bytes_per_step": dense / steps,
            "ratio": dense / wire if wire else None,
            "bytes_are": "counted by GradientSync" if self._sync else "computed for a ring all-reduce",
            "gather_bytes_per_step": self._traffic.of_gathers(),
            "stats": self._sync.stats() if self._sync else None,
            "layers": self._layer_stats(),
        }  # fmt: skip


def _numbers_of(stats: dict[str, Any]) -> dict[str, float]:
    """Of each layer by its name, as layer/figure."""
    return {
        f"{layer}/{figure}": value
        for layer, figures in stats.items()
        for figure, value in figures.items()
        if isinstance(value, (int, float))
    }


class _Progress:
    """A bar with a short text on a terminal; elsewhere lines, few and whole."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            text = TextColumn("{task.description}")
            columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), text)
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=steps)
            self._bar.start()

    def show(self, step: int, text: str | None = None, line: str | None = None) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, **({} if text is None else {"description": text}))
        elif line is not None:
            print(f"step {step}/{self._steps}  {line}", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
