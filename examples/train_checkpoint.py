"""Checkpoints of examples/train_gpt.py through torch.distributed.checkpoint: for any way of sharding and world size.

The state is the model's, the optimizer's, the number of steps done and, by rank, what the gradient compressor owes.
The step is the position in the data too, and stands for all random numbers: batches are a function of it.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import commcomp
from train_record import RunRecord
from train_storage import newest, reader_of, storage_of

_HISTORY = "history.json"


class Checkpoints:
    """Saves the state of a run while it goes on, and goes on from it. Every rank makes every call."""

    def __init__(
        self,
        config: DictConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        gradient_sync: commcomp.GradientSync | None,
        record: RunRecord,
    ) -> None:
        self._config, self._settings = config, config.checkpoint
        self._model, self._optimizer, self._sync, self._record = model, optimizer, gradient_sync, record
        self._folder = Path(config.output_dir) / "checkpoints"
        self._storage = storage_of(self._settings, self._folder)
        self._is_first = dist.get_rank() == 0
        self._group: dist.ProcessGroup | None = None
        if self._storage is not None and self._settings.background:
            # Another thread's collectives must not mix with those of training.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout_seconds))
        self._pending: tuple[Future[Any], int, float] | None = None

    def resume(self) -> int:
        """Go on from the checkpoint that the settings mean, if there is one; how many steps are done."""
        checkpoint = find(self._config.resume, self._folder)
        if checkpoint is None:
            self._record.require_own_folder()
            return 0
        steps_done = self._load(checkpoint)
        self._record.resume(json.loads((checkpoint / _HISTORY).read_text()), checkpoint)
        return steps_done

    def due(self, steps_done: int) -> bool:
        return self._storage is not None and steps_done % self._settings.every == 0

    def save(self, step: int) -> None:
        """Write the state after `step` steps, on one file system that all ranks see.

        In the background: when this returns the state has been copied, and the save before is complete.
        """
        assert self._storage is not None
        self.wait()
        start = time.perf_counter()
        if self._is_first:
            _write_synced(self._storage.begin(step) / _HISTORY, json.dumps(self._record.history))
        dist.barrier()
        state, writer = self._training_state(step), self._storage.writer(step)
        if self._sync is not None:
            state["gradient_sync"] = self._sync.state_dict(mean_residual=self._settings.mean_residual)
        if self._group is None:
            dcp.save(state, storage_writer=writer)
            self._complete(step, time.perf_counter() - start)
        else:
            future = dcp.async_save(state, storage_writer=writer, process_group=self._group)
            self._pending = future, step, time.perf_counter() - start

    def poll(self) -> None:
        """Take note of a checkpoint that has become complete in the background."""
        if self._pending is not None and self._pending[0].done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong."""
        if self._pending is None:
            return
        (future, step, seconds), self._pending = self._pending, None
        start = time.perf_counter()
        future.result()
        self._complete(step, seconds + time.perf_counter() - start)

    def _complete(self, step: int, seconds: float) -> None:
        if self._storage is not None and self._is_first:
            self._storage.complete(step, self._settings.keep)
            self._record.saved(step, *_sizes(self._storage.folder(step)), seconds)

    def _training_state(self, step: int) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer, "step": torch.tensor(step)}

    def _load(self, checkpoint: Path) -> int:
        """Of any world size; returns the steps done."""
        reader = reader_of(checkpoint)
        saved = reader.read_metadata().state_dict_metadata
        state = self._training_state(0)
        dcp.load(state, storage_reader=reader)
        set_state_dict(
            self._model, self._optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        if self._sync is not None:
            if any(key.startswith("gradient_sync.") for key in saved):
                self._sync.restore(storage_reader=reader)
            elif self._is_first:
                print(f"{checkpoint} holds no residuals: gradient compression starts afresh", flush=True)
        return int(state["step"])


def find(resume: str, folder: Path) -> Path | None:
    """Return the checkpoint that `resume` (auto, none or a path) means, equal on all ranks; None: start afresh."""
    if resume == "none":
        if newest(folder):
            raise ValueError(
                f"resume=none, but {folder} holds checkpoints; delete them, choose another output_dir, "
                "or go on from the newest with resume=auto"
            )
        return None
    if resume != "auto":
        try:
            reader_of(Path(resume))
        except ValueError as error:
            raise ValueError(f"resume is {resume!r}; expected auto, none or the folder of a checkpoint") from error
        return Path(resume)
    found = [newest(folder)]
    dist.broadcast_object_list(found, src=0)  # ranks must agree even if one sees the file system late
    return found[0]


def _sizes(checkpoint: Path) -> tuple[int, int]:
    """Bytes of the files that hold the state, and of its tensors, what several ranks have alike counted once."""
    stored = sum(file.stat().st_size for file in checkpoint.iterdir() if file.name != _HISTORY)
    items = reader_of(checkpoint).read_metadata().state_dict_metadata.values()
    tensors = [item for item in items if isinstance(item, TensorStorageMetadata)]
    return stored, sum(item.size.numel() * item.properties.dtype.itemsize for item in tensors)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
