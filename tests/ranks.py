"""Runs a function on several real processes joined by gloo, as the tests need it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A fork server that has torch loaded starts a rank in a tenth of a second instead of two.
_context = multiprocessing.get_context("forkserver")
# torch._dynamo is what the first optimizer step imports.
_context.set_forkserver_preload(
    ["torch", "torch.distributed", "torch._dynamo", "pytest", "commcomp", "tests.ranks", "tests.loaded_deepspeed"]
)

_STAY = 10.0
"""Seconds that a rank with a result waits for the others."""


class RankFailed(AssertionError):
    """A rank raised; the message is its traceback. `errors` maps rank to the pickled-by-name exception text."""

    def __init__(self, errors: dict[int, tuple[str, str, str]]) -> None:
        self.errors = errors
        super().__init__("\n".join(f"rank {rank}: {trace}" for rank, (_, _, trace) in sorted(errors.items())))


def run_ranks(
    function: Callable[..., Any], num_ranks: int, *arguments: Any, timeout: float = 150, init: bool = True
) -> list[Any]:
    """Call `function(rank, *arguments)` on every rank and return the results in rank order.

    `function` is a module-level function; it runs with one thread, inside an initialised gloo group unless `init` is
    False. Raises RankFailed if a rank raises, and AssertionError naming the ranks that still run after `timeout`
    seconds (a hang) or that died.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = _context.Queue()
        processes = [
            _context.Process(
                target=_serve_rank, args=(function, rank, num_ranks, arguments, folder, init, results), daemon=True
            )
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(results, processes, num_ranks, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(results: Any, processes: list[Any], num_ranks: int, timeout: float) -> list[Any]:
    outcomes: dict[int, Any] = {}
    errors: dict[int, tuple[str, str, str]] = {}
    deadline = time.monotonic() + timeout
    while len(outcomes) + len(errors) < num_ranks:
        missing = [rank for rank in range(num_ranks) if rank not in outcomes and rank not in errors]
        try:
            rank, failed, data = results.get(timeout=0.2)
        except queue.Empty:
            dead = [rank for rank in missing if processes[rank].exitcode not in (None, 0)]
            if dead and not errors:
                raise AssertionError(f"ranks {dead} died: exit {[processes[rank].exitcode for rank in dead]}") from None
            if time.monotonic() > deadline:
                raise AssertionError(f"ranks {missing} still run after {timeout} s; errors so far: {errors}") from None
            if errors and time.monotonic() > deadline - timeout + 20:
                break  # the others wait for a rank that has failed
            continue
        if failed:
            errors[rank] = data
        else:
            outcomes[rank] = pickle.loads(data)
    if errors:
        raise RankFailed(errors)
    return [outcomes[rank] for rank in range(num_ranks)]


def _serve_rank(
    function: Callable[..., Any], rank: int, num_ranks: int, arguments: Any, folder: str, init: bool, results: Any
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    succeeded = False
    try:
        if init:
            store = dist.FileStore(str(Path(folder) / "store"), num_ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
        data = pickle.dumps(function(rank, *arguments))
        results.put((rank, False, data))
        succeeded = True
    except BaseException as error:
        results.put((rank, True, (type(error).__name__, str(error), traceback.format_exc())))
    finally:
        results.close()
        results.join_thread()
        if succeeded:
            # Others may still connect to this rank, which its leaving would end; run_ranks kills it when all are done.
            time.sleep(_STAY)
        if init and dist.is_initialized():
            dist.destroy_process_group()
