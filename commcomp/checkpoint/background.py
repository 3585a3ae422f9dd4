"""One piece of work beside the training, and its error, which is raised once more if nobody looked at it."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 (registers what it does when the interpreter ends)
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class SaveFuture(Future[Result], Generic[Result]):
    """A future that knows whether its outcome was asked for."""

    was_seen = False

    def result(self, timeout: float | None = None) -> Result:
        try:
            return super().result(timeout)
        finally:
            self.was_seen = self.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        try:
            return super().exception(timeout)
        finally:
            self.was_seen = self.done()


_running: weakref.WeakSet[SaveFuture[Any]] = weakref.WeakSet()


def _wait_for_all() -> None:
    for future in list(_running):
        future.exception()


# When the interpreter ends it calls these, the newest first, before it waits for threads: ours must come before that of
# concurrent.futures, after which no pool of threads takes work, and a save needs some.
threading._register_atexit(_wait_for_all)  # type: ignore[attr-defined]


class Background(Generic[Result]):
    """Runs one call at a time on a thread that the interpreter waits for when it ends."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._current: SaveFuture[Result] | None = None

    def start(self, work: Callable[[], Result]) -> SaveFuture[Result]:
        """The caller waited before."""
        future = SaveFuture[Result]()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                result = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        _running.add(future)
        self._thread = threading.Thread(target=run, name=self._name)
        self._thread.start()
        self._current = future
        return future

    def wait(self) -> BaseException | None:
        """Until nothing runs; the error of the last call, if it had one that nobody has seen."""
        future, self._current = self._current, None
        if future is None:
            return None
        was_seen = future.was_seen
        error = future.exception()
        return None if was_seen else error

    def close(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
