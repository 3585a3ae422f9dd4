"""Lightning: `Compression`, a callback for compressed gradients, and `SnapshotIO`, a plugin for checkpoints.

DDPStrategy(ddp_comm_state=, ddp_comm_hook=) would take a hook too, but Lightning registers it on CUDA alone, never
saves its state, and wants it before there is a model; a callback comes when the model is wrapped.
"""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from commcomp import framework_parts
from commcomp.complaint import warn
from commcomp.config import Method, Rule
from commcomp.framework_parts import Settings
from commcomp.gradient_sync import GradientSync


def _import(names: Sequence[str]) -> Any:
    """The Lightning that the script uses: `lightning` unless `pytorch_lightning` alone is loaded or installed."""
    loaded = [name for name in names if name in sys.modules]
    for name in loaded or names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                raise
    raise ModuleNotFoundError("commcomp.lightning needs Lightning: pip install 'commcomp[lightning]'")


_Callback: Any = _import(("lightning.pytorch", "pytorch_lightning")).Callback
_TorchCheckpointIO: Any = _import(("lightning.fabric.plugins", "lightning_fabric.plugins")).TorchCheckpointIO


class Compression(_Callback):
    """Averages gradients in compressed form: `Trainer(strategy="ddp", callbacks=[Compression(LowRank(rank=16))])`.

    Takes what GradientSync takes; `method` may be a GradientConfig or its dictionary. Works with strategies that wrap
    the model in DistributedDataParallel, FullyShardedDataParallel or `fully_shard`. The GradScaler of "16-mixed" is
    taken into account. `trainer.fit` again starts without residuals, as it does without optimizer states.

    Checkpoints hold the mean of the residuals, one for all ranks, and are read on any number of ranks; every rank
    keeps 4 bytes a compressed value in CPU memory while one is written.

    Raises ValueError for settings that cannot work: here, or where they need the model when `fit` begins.
    """

    state: GradientSync | None
    """Of the running or last `fit`: `compression.state.stats()`."""

    def __init__(
        self,
        method: Settings | None = None,
        *,
        policy: Sequence[Rule | tuple[str, Method]] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self._config = framework_parts.gradient_config(method, policy, settings, "commcomp.lightning.Compression")
        self.state = None
        self._loaded: dict[str, Tensor] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """The strategy has wrapped the model."""
        if self.state is not None:
            self.state.close()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        model = trainer.strategy.model
        self.state = framework_parts.attach(model, self._config, scaler, "commcomp.lightning.Compression")
        self._restore()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """A checkpoint of a run without compression holds nothing for this callback."""
        if trainer.state.fn == "fit" and self.state_key not in checkpoint.get("callbacks", {}):
            warn(f"the checkpoint holds no residuals (no callback {self.state_key!r}): compression begins anew from it")

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Before or after the model is wrapped, as the strategy likes it."""
        self._loaded = state_dict
        self._restore()

    def state_dict(self) -> dict[str, Tensor]:
        """A collective, as saving a checkpoint is."""
        if self.state is not None:
            return self.state.state_dict(mean_residual=True)
        return self._loaded or {}

    def _restore(self) -> None:
        if self.state is not None and self._loaded is not None:
            self.state.load_state_dict(self._loaded)
            self._loaded = None


class SnapshotIO(_TorchCheckpointIO):
    """Writes checkpoints with SnapshotStore's coder: `Trainer(plugins=[SnapshotIO()])`.

    A checkpoint is a folder of the name that Lightning gives it, with one snapshot that needs no other; `commcomp ckpt`
    reads it. Nothing in it is pickled, and what a snapshot cannot hold (docs/checkpoint_states.md) is a TypeError with
    its place in the checkpoint. Files that torch.save wrote are read and removed as by Lightning. For strategies under
    which rank 0 has the whole model, and folders of the local file system.

    Args:
        mode: "lossless", or a lossy mode of SnapshotStore.
        options: SnapshotStore's `coder`, `threads`, `verify_saves`.
    """

    def __init__(self, mode: str = "lossless", **options: Any) -> None:
        super().__init__()
        self._mode, self._options = mode, options
        self._store("")  # wrong settings are said now

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a folder, in place of what is at `path`; a crash leaves that, or the new one.

        Raises TypeError naming what a snapshot cannot hold, ValueError for a remote path, OSError (disk full).
        """
        if storage_options is not None:
            raise TypeError(f"storage_options={storage_options!r} was given; SnapshotIO takes none: leave it out")
        path = _local(path)
        step = int(checkpoint.get("global_step", 0))
        if os.path.isdir(path) and not os.path.islink(path):
            self._replace(path, step, checkpoint)
            return
        unfinished = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.tmp-{secrets.token_hex(4)}")
        try:
            self._store(unfinished).save(step, checkpoint)
            if os.path.lexists(path):
                os.unlink(path)  # a link to another checkpoint, or a file of torch.save
            os.rename(unfinished, path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint, with its tensors on the CPU.

        Raises DamagedFileError naming file and tensor, MissingSnapshotError where the folder holds none.
        """
        path = _local(path)
        if not os.path.isdir(path):
            return super().load_checkpoint(path, map_location, weights_only)
        if map_location is not None and str(map_location) != "cpu":
            raise ValueError(f"map_location={map_location!r}; SnapshotIO loads to the CPU: leave it out, and move then")
        return self._store(path).load()

    def _replace(self, path: str, step: int, checkpoint: dict[str, Any]) -> None:
        store = self._store(path)
        store.save(step, checkpoint, overwrite=True)
        before = [other for other in store.steps() if other != step]
        if before:
            store.prune(steps=before)

    def _store(self, path: str) -> Any:
        from commcomp.checkpoint import SnapshotStore  # needs a package that gradients do not

        return SnapshotStore(path, self._mode, 1, keep_reference=False, **self._options)


def _local(path: Any) -> str:
    text = os.fspath(path)
    if "://" in text:
        raise ValueError(f"{text} is no path of a local file system; SnapshotIO writes to such only: leave it out")
    return os.path.abspath(text)
