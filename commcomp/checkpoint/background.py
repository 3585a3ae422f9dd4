"""One piece of work beside the training, and its error, which is raised once more if nobody looked at it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

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


class Background(Generic[Result]):
    """Runs one call at a time on a thread that the interpreter waits for when it ends."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pool: ThreadPoolExecutor | None = None
        self._current: SaveFuture[Result] | None = None

    def start(self, work: Callable[[], Result]) -> SaveFuture[Result]:
        """The caller waited before."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, self._name)
        future = SaveFuture[Result]()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                result = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._pool.submit(run)
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
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
