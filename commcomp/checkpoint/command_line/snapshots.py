"""Snapshot files of a store or of a run of torch.distributed.checkpoint: their parents are found by their names."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator

import torch

from commcomp.checkpoint.chain import SnapshotChain
from commcomp.checkpoint.coded import HostTensor
from commcomp.checkpoint.command_line.file_state import PACKED, TORCH, FileState
from commcomp.checkpoint.command_line.packing import replacing
from commcomp.checkpoint.decoder import decode, whole
from commcomp.checkpoint.errors import DamagedFileError, SnapshotError
from commcomp.checkpoint.loading import load_state

_STEP = re.compile(r"step-(\d{12})(?=\.ccsnap$|/rank-\d+\.ccsnap$)")
_RANK = re.compile(r"rank-(\d+)\.ccsnap")


def is_snapshot(path: str) -> bool:
    """By its name: step-....ccsnap, or rank-....ccsnap in a folder step-...."""
    return _STEP.search(os.path.abspath(path)) is not None


def restored_name(path: str) -> str:
    """What a snapshot of a store is called as a file of torch.save: step-....pt."""
    return path.removesuffix(PACKED) + ".pt"


def verify(path: str, threads: int, watch: Callable[[SnapshotChain], None]) -> None:
    """Decode it through its parents and compare every hash. Raises DamagedFileError, WrongParentError."""
    read(path, threads, watch)


def read(path: str, threads: int, watch: Callable[[SnapshotChain], None] = lambda _: None) -> FileState:
    """Its state, decoded through its parents; `watch` gets the open file before. Raises as `verify`."""
    with _opened(path) as chain:
        watch(chain)
        reader = chain[0]
        pieces = decode(chain, whole(reader), threads=threads)
        tensors = {
            name: HostTensor(name, tensor.header.dtype, tensor.header.shape, pieces[name].data)
            for name, tensor in reader.tensors.items()
        }
        return FileState(path, reader.tree_info, tensors, {"kind": TORCH}, reader.tensors)


def unpack(path: str, target: str, threads: int, watch: Callable[[SnapshotChain], None]) -> None:
    """Write the state of a store's snapshot by torch.save. Raises as `verify`, SnapshotError for a rank's part of a
    checkpoint, OSError; `target` is not there then, or as it was."""
    if _RANK.fullmatch(os.path.basename(path)):
        raise SnapshotError(
            f"{path} is one rank's part of a checkpoint; torch.distributed.checkpoint.load with "
            "commcomp.checkpoint.DeltaStorageReader reads the whole, on one process too"
        )
    with _opened(path) as chain:
        watch(chain)
        state = load_state(chain, None, threads, True)
    with replacing(target) as unfinished, open(unfinished, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _opened(path: str) -> Iterator[SnapshotChain]:
    """The file and its parents, which are found by their names; what the names say is checked."""
    path = os.path.abspath(path)
    found = _STEP.search(path)
    assert found is not None
    start, stop = found.span(1)
    with SnapshotChain(int(found[1]), lambda step: f"{path[:start]}{step:012d}{path[stop:]}") as chain:
        if chain[0].header.step != int(found[1]):
            raise DamagedFileError(path, f"holds step {chain[0].header.step}; the name says otherwise: it was renamed")
        if rank := _RANK.fullmatch(os.path.basename(path)):
            _check_description(path[: found.start()], int(found[1]), int(rank[1]), chain[0].state_hash)
        yield chain


def _check_description(run: str, step: int, rank: int, state_hash: str) -> None:
    from commcomp.checkpoint.distributed.run_folder import RunFolder  # imports a second of torch

    folder = RunFolder(run)
    due = folder.read(step).state_hashes.get(rank)
    if due != state_hash:
        raise DamagedFileError(
            folder.rank_file(step, rank), f"state hash {state_hash}; its checkpoint was completed with {due}"
        )
