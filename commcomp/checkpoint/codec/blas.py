"""One thread for numpy's matrix products while snapshots are coded: tensors run side by side already.

Threads of the library that wait for each other on a busy machine take many times the time of one alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:
    from threadpoolctl import ThreadpoolController
except ImportError:  # an optional dependency: without it the library does as it likes
    ThreadpoolController = None

_lock = threading.Lock()
_users = 0
_limit: Any = None


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """For the whole process, until the last of those who asked for it has left."""
    global _users, _limit
    with _lock:
        _users += 1
        if _users == 1 and ThreadpoolController is not None:
            _limit = ThreadpoolController().limit(limits=1, user_api="blas")
            _limit.__enter__()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _limit is not None:
                _limit.__exit__(None, None, None)
                _limit = None
