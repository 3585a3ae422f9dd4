"""The Hugging Face Trainer: compressed gradients, their residuals in its checkpoint folders."""

from __future__ import annotations

import functools
import inspect
import os
import weakref
from collections.abc import Sequence
from typing import Any

from commcomp import framework_parts
from commcomp.config import GradientConfig, Method, Rule
from commcomp.framework_parts import Settings
from commcomp.gradient_sync import GradientSync

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"commcomp.transformers: {error}; pip install 'commcomp[transformers]'") from error


def compress(
    trainer: Trainer,
    method: Settings | None = None,
    *,
    policy: Sequence[Rule | tuple[str, Method]] | None = None,
    mean_residual: bool = False,
    **settings: Any,
) -> CompressionCallback:
    """Have `trainer.train` average gradients in compressed form. Call it on every rank, before `trainer.train`.

    For DistributedDataParallel and FSDP. Residuals are saved into each `checkpoint-<step>/gradient_sync`, unless
    `save_only_model`, and read by `trainer.train(resume_from_checkpoint=...)` on any number of ranks. A GradScaler is
    taken into account.

    Args:
        method, policy, settings: as GradientSync takes them; `method` may be a GradientConfig or its dictionary.
        mean_residual: save one residual for all ranks instead of each rank's own: 4 bytes a compressed value whatever
            the number of ranks, but by other ranks owed. All ranks write to the same output_dir in either case.

    Raises ValueError naming what cannot work: here, or where it needs the wrapped model when training begins.
    """
    config = framework_parts.gradient_config(method, policy, settings, "commcomp.transformers.compress")
    if any(isinstance(callback, CompressionCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError("commcomp.transformers.compress was called for this Trainer already")
    callback = CompressionCallback(trainer, config, mean_residual)
    trainer.add_callback(callback)
    return callback


class CompressionCallback(TrainerCallback):
    """What `compress` returns; `state` is the GradientSync of the running or last `train`: `state.stats()`."""

    state: GradientSync | None

    def __init__(self, trainer: Trainer, config: GradientConfig, mean_residual: bool) -> None:
        self._trainer, self._config, self._mean_residual = trainer, config, mean_residual
        self.state = None
        self._wrapped: Any = lambda: None
        self._resume_from: str | None = None
        self._note_where_training_resumes()

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """The Trainer has wrapped the model; a second `train` finds it wrapped and goes on with its residuals."""
        model = self._trainer.model_wrapped
        if self._wrapped() is not model:
            if self.state is not None:
                self.state.close()
            self._wrapped = weakref.ref(model)  # else a wrapper given up for a smaller batch would stay in memory
            scaler = self._trainer.accelerator.scaler
            self.state = framework_parts.attach(model, self._config, scaler, "commcomp.transformers.compress")
        if self.state is not None and self._resume_from is not None:
            framework_parts.restore(self.state, self._resume_from)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """The Trainer has written its checkpoint, on every rank."""
        if self.state is not None and not args.save_only_model:
            folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            framework_parts.save(self.state, folder, mean_residual=self._mean_residual)

    def _note_where_training_resumes(self) -> None:
        """The Trainer tells its callbacks all but the folder that it resumes from."""
        train = self._trainer.train

        @functools.wraps(train)
        def noting(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(train).bind(*args, **kwargs).arguments
            if given.get("trial") is not None:
                raise ValueError("a hyperparameter search trains many models; compress is for one: leave it out there")
            folder = given.get("resume_from_checkpoint")
            self._resume_from = get_last_checkpoint(self._trainer.args.output_dir) if folder is True else folder or None
            return train(*args, **kwargs)

        self._trainer.train = noting
