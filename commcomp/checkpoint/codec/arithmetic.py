"""The arithmetic that snapshots are coded and decoded with: IEEE 754, on threads of our own.

Numpy's matrix products get one thread, since tensors run side by side already: threads of its library that wait for
each other on a busy machine take many times the time of one alone. Denormal numbers count, whatever
torch.set_flush_denormal says: a file must be decoded with what it was coded with.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from commcomp.checkpoint.codec.native import coders, is_built

try:
    from threadpoolctl import ThreadpoolController
except ImportError:  # an optional dependency: without it the library does as it likes
    ThreadpoolController = None

_lock = threading.Lock()
_users = 0
_limit: Any = None


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """For this thread and those that it starts, which take over its floating-point mode."""
    with one_blas_thread():
        mode = coders().use_ieee_floats() if is_built() else None
        try:
            yield
        finally:
            if mode is not None:
                coders().set_float_mode(mode)


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
