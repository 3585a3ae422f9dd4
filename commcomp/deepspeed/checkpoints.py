"""DeepSpeed checkpoints written with commcomp's lossless codec, and residuals beside them.

DeepSpeed's own engine stays inside and does all but writing; docs/deepspeed_checkpoints.md is for users.
"""

from __future__ import annotations

import glob
import inspect
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from commcomp.checkpoint import packed_torch, packed_torch_writer
from commcomp.checkpoint.errors import SnapshotError
from commcomp.checkpoint.parallel import default_threads_of_rank
from commcomp.checkpoint.store_files import sync_folder
from commcomp.complaint import complain, warn
from commcomp.config import reject_unknown, require_mapping
from commcomp.deepspeed import saved_residuals
from commcomp.deepspeed.agreement import agree, gather
from commcomp.deepspeed.checkpoint_engines import require_codec, require_engine
from commcomp.deepspeed.flat_buffers import FlatBuffers
from commcomp.error_feedback import RESIDUAL

LOSSLESS = "lossless"
_LOSSY = ("cautious", "standard", "compact")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The block `checkpoint` of "commcomp" in ds_config."""

    mode: str = LOSSLESS
    """lossless: what is loaded is what was saved, to the bit."""

    save_residuals: bool = True
    """Each rank's residuals of compressed gradients, and their warm starts, in a file of its own beside the rest."""

    def __post_init__(self) -> None:
        if self.mode in _LOSSY:
            raise ValueError(
                f"checkpoint.mode is {self.mode!r}; a DeepSpeed checkpoint is written 'lossless' only: it has weights "
                "twice, as the model's and as ZeRO's own in fp32, in files that would no longer agree; for lossy modes "
                "save torch's state dicts by commcomp.checkpoint.SnapshotStore"
            )
        if self.mode != LOSSLESS:
            raise ValueError(f"checkpoint.mode is {self.mode!r}; expected 'lossless'")
        if not isinstance(self.save_residuals, bool):
            raise ValueError(f"checkpoint.save_residuals is {self.save_residuals!r}; expected true or false")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CheckpointConfig:
        """Read the block. Raises ValueError naming the key or value that is wrong, and the nearest known key."""
        require_mapping(data, "checkpoint")
        reject_unknown(data, {field.name for field in fields(cls)}, "checkpoint")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ResidualState(Protocol):
    """What keeps residuals: a GradientSync, with keys "rank_<r>/residual/<parameter>" of this rank among others."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None: ...


def attach_checkpoints(
    engine: Any,
    config: CheckpointConfig | None = None,
    *,
    strict: bool = True,
    residual_state: ResidualState | None = None,
) -> CheckpointWriter:
    """Have this engine, and no other, write its checkpoints with commcomp's codec. On every rank.

    `residual_state`: saved and loaded with the engine's checkpoints. Attached again, it takes the new arguments.
    Raises ValueError, on every rank, where the engine writes checkpoints in a way that this cannot take over;
    ImportError or RuntimeError without the codec.
    """
    config = CheckpointConfig() if config is None else config

    def check() -> None:
        require_codec()
        if not isinstance(getattr(engine, "checkpoint_engine", None), CheckpointWriter):
            require_engine(engine)

    facts = {**config.to_dict(), "residual_state": residual_state is not None}
    agree(_problem_of(check), "attach_checkpoints", facts)
    writer = engine.checkpoint_engine
    if not isinstance(writer, CheckpointWriter):
        writer = CheckpointWriter(engine)
        engine.checkpoint_engine = writer
        engine.save_checkpoint, engine.load_checkpoint = writer.save_checkpoint, writer.load_checkpoint
    writer.config, writer.strict, writer.residual_state = config, strict, residual_state
    return writer


class CheckpointWriter:
    """Stands in for an engine's checkpoint engine, and for its `save_checkpoint` and `load_checkpoint`.

    Made by `attach_checkpoints`; whatever else is asked of it goes to DeepSpeed's own checkpoint engine.
    """

    def __init__(self, engine: Any) -> None:
        self.config, self.strict = CheckpointConfig(), True
        self.residual_state: ResidualState | None = None
        self._engine, self._inner = engine, engine.checkpoint_engine
        self._save_checkpoint: Callable[..., Any] = engine.save_checkpoint
        self._load_checkpoint: Callable[..., Any] = engine.load_checkpoint
        self._threads = default_threads_of_rank()
        self._is_saving, self._is_checked = False, False
        self._failure: Exception | None = None
        self._counts = {"files": 0, "packed_files": 0, "bytes": 0, "plain_bytes": 0, "residual_bytes": 0}
        self._seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._inner, name)

    def stats(self) -> dict[str, Any]:
        """Of this rank since it was attached: `files`, `packed_files`, `bytes`, `plain_bytes` (what plain DeepSpeed
        would have written), `residual_bytes` (not in `bytes`), `seconds`, `ratio`."""
        ratio = self._counts["plain_bytes"] / self._counts["bytes"] if self._counts["bytes"] else 1.0
        return {**self._counts, "seconds": self._seconds, "ratio": ratio}

    def save(self, state_dict: Any, path: str) -> None:
        """One file of a checkpoint. What fails within `save_checkpoint` is raised there, on every rank."""
        started = time.perf_counter()
        try:
            report = packed_torch_writer.save(
                state_dict,
                path,
                lambda other: self._inner.save(state_dict, other),
                mode=self.config.mode,
                threads=self._threads,
                cut=FlatBuffers(self._engine).cut,
            )
        except Exception as error:
            if not self._is_saving:
                raise
            self._failure = self._failure or error
            return
        self._counts["files"] += 1
        self._counts["packed_files"] += report.packed
        self._counts["bytes"] += report.bytes
        self._counts["plain_bytes"] += report.plain_bytes
        self._seconds += time.perf_counter() - started

    def load(self, path: str, map_location: Any = None) -> Any:
        """As DeepSpeed's own. Raises DamagedFileError for what is not whole."""
        if not self._is_checked and packed_torch.is_packed(path):
            packed_torch.check(path)
        try:
            return self._inner.load(path, map_location=map_location)
        except (FileNotFoundError, SnapshotError, MemoryError):
            raise
        except Exception as error:
            packed_torch.blame_damage(path, error)
            raise

    def save_checkpoint(self, *arguments: Any, **named: Any) -> Any:
        """As the engine's own; `latest` names the checkpoint once every rank's files are on the disk, and not before.

        Raises on every rank what failed on one; `latest` then still names the checkpoint before.
        """
        call = inspect.signature(self._save_checkpoint).bind(*arguments, **named)
        call.apply_defaults()
        save_latest, call.arguments["save_latest"] = call.arguments["save_latest"], False
        save_dir, tag = call.arguments["save_dir"], call.arguments["tag"]
        tag = f"global_step{self._engine.global_steps}" if tag is None else str(tag)
        call.arguments["tag"] = tag
        folder = os.path.join(save_dir, tag)
        # The engine's first barrier comes after this: nobody has written into the folder yet.
        self._failure = _problem_of(lambda: saved_residuals.remove(folder)) if dist.get_rank() == 0 else None
        self._is_saving = True
        try:
            result = self._save_checkpoint(*call.args, **call.kwargs)
        finally:
            self._is_saving = False
        (save, *_) = agree(self._failure, "save_checkpoint", own=secrets.token_hex(8))
        agree(_problem_of(lambda: self._save_residuals(folder, save)), "save_checkpoint")
        if save_latest:
            is_first = self._engine.global_rank == 0
            problem = _problem_of(lambda: _write_text(os.path.join(save_dir, "latest"), tag)) if is_first else None
            agree(problem, "save_checkpoint")
        return result

    def load_checkpoint(self, *arguments: Any, **named: Any) -> Any:
        """As the engine's own; residuals come with the optimizer's state, and are left alone where that is.

        Where a checkpoint has none, they begin anew, with a warning. Raises SnapshotError on every rank where a file is
        damaged, before anything is loaded.
        """
        call = inspect.signature(self._load_checkpoint).bind(*arguments, **named)
        call.apply_defaults()
        engine, folder = self._engine, _folder_to_load(call.arguments["load_dir"], call.arguments["tag"])
        if not engine.load_universal_checkpoint():
            agree(_problem_of(lambda: _check_share(folder)), "load_checkpoint")
            self._is_checked = not engine.use_node_local_storage()  # else nobody may have looked at some
        try:
            result = self._load_checkpoint(*arguments, **named)
        finally:
            self._is_checked = False
        wanted = call.arguments["load_optimizer_states"] and not call.arguments["load_module_only"]
        if self.residual_state is not None and wanted:
            path = result[0]
            self._load_residuals(None if path is None else os.path.dirname(path))
        return result

    def _save_residuals(self, folder: str, save: str) -> None:
        if self.residual_state is None or not self.config.save_residuals:
            return
        started = time.perf_counter()
        os.makedirs(folder, exist_ok=True)
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        size = saved_residuals.write(folder, self.residual_state.state_dict(), rank, num_ranks, save, self._threads)
        self._counts["residual_bytes"] += size
        self._seconds += time.perf_counter() - started

    def _load_residuals(self, folder: str | None) -> None:
        """`folder`: None where no checkpoint was loaded."""
        assert self.residual_state is not None
        found: saved_residuals.SavedResiduals | None = None
        problem: Exception | None = None
        try:
            if folder is not None:
                found = saved_residuals.read(folder, dist.get_rank(), dist.get_world_size(), self._threads)
        except Exception as error:
            problem = error
        saves = set(gather((problem and str(problem), None if found is None else found.save, folder is None)))
        if any(nothing for _, _, nothing in saves):
            return
        problems = sorted(text for text, _, _ in saves if text)
        if not problems and len(saves) > 1:
            problems = [f"{folder}: ranks have residuals of different saves, or some have none"]
        if problems:
            message = f"residuals cannot be loaded: {problems[0]}; load another checkpoint"
            complain(message, strict=self.strict, error=SnapshotError, unless="they may begin anew")
        elif found is not None:
            self.residual_state.load_state_dict(found.state)
            return
        else:
            warn(
                f"{folder} has no residuals of compressed gradients (commcomp_rank_<r>.ccsnap); they begin anew, and "
                "the next steps are not those of the run that was saved"
            )
        self.residual_state.load_state_dict(_without_residuals(self.residual_state.state_dict()))


def _without_residuals(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: torch.zeros_like(value) if f"/{RESIDUAL}/" in key else value.clone() for key, value in state.items()
    }


def _folder_to_load(load_dir: str, tag: Any) -> str | None:
    """As the engine finds it; None where it will say that there is none."""
    if tag is None:
        try:
            with open(os.path.join(load_dir, "latest")) as file:
                tag = file.read().strip()
        except FileNotFoundError:
            return None
    return os.path.join(load_dir, str(tag))


def _check_share(folder: str | None) -> None:
    """This rank's part of a checkpoint's files. Raises DamagedFileError."""
    paths = [] if folder is None else sorted(glob.glob(os.path.join(glob.escape(folder), "*.pt")))
    for path in paths[dist.get_rank() :: dist.get_world_size()]:
        if packed_torch.is_packed(path):
            packed_torch.check(path, snapshot=True)


def _problem_of(work: Callable[[], None]) -> Exception | None:
    try:
        work()
    except Exception as error:
        return error
    return None


def _write_text(path: str, text: str) -> None:
    """Whole or not at all."""
    unfinished = f"{path}.unfinished"
    with open(unfinished, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    sync_folder(os.path.dirname(os.path.abspath(path)))
