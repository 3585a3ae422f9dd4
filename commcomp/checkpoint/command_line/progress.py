"""A progress bar in bytes, where rich is installed and somebody looks."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

from commcomp.checkpoint.chain import SnapshotChain
from commcomp.checkpoint.container_reader import SnapshotReader

_REFRESH_SECONDS = 0.1


class Progress:
    """`move(bytes)` moves the bar, from any thread; None without one."""

    def __init__(self, move: Callable[[int], object] | None) -> None:
        self._move = move

    def advance(self, num_bytes: int) -> None:
        if self._move is not None:
            self._move(num_bytes)

    @contextlib.contextmanager
    def watching(self) -> Iterator[Callable[[SnapshotChain], None]]:
        """Follows what is read of a file, from when the function is given it to the end of the block."""
        done = threading.Event()
        threads: list[threading.Thread] = []

        def follow(reader: SnapshotReader) -> None:
            seen, last = 0, False
            while not last:
                last = done.wait(_REFRESH_SECONDS)
                now = reader.bytes_read
                self.advance(now - seen)
                seen = now

        def watch(chain: SnapshotChain) -> None:
            if self._move is not None:
                threads.append(threading.Thread(target=follow, args=(chain[0],), daemon=True))
                threads[-1].start()

        try:
            yield watch
        finally:
            done.set()
            for thread in threads:
                thread.join()


@contextlib.contextmanager
def progress(what: str, total_bytes: int, *, quiet: bool) -> Iterator[Progress]:
    """A bar on the terminal for so many bytes of work."""
    try:
        import rich.progress as bars
    except ImportError:
        bars = None  # type: ignore[assignment]
    if quiet or bars is None or not sys.stderr.isatty():
        yield Progress(None)
        return
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield Progress(lambda num_bytes: bar.update(task, advance=num_bytes))
