"""Named network namespaces that are always cleaned up. Standard library only.

A namespace's name holds the pid and the start time of the process that owns it, so whoever comes later can
tell the leftovers of a dead run from a living one without any state file. A small janitor process (this file,
run as a script) outlives the owner and clears up at once when that was killed; the next start does so in case
the janitor was killed as well.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time

NETNS_FOLDER = "/var/run/netns"
ETC_FOLDER = "/etc/netns"  # `ip netns exec` mounts /etc/netns/<name>/hosts over /etc/hosts
TOOL_FOLDERS = "/usr/sbin:/sbin"  # where ip and tc live; often missing from PATH after `su`

RIGHTS_REMEDY = (
    "The rights for network namespaces are missing here: run as root on the machine itself, or start the "
    "container with `docker run --privileged` (or --cap-add NET_ADMIN --cap-add SYS_ADMIN)"
)

_SERIAL = itertools.count()
_NAME = re.compile(r"commcomp-(\d+)-(\d+)-\d+-(?:switch|node\d+)")


class NetworkError(RuntimeError):
    """The namespaces or links could not be made; the message names the remedy."""


def find_tool(name: str) -> str:
    """Full path of `ip` or `tc`. Raises NetworkError with the remedy where it is missing."""
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":" + TOOL_FOLDERS)
    if path is None:
        raise NetworkError(
            f"the program {name!r} was not found in PATH or {TOOL_FOLDERS}: install it (`apt-get install "
            "iproute2` on Debian and Ubuntu, `dnf install iproute iproute-tc` on Fedora)"
        )
    return path


def command(tool: str, *args: str, remedy: str = "") -> str:
    """Run ip or tc and return what it prints. Raises NetworkError, ending with `remedy`, where it fails."""
    argv = [find_tool(tool), *args]
    # In a session of its own: Ctrl-C at the terminal must not leave a half-made network.
    quiet = subprocess.DEVNULL
    done = subprocess.run(argv, stdin=quiet, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit status {done.returncode}"
        raise NetworkError(f"`{tool} {' '.join(args)}` failed: {said}. {remedy}".rstrip())
    return done.stdout


def process_start(pid: int) -> int | None:
    """When process `pid` started (clock ticks since boot); None if it does not live (a zombie is dead)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()  # the name in brackets may hold spaces
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def new_prefix() -> str:
    """Start of the names of a new run's namespaces: this process and a serial number."""
    return f"commcomp-{os.getpid()}-{process_start(os.getpid())}-{next(_SERIAL)}"


def check_platform() -> None:
    """Raise NetworkError, with the remedy, where this is not Linux, has no ip or tc, or we are not root."""
    if not sys.platform.startswith("linux"):
        raise NetworkError(f"network namespaces need Linux, this is {sys.platform}: use a Linux machine")
    for tool in ("ip", "tc"):
        find_tool(tool)
    if os.geteuid() != 0:
        raise NetworkError(f"only root may make network namespaces, not uid {os.geteuid()}: run with sudo")


def processes_in(namespace: str) -> list[int]:
    """Process ids inside the named network namespace (what `ip netns pids` prints)."""
    try:
        wanted = os.stat(os.path.join(NETNS_FOLDER, namespace))
    except OSError:
        return []
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if os.path.samestat(os.stat(f"/proc/{entry}/ns/net"), wanted):
                    found.append(int(entry))
            except OSError:
                continue  # it ended meanwhile
    return found


def kill_processes(namespace: str, seconds: float = 5.0) -> list[int]:
    """Kill all processes in a namespace; return those that did not go within `seconds`."""
    deadline = time.monotonic() + seconds
    while (pids := processes_in(namespace)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return pids


def remove_namespace(namespace: str) -> None:
    """Kill what runs in a namespace and delete it with its interfaces. No error if it is gone already."""
    kill_processes(namespace)
    shutil.rmtree(os.path.join(ETC_FOLDER, namespace), ignore_errors=True)
    try:
        command("ip", "netns", "del", namespace)
    except NetworkError:
        if namespace in _namespaces():  # else a second launcher was quicker
            raise


def _namespaces() -> list[str]:
    found: set[str] = set()
    for folder in (NETNS_FOLDER, ETC_FOLDER):  # after a reboot only the second still has the name
        if os.path.isdir(folder):
            found.update(name for name in os.listdir(folder) if _NAME.fullmatch(name))
    return sorted(found)


def remove_dead_runs() -> list[str]:
    """Remove the namespaces, and the processes in them, of runs whose owner is dead; return their names."""
    removed = []
    for name in _namespaces():
        match = _NAME.fullmatch(name)
        assert match is not None
        if process_start(int(match[1])) != int(match[2]):
            with contextlib.suppress(NetworkError):  # one that will not go must not stop a new run
                remove_namespace(name)
                removed.append(name)
    return removed


def start_janitor() -> subprocess.Popen[bytes]:
    """Start the process that removes our namespaces if we die; write b'done' to its stdin to dismiss it."""
    owner = os.getpid()
    argv = [sys.executable, "-I", os.path.abspath(__file__), str(owner), str(process_start(owner))]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True, cwd="/"
    )


def _be_janitor(owner: int, start: int) -> None:
    """Wait until the owner says 'done' or dies; in the second case remove what it left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # whoever ends the owner's whole group must not end this one
    while process_start(owner) == start:
        # The end of the pipe alone does not prove it: a child that the owner forked may hold it open.
        if select.select([0], [], [], 1.0)[0]:
            if os.read(0, 16):
                return
            time.sleep(0.05)
    remove_dead_runs()


if __name__ == "__main__":
    _be_janitor(int(sys.argv[1]), int(sys.argv[2]))
