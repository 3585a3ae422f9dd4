"""Snapshot files of a store or of a run of torch.distributed.checkpoint: their parents are found by their names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from commcomp.checkpoint.chain import SnapshotChain
from commcomp.checkpoint.decoder import decode, whole
from commcomp.checkpoint.errors import DamagedFileError

_STEP = re.compile(r"step-(\d{12})(?=\.ccsnap$|/rank-\d+\.ccsnap$)")
_RANK = re.compile(r"rank-(\d+)\.ccsnap")


def is_snapshot(path: str) -> bool:
    """By its name: step-....ccsnap, or rank-....ccsnap in a folder step-...."""
    return _STEP.search(os.path.abspath(path)) is not None


def verify(path: str, threads: int, watch: Callable[[SnapshotChain], None]) -> None:
    """Decode it through its parents and compare every hash. Raises DamagedFileError, WrongParentError."""
    path = os.path.abspath(path)
    found = _STEP.search(path)
    assert found is not None
    start, stop = found.span(1)
    with SnapshotChain(int(found[1]), lambda step: f"{path[:start]}{step:012d}{path[stop:]}") as chain:
        watch(chain)
        if chain[0].header.step != int(found[1]):
            raise DamagedFileError(path, f"holds step {chain[0].header.step}; the name says otherwise: it was renamed")
        if rank := _RANK.fullmatch(os.path.basename(path)):
            _check_description(path[: found.start()], int(found[1]), int(rank[1]), chain[0].state_hash)
        decode(chain, whole(chain[0]), threads=threads)
        chain[0].tree_info  # noqa: B018


def _check_description(run: str, step: int, rank: int, state_hash: str) -> None:
    from commcomp.checkpoint.distributed.run_folder import RunFolder  # imports a second of torch

    folder = RunFolder(run)
    due = folder.read(step).state_hashes.get(rank)
    if due != state_hash:
        raise DamagedFileError(
            folder.rank_file(step, rank), f"state hash {state_hash}; its checkpoint was completed with {due}"
        )
