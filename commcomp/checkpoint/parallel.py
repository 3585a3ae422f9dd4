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
_SMALL_BYTES = 4 << 20  # of all items that are under way


def default_threads() -> int:
    """The processor's cores that this process may use, at most 8."""
    return min(_cores(), _MAX_DEFAULT_THREADS)


def default_threads_of_rank() -> int:
    """The same for one of several ranks on a machine, as far as torchrun or DeepSpeed's launcher tells."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "")
    return max(1, min(_cores() // max(1, int(ranks) if ranks.isdigit() else 1), _MAX_DEFAULT_THREADS))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    size_of: Callable[[Item], int] = lambda _: 0,
) -> Iterator[Result]:
    """work(item) of each, in order; at most two items a thread are under way or wait to be fetched.

    `size_of`: bytes of an item; of large ones there is one more than threads.
    """
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads, "commcomp-snapshot") as pool:
        waiting: deque[tuple[Future[Result], int]] = deque()
        try:
            for item in items:
                size = size_of(item)
                while len(waiting) >= 2 * threads or (
                    len(waiting) > threads and sum(others for _, others in waiting) + size > _SMALL_BYTES
                ):
                    yield waiting.popleft()[0].result()
                waiting.append((pool.submit(work, item), size))
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            for future, _ in waiting:
                future.cancel()
