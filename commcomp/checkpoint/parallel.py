"""Threads over tensors and chunks; results come in the order of what was put in, so files do not depend on them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_DEFAULT_THREADS = 8


def default_threads() -> int:
    """The processor's cores that this process may use, at most 8."""
    return min(_cores(), _MAX_DEFAULT_THREADS)


def default_threads_of_rank() -> int:
    """The same for one of several ranks on a machine, as far as torchrun tells (LOCAL_WORLD_SIZE)."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, min(_cores() // max(1, int(ranks) if ranks.isdigit() else 1), _MAX_DEFAULT_THREADS))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """work(item) of each, in order; at most two items a thread are under way or wait to be fetched."""
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads, "commcomp-snapshot") as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
