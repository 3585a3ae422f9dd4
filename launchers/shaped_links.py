"""Nodes joined by one switch, every link held to a rate. Standard library only.

    node0: eth0 ==== port0 \\
    node1: eth0 ==== port1  switch (a bridge in a namespace of its own: the host's network is never touched)
    node2: eth0 ==== port2 /

A `tbf` queue sits on both ends of each link: the one on eth0 limits what a node sends, the one on its port
what it receives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from .network_namespaces import (
    ETC_FOLDER,
    RIGHTS_REMEDY,
    NetworkError,
    check_platform,
    command,
    kill_processes,
    new_prefix,
    remove_dead_runs,
    remove_namespace,
    start_janitor,
)

INTERFACE = "eth0"
MAX_NODES = 99
FRAME_BYTES = 1514  # Ethernet header + MTU 1500: a smaller bucket would drop every full packet
_RATE_UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_SIZE_UNITS = {"": 1, "b": 1, "k": 1024, "kb": 1024, "m": 1024**2, "mb": 1024**2}
_TIME_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def _parse(text: str, units: Mapping[str, float], what: str, example: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]*)", str(text).strip().lower())
    if not match or match[2] not in units or float(match[1]) <= 0:
        raise ValueError(f"{what} {text!r} is not understood: write {example}")
    return float(match[1]) * units[match[2]]


def parse_rate(rate: str) -> float | None:
    """Bits per second of '100mbit', '1gbit', ...; None for 'none' (unshaped). Raises ValueError."""
    if str(rate).strip().lower() == "none":
        return None
    # tc reads 'mbps' as megabytes per second; nobody who writes it here means that, so it is refused.
    example = "a number above 0 and bit, kbit, mbit or gbit (per second), such as 100mbit or 1gbit, or 'none'"
    return _parse(rate, _RATE_UNITS, "rate", example)


def parse_burst(burst: str) -> int:
    """Bytes of '32kb', '1mb', '4096', ... (k = 1024, as tc has it). Raises ValueError."""
    return int(_parse(burst, _SIZE_UNITS, "burst", "bytes, such as 32kb or 1mb"))


def default_burst(rate: str) -> int:
    """Bytes that a link may send at once after a pause, at `rate`: 1 ms worth up to 64 KiB, above it 0.5 ms.

    The bucket fills in every pause of a training loop, and what it holds then passes at full speed. Measured
    at 100 Mbit/s, messages of 300 kB after pauses of 100 ms: 97 Mbit/s with 8 KiB, 119 with 64 KiB, 538 with
    256 KiB; so a large one flatters just the small, compressed messages. A very small one loses rate to the
    kernel's timers: 1 Gbit/s gives 920 Mbit/s with 64 KiB, 640 with 8 KiB.
    """
    millisecond = (parse_rate(rate) or 0.0) / 8e3
    return int(max(4096, min(millisecond, 65536), millisecond / 2))


@dataclass(frozen=True)
class LinkCounters:
    """What passed a node's interface since it was made: /sys/class/net/eth0/statistics in the namespace.

    Bytes include Ethernet, IP and TCP headers and the acknowledgements to the other side. A buffer that the
    kernel hands over whole (up to 64 KiB, where tbf's bucket holds it) counts with one header, not with one
    for each frame, so the bytes lie between 1.00 and 1.05 times the payload of a bulk transfer.
    """

    tx_bytes: int
    rx_bytes: int
    tx_packets: int
    rx_packets: int


class NamespaceNetwork:
    """`nodes` namespaces behind one switch; `build` makes them, `close` removes them with their processes.

    rate: see `parse_rate`; burst: tbf's bucket ('32kb'), None = `default_burst`; latency: the longest time
    that a packet may wait in a queue before it is dropped. Raises ValueError on values not understood.
    """

    def __init__(self, nodes: int, rate: str, burst: str | None = None, latency: str = "100ms") -> None:
        if not 1 <= nodes <= MAX_NODES:
            raise ValueError(f"nodes = {nodes} is out of range: give 1 to {MAX_NODES}")
        if burst is not None and parse_burst(burst) < FRAME_BYTES:
            raise ValueError(f"burst {burst!r} holds no packet of {FRAME_BYTES} bytes: give 2kb or more")
        _parse(latency, _TIME_UNITS, "latency", "a time with us, ms or s, such as 100ms")
        parse_rate(rate)
        self.rate, self._burst, self._latency = rate, burst, latency
        prefix = new_prefix()
        self.switch = f"{prefix}-switch"
        self.nodes = [f"{prefix}-node{i}" for i in range(nodes)]
        # Three digits each: torchrun's c10d rendezvous sorts addresses as text, and so keeps our order.
        self.addresses = [f"10.77.0.{101 + i}" for i in range(nodes)]
        self._janitor: subprocess.Popen[bytes] | None = None

    def build(self) -> None:
        """Make the namespaces and links. Raises NetworkError with the remedy; nothing is left behind then."""
        check_platform()
        remove_dead_runs()
        try:
            self._janitor = start_janitor()
            command("ip", "netns", "add", self.switch, remedy=RIGHTS_REMEDY)
            bridge = "The kernel lacks the bridge module: `modprobe bridge`"
            command("ip", "-n", self.switch, "link", "add", "switch", "type", "bridge", remedy=bridge)
            command("ip", "-n", self.switch, "link", "set", "switch", "up")
            for index in range(len(self.nodes)):
                self._add_node(index)
            self.set_rate(self.rate)
        except BaseException:
            self.close()
            raise

    def _add_node(self, index: int) -> None:
        node, port = self.nodes[index], f"port{index}"
        command("ip", "netns", "add", node, remedy=RIGHTS_REMEDY)
        pair = ["type", "veth", "peer", "name", port, "netns", self.switch]
        veth = "The kernel lacks the veth module: `modprobe veth`"
        command("ip", "link", "add", "name", INTERFACE, "netns", node, *pair, remedy=veth)
        for namespace, device in ((node, INTERFACE), (self.switch, port)):
            # No link-local address: gloo could pick it while the kernel still probes for duplicates. A kernel
            # without IPv6 refuses the option, and makes no such address.
            with contextlib.suppress(NetworkError):
                command("ip", "-n", namespace, "link", "set", device, "addrgenmode", "none")
        command("ip", "-n", node, "addr", "add", f"{self.addresses[index]}/24", "dev", INTERFACE)
        command("ip", "-n", self.switch, "link", "set", port, "master", "switch", "up")
        command("ip", "-n", node, "link", "set", INTERFACE, "up")
        command("ip", "-n", node, "link", "set", "lo", "up")
        self._write_hosts(index)
        command("ip", "netns", "exec", node, "true", remedy=RIGHTS_REMEDY)

    def _write_hosts(self, index: int) -> None:
        """Names for all nodes: without them every connection asks a DNS server that cannot be reached."""
        hosts = ["127.0.0.1 localhost", "::1 localhost"]
        for i, address in enumerate(self.addresses):
            names = f"node{i} {socket.gethostname()}" if i == index else f"node{i}"
            hosts += [f"{address} {names}", f"::ffff:{address} {names}"]  # torch asks for the second form
        folder = os.path.join(ETC_FOLDER, self.nodes[index])
        with contextlib.suppress(OSError):  # a read-only /etc costs a few warnings of torch's, no more
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, "hosts"), "w", encoding="utf-8") as file:
                file.write("\n".join(hosts) + "\n")

    def links(self) -> list[tuple[str, str]]:
        """(namespace, interface) of every end of every link."""
        ends = []
        for index, node in enumerate(self.nodes):
            ends += [(node, INTERFACE), (self.switch, f"port{index}")]
        return ends

    def set_rate(self, rate: str) -> None:
        """Shape every link to `rate` ('none' removes the limit); connections and counters stay."""
        shaped = parse_rate(rate) is not None
        burst = parse_burst(self._burst) if self._burst else default_burst(rate)
        tbf = ["tbf", "rate", rate, "burst", str(burst), "latency", self._latency]
        # TCP hands over up to 64 KiB at once, and tbf cuts what its bucket cannot hold into frames, at some
        # 20 us of CPU each: keep the pieces smaller. Connections that are open already go on as before.
        whole = str(min(65536, max(FRAME_BYTES, burst * 9 // 10)) if shaped else 65536)
        for namespace, device in self.links():
            on = ["-n", namespace, "qdisc"]
            if shaped:
                remedy = "If the kernel lacks tbf: `modprobe sch_tbf`"
                command("tc", *on, "replace", "dev", device, "root", *tbf, remedy=remedy)
            elif '"tbf"' in command("tc", "-n", namespace, "-j", "qdisc", "show", "dev", device):
                command("tc", *on, "del", "dev", device, "root")
            with contextlib.suppress(NetworkError):  # old versions of ip lack the option: slower, not wrong
                command("ip", "-n", namespace, "link", "set", device, "gso_max_size", whole)
        self.rate = rate

    def counters(self) -> list[LinkCounters]:
        """Byte and packet counters of each node's interface, in the order of the nodes."""
        names = [field.name for field in dataclasses.fields(LinkCounters)]
        files = [f"/sys/class/net/{INTERFACE}/statistics/{name}" for name in names]
        texts = [command("ip", "netns", "exec", node, "cat", *files) for node in self.nodes]
        return [LinkCounters(*map(int, text.split())) for text in texts]

    def kill_all(self) -> None:
        """Kill every process in every node; the nodes and links stay."""
        for node in self.nodes:
            kill_processes(node)

    def close(self) -> None:
        """Kill every process in the namespaces and remove them. May be called again."""
        problems = []
        for name in [*self.nodes, self.switch]:
            try:
                remove_namespace(name)
            except NetworkError as error:
                problems.append(str(error))
        if self._janitor is not None:
            janitor, self._janitor = self._janitor, None
            try:
                janitor.communicate(b"done", timeout=10)
            except (OSError, subprocess.TimeoutExpired):
                janitor.kill()
                janitor.wait()
        if problems:
            raise NetworkError("could not clean up: " + "; ".join(problems))


def capabilities() -> str | None:
    """None where shaped links work on this machine, else the reason why not. It really makes one (0.3 s)."""
    network = NamespaceNetwork(1, "100mbit")
    try:
        network.build()
        shown = json.loads(command("tc", "-n", network.nodes[0], "-j", "qdisc", "show", "dev", INTERFACE))
        network.close()
    except (NetworkError, OSError) as error:
        return str(error)
    if not shown or shown[0]["kind"] != "tbf":
        return f"the kernel took the tbf queue but does not show it: {shown}"
    return None
