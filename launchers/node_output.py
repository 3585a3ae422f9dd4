"""The output of the nodes: node 0's goes to the terminal as well as to its log. Standard library only."""

from __future__ import annotations

import codecs
import os
import select
import shutil
import struct
import sys
import time
from pathlib import Path


class LiveOutput:
    """Carries node 0's output to its log file and to our own stdout, as it comes."""

    def __init__(self, log: Path) -> None:
        self._file = open(log, "wb")  # noqa: SIM115 (closed in close)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._show = True
        if sys.stdout.isatty():  # a terminal of its own: progress bars need its width and move its cursor
            self._end, self.child = os.openpty()
            size = shutil.get_terminal_size()
            import fcntl  # not on Windows, where the launcher should get as far as saying what it needs
            import termios

            fcntl.ioctl(self.child, termios.TIOCSWINSZ, struct.pack("HHHH", size.lines, size.columns, 0, 0))
        else:
            self._end, self.child = os.pipe()

    def started(self) -> None:
        """Call when the child has its copy of the write end: ours would keep the stream open for ever."""
        if self.child >= 0:
            os.close(self.child)
        self.child = -1

    def pump(self, seconds: float) -> bool:
        """Pass on what comes within `seconds`; False if that was nothing."""
        if self._end < 0 or not select.select([self._end], [], [], seconds)[0]:
            time.sleep(seconds if self._end < 0 else 0)
            return False
        try:
            data = os.read(self._end, 1 << 16)
        except OSError:  # EIO: how a pty says that its last writer has gone
            data = b""
        if not data:
            os.close(self._end)
            self._end = -1
            return False
        self._file.write(data.replace(b"\r\n", b"\n"))
        self._file.flush()
        if self._show:
            try:
                sys.stdout.write(self._decoder.decode(data))
                sys.stdout.flush()
            except BrokenPipeError:  # `| head`: the run goes on, the log has everything
                self._show = False
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return True

    def close(self) -> None:
        """Pass on what is still there and close the log."""
        self.started()
        while self.pump(0.0):
            pass
        if self._end >= 0:
            os.close(self._end)
        self._file.close()


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log, marked as a quotation."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    return "".join(f"  | {line}\n" for line in text)
