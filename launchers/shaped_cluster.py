#!/usr/bin/env python3
"""Run a training script on several nodes with slow links, all on this one machine (Linux, root).

    sudo .venv/bin/python launchers/shaped_cluster.py --nodes 2 --rate 100mbit -- train.py --my-option 1

Each node is a network namespace with its own torchrun; a switch joins them, and both directions of every link
are held to the rate by the kernel. All output goes to files under --logs, node 0's to the terminal too. The
exit status is that of the worst node (128 + n for signal n). From Python:

    with ShapedCluster(nodes=2, rate="100mbit") as cluster:
        status = cluster.run(["train.py", "--my-option", "1"])
        cluster.set_rate("1gbit")

Standard library only. Nothing outside the namespaces is changed, and several clusters may run at once.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

if not __package__:  # run as a script: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from launchers.network_namespaces import NetworkError, find_tool
from launchers.node_output import LiveOutput, tail
from launchers.shaped_links import INTERFACE, LinkCounters, NamespaceNetwork, capabilities

__all__ = ["LinkCounters", "NetworkError", "ShapedCluster", "capabilities"]

TIMEOUT_STATUS = 124  # as the `timeout` command has it
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
# Settings of a torchrun around this one; they would change what the nodes' own torchrun does.
_INHERITED = ("PET_", "TORCHELASTIC_", "MASTER_", "LOCAL_", "GROUP_", "ROLE_")


@dataclass
class _Node:
    index: int
    process: subprocess.Popen[bytes]
    log: Path
    stopped_by_us: bool = False

    def status(self) -> int | None:
        """Exit status as a shell shows it, None while the node runs."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code


class ShapedCluster:
    """Nodes joined by shaped links; a context manager that makes them on entry and removes them on exit.

    nodes: how many; rate: limit of each link and direction ('100mbit'; 'none' = unshaped); nproc: processes
    per node; burst: what a link may send at once after a pause ('32kb'; None: about 1 ms worth); latency: the
    longest wait in a queue; logs: folder for the output; port: of node 0, inside the cluster; grace: seconds
    left to the others when a node fails; max_restarts: torchrun's own (above 0 with its c10d rendezvous).
    Raises ValueError on values not understood, NetworkError (on entry) where this machine cannot do it.
    """

    def __init__(
        self,
        nodes: int,
        rate: str = "none",
        *,
        nproc: int = 1,
        burst: str | None = None,
        latency: str = "100ms",
        logs: str | os.PathLike[str] | None = None,
        port: int = 29500,
        grace: float = 15.0,
        max_restarts: int = 0,
        python: str = sys.executable,
    ) -> None:
        if nproc < 1:
            raise ValueError(f"nproc = {nproc} is out of range: give 1 or more processes a node")
        if not 1 <= port <= 65535:
            raise ValueError(f"port = {port} is out of range: give 1 to 65535")
        self.network = NamespaceNetwork(nodes, rate, burst, latency)
        self.nproc, self.port, self.grace, self.python = nproc, port, grace, python
        self.max_restarts = max_restarts
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.logs = Path(logs or Path("runs", f"shaped_cluster-{stamp}-{os.getpid()}"))
        self._stop: int | None = None

    @property
    def rate(self) -> str:
        """The rate of the links at present."""
        return self.network.rate

    def __enter__(self) -> ShapedCluster:
        self.network.build()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill whatever still runs in the nodes and remove them. May be called again."""
        self.network.close()

    def set_rate(self, rate: str) -> None:
        """Shape every link to `rate` without rebuilding; also while a script runs."""
        self.network.set_rate(rate)

    def counters(self) -> list[LinkCounters]:
        """Each node's interface counters since the cluster was made; read them before and after `run`."""
        return self.network.counters()

    def stop(self, signum: int) -> None:
        """Ask `run` to end its nodes and return 128 + signum. Safe in a signal handler."""
        self._stop = self._stop or signum

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        logs: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
    ) -> int:
        """Run `torchrun ... argv` on every node (argv: script or `-m module`, then its arguments).

        env: variables on top of this process's; logs: another folder than the cluster's (it is overwritten);
        timeout: seconds after which all nodes are ended. Returns 0, or the largest exit status of a node that
        ended by itself (128 + n for a signal), 124 after the timeout. Raises ValueError without a script.
        """
        check_script(argv, self.python)
        folder = Path(logs or self.logs)
        folder.mkdir(parents=True, exist_ok=True)
        stream = LiveOutput(folder / "node0.log")
        nodes: list[_Node] = []
        try:
            for index in range(len(self.network.nodes)):
                nodes.append(self._start(index, argv, env or {}, folder, stream))
            stream.started()
            return self._wait(nodes, stream, timeout)
        finally:
            self._end(nodes, stream)
            stream.close()

    def torchrun(self, index: int, argv: Sequence[str]) -> list[str]:
        """The command line of one node, as it is started inside the node's namespace."""
        network = self.network
        command = [self.python, "-m", "torch.distributed.run", "--nnodes", str(len(network.nodes))]
        command += ["--nproc-per-node", str(self.nproc), "--local-addr", network.addresses[index]]
        if self.max_restarts:  # with static rendezvous, the other nodes would not learn of a restart
            endpoint = f"{network.addresses[0]}:{self.port}"
            rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "cluster"]
            rendezvous += ["--rdzv-conf", f"is_host={int(index == 0)}"]
            rendezvous += ["--max-restarts", str(self.max_restarts)]
        else:
            rendezvous = ["--node-rank", str(index), "--master-addr", network.addresses[0]]
            rendezvous += ["--master-port", str(self.port)]
        return command + rendezvous + list(argv)

    def environment(self, index: int, extra: Mapping[str, str]) -> dict[str, str]:
        """The environment of one node: ours, the network interface, the link's rate, then `extra`."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(_INHERITED)}
        env.setdefault("OMP_NUM_THREADS", "1")
        env.setdefault("PYTHONUNBUFFERED", "1")
        for library in ("GLOO", "TP", "NCCL"):
            env[f"{library}_SOCKET_IFNAME"] = INTERFACE
        env["COMMCOMP_LINK_INTERFACE"] = INTERFACE
        env["COMMCOMP_LINK_RATE"] = self.rate
        # NCCL would find that the "nodes" are one machine and use shared memory, or InfiniBand.
        env["NCCL_HOSTID"] = f"{os.getpid()}-node{index}"
        env["NCCL_IB_DISABLE"] = "1"
        gpus = _gpus(env)
        if len(gpus) >= len(self.network.nodes) * self.nproc:  # else they share, by the script's own choice
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index * self.nproc : (index + 1) * self.nproc])
        env.update(extra)
        return env

    def _start(
        self, index: int, argv: Sequence[str], extra: Mapping[str, str], folder: Path, stream: LiveOutput
    ) -> _Node:
        log = folder / f"node{index}.log"
        output = stream.child if index == 0 else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        parent = os.getpid()

        def die_with_parent() -> None:
            assert _LIBC is not None
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # on SIGTERM torchrun ends its workers
            if os.getppid() != parent:  # it died before the call
                os._exit(1)

        # `ip netns exec` becomes the command without forking, so the process below is torchrun itself.
        command = [find_tool("ip"), "netns", "exec", self.network.nodes[index], *self.torchrun(index, argv)]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment(index, extra),
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        finally:
            if index:
                os.close(output)
        return _Node(index, process, log)

    def _wait(self, nodes: list[_Node], stream: LiveOutput, timeout: float | None) -> int:
        limit = float("inf") if timeout is None else time.monotonic() + timeout
        failed_at = None
        while any(node.status() is None for node in nodes):
            stream.pump(0.05)
            now = time.monotonic()
            if self._stop is not None:
                _say(f"stopping all nodes ({signal.Signals(self._stop).name})")
                return 128 + self._stop
            if now > limit:
                _say(f"stopping all nodes: not done within {timeout:g} s")
                return TIMEOUT_STATUS
            if failed_at is None and any(node.status() for node in nodes):
                failed_at = now
            elif failed_at is not None and now > failed_at + self.grace:
                self._end(nodes, stream)
        for node in nodes:
            if node.status() and not node.stopped_by_us:
                _say(f"node {node.index} ended with status {node.status()}, its output is in {node.log}")
                if node.index:
                    sys.stderr.write(tail(node.log))
        return max((node.status() or 0 for node in nodes if not node.stopped_by_us), default=0)

    def _end(self, nodes: list[_Node], stream: LiveOutput, seconds: float = 5.0) -> None:
        """End the nodes that still run: first as a user would, then for good."""
        running = [node for node in nodes if node.status() is None]
        for node in running:
            node.stopped_by_us = True
            node.process.terminate()
        deadline = time.monotonic() + seconds
        while any(node.status() is None for node in running) and time.monotonic() < deadline:
            stream.pump(0.05)
        self.network.kill_all()
        for node in running:
            node.process.wait()


def _gpus(env: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that a script could see, as CUDA_VISIBLE_DEVICES has them."""
    listed = env.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [gpu for gpu in listed.split(",") if gpu]
    return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def check_script(argv: Sequence[str], python: str = sys.executable) -> None:
    """Raise ValueError where `argv` names no script, or NetworkError where `python` has no torch."""
    if not argv:
        raise ValueError("no script was given: put it, with its arguments, after `--`")
    if argv[0] == "-m":
        if len(argv) < 2:
            raise ValueError("-m was given without a module name")
    elif not os.path.isfile(argv[0]):
        raise ValueError(
            f"there is no script {argv[0]!r} (seen from {os.getcwd()}): check the path after `--`"
        )
    if python == sys.executable and importlib.util.find_spec("torch") is None:
        raise NetworkError(
            f"{python} has no torch: start this with the project's own Python (.venv/bin/python)"
        )


def _say(text: str) -> None:
    print(f"shaped_cluster: {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").partition("\n\n")[0]
    parser = argparse.ArgumentParser(
        prog="shaped_cluster.py",
        description=description,
        usage="%(prog)s [options] -- SCRIPT [ARGS]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nodes", type=int, default=2, help="number of nodes (default 2)")
    add("--rate", default="100mbit", help="limit of each link in each direction, or none (default 100mbit)")
    add("--nproc", type=int, default=1, help="processes on each node (default 1)")
    add("--burst", help="what a link may send at once after a pause (default about 1 ms worth)")
    add("--latency", default="100ms", help="longest wait in a link's queue (default 100ms)")
    add("--logs", help="folder of the nodes' output (default runs/shaped_cluster-<time>-<pid>)")
    add("--port", type=int, default=29500, help="rendezvous port on node 0, inside the cluster")
    add("--grace", type=float, default=15.0, help="seconds left to the others when a node fails (default 15)")
    add("--max-restarts", type=int, default=0, help="restarts by torchrun after a failure (default 0)")
    add("--python", default=sys.executable, help="interpreter for the nodes (default the one that runs this)")
    add("--check", action="store_true", help="only say whether shaped links work on this machine")
    return parser


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Let `handler` answer what ends programs; ours leaves a note only and never cuts clean-up short."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and `&` ignore some on purpose
            signal.signal(number, handler)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status (2 for an error of usage or of this machine's abilities)."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments[:cut])
    if unknown:
        parser.error(f"{unknown[0]!r} is not an option; put `--` before the script and its arguments")
    argv = arguments[cut + 1 :]
    try:
        if options.check:
            reason = capabilities()
            print(reason or "shaped links work here")
            return 2 if reason else 0
        check_script(argv, options.python)
        settings = {name: value for name, value in vars(options).items() if name != "check"}
        cluster = ShapedCluster(**settings)
        if __name__ == "__main__":
            _on_signals(lambda signum, frame: cluster.stop(signum))
        with cluster:
            size = f"{options.nodes} nodes x {options.nproc} processes"
            _say(f"{size}, links of {options.rate}, logs in {cluster.logs}")
            status = cluster.run(argv)
        if __name__ == "__main__":
            _on_signals(signal.SIG_IGN)  # all is done: a late one must not change the exit status
        return status
    except (ValueError, NetworkError, OSError) as error:
        _say(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
