"""The launchers for real: namespaces, limits, exit statuses, clean-up, rendezvous. No times are asserted.

Most tests put a small shell script in the place of torchrun, which starts the given script at once, with the
node's number in NODE; those that say so run torch.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launchers import network_namespaces, shaped_cluster  # noqa: E402
from launchers.shaped_cluster import NetworkError, ShapedCluster, capabilities  # noqa: E402

LAUNCHER = ROOT / "launchers" / "shaped_cluster.py"
NODE_SCRIPT = ROOT / "launchers" / "torchrun_node.sh"
SBATCH = ROOT / "launchers" / "slurm.sbatch"

ALL_REDUCE = """
import os, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.full((int(sys.argv[1]),), dist.get_rank() + 1.0)
dist.all_reduce(value)
print("sum", value[0].item(), "of", dist.get_world_size(), os.environ.get("COMMCOMP_LINK_RATE"), flush=True)
dist.destroy_process_group()
"""

# A worker that ignores SIGTERM and leaves a process of its own behind, in a session of its own.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
open(f"{sys.argv[1]}/{os.environ['NODE']}-{os.getpid()}", "w").close()
print("started", flush=True)
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def shaped() -> None:
    """Skips the test, with the reason, where shaped links do not work."""
    reason = capabilities()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def no_torchrun(tmp_path: Path) -> str:
    """An interpreter that becomes the script instead of torchrun."""
    path = tmp_path / "no_torchrun"
    path.write_text(
        f'#!/bin/sh\nwhile [ "$1" != --node-rank ]; do shift; done\nexport NODE="$2"\n'
        f'shift 6\nexec {sys.executable} -IS "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def start(tmp_path: Path, no_torchrun: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the launcher as a program of its own."""
    started: list[subprocess.Popen[str]] = []

    def launch(*argv: str) -> subprocess.Popen[str]:
        logs = str(tmp_path / f"logs{len(started)}")
        command = [sys.executable, str(LAUNCHER), "--python", no_torchrun, "--logs", logs, *argv]
        pipe = subprocess.PIPE
        # A shell's background jobs ignore SIGINT, and so would all that the tests start from there.
        listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=listen))
        return started[-1]

    yield launch
    for process in started:
        process.kill()
        process.communicate()
    network_namespaces.remove_dead_runs()


def namespaces_of(pid: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    folders = os.listdir("/etc/netns") if os.path.isdir("/etc/netns") else []
    return [name for name in [*listed.split(), *folders] if name.startswith(f"commcomp-{pid}-")]


def janitor_of(pid: int) -> int | None:
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            argv = Path(f"/proc/{entry}/cmdline").read_text().split("\0")
        except OSError:
            continue
        if len(argv) > 3 and argv[2].endswith("network_namespaces.py") and argv[3] == str(pid):
            return int(entry)
    return None


def wait_for(what: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def alive(folder: Path) -> list[int]:
    pids = [int(path.name.partition("-")[2]) for path in folder.iterdir()]
    return [pid for pid in pids if network_namespaces.process_start(pid) is not None]


def start_stubborn(
    start: Callable[..., subprocess.Popen[str]], script: str, marks: Path
) -> subprocess.Popen[str]:
    marks.mkdir()
    process = start("--nodes", "2", "--rate", "none", "--", script, str(marks))
    wait_for(lambda: len(list(marks.iterdir())) == 4)  # two nodes, two processes each
    assert len(set(namespaces_of(process.pid))) == 3
    return process


def tbf_rates(cluster: ShapedCluster) -> list[int | None]:
    """Bytes per second that tc shows on each end of each link; None without a limit."""
    rates = []
    for namespace, device in cluster.network.links():
        argv = ["tc", "-n", namespace, "-s", "-j", "qdisc", "show", "dev", device]
        shown = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)[0]
        rates.append(shown["options"]["rate"] if shown["kind"] == "tbf" else None)
    return rates


@pytest.mark.usefixtures("shaped")
def test_two_nodes_all_reduce_over_limited_links(
    tmp_path: Path, script: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    """With torch: the sum is right, both ends hold the rate, and the counters show the bytes."""
    values = 500_000
    with ShapedCluster(2, "100mbit", logs=tmp_path / "logs") as cluster:
        assert tbf_rates(cluster) == [12_500_000] * 4
        before = cluster.counters()
        assert cluster.run([script(ALL_REDUCE), str(values)], timeout=60) == 0
        after = cluster.counters()
        for node in range(2):
            assert "sum 3.0 of 2 100mbit" in (tmp_path / "logs" / f"node{node}.log").read_text()
            sent = after[node].tx_bytes - before[node].tx_bytes
            assert (
                4 * values <= sent <= 1.1 * 4 * values + 200_000
            )  # a ring of two sends all once; rendezvous
        cluster.set_rate("1gbit")
        assert tbf_rates(cluster) == [125_000_000] * 4
        cluster.set_rate("none")
        assert tbf_rates(cluster) == [None] * 4
        assert cluster.rate == "none"
    assert capfd.readouterr().out.count("sum 3.0") == 1  # node 0 alone is shown
    assert namespaces_of(os.getpid()) == []


@pytest.mark.usefixtures("shaped")
def test_torchrun_restarts_all_nodes(tmp_path: Path, script: Callable[[str], str]) -> None:
    """With torchrun: a worker fails once, then both nodes start again, and rank 0 is on node 0."""
    text = """
import os, sys, time
rank, mark = os.environ["RANK"], f"{sys.argv[1]}-{os.environ['RANK']}"
if not os.path.exists(mark):
    open(mark, "w").close()
    if rank == "1":
        sys.exit(7)
    time.sleep(1000)
print("rank", rank, "on node", os.environ["GROUP_RANK"], "after a restart", flush=True)
"""
    with ShapedCluster(2, logs=tmp_path / "logs", max_restarts=3) as cluster:
        assert cluster.run([script(text), str(tmp_path / "started")], timeout=60) == 0
    for node in range(2):
        assert (
            f"rank {node} on node {node} after a restart" in (tmp_path / f"logs/node{node}.log").read_text()
        )


@pytest.mark.usefixtures("shaped")
@pytest.mark.parametrize(
    ("statuses", "expected"),
    [("0,0", 0), ("3,5", 5), ("4,0", 4), ("0,-9", 137), ("1,hang", 1)],
)
def test_exit_status_is_that_of_the_worst_node(
    tmp_path: Path, script: Callable[[str], str], no_torchrun: str, statuses: str, expected: int
) -> None:
    text = """
import os, sys, time
status = sys.argv[1].split(",")[int(os.environ["NODE"])]
if status == "hang":
    time.sleep(1000)
if int(status) < 0:
    os.kill(os.getpid(), -int(status))
sys.exit(int(status))
"""
    with ShapedCluster(2, python=no_torchrun, logs=tmp_path / "logs", grace=0.3) as cluster:
        assert cluster.run([script(text), statuses]) == expected
        assert cluster.run([script("import time; time.sleep(1000)")], timeout=0.3) == 124


@pytest.mark.usefixtures("shaped")
def test_two_runs_at_once_do_not_meet(
    tmp_path: Path, script: Callable[[str], str], start: Callable[..., subprocess.Popen[str]]
) -> None:
    """Both use the same addresses and ports, at the same time, each in its own network."""
    text = """
import os, socket, sys, time
if os.environ["NODE"] == "0":
    server = socket.create_server(("10.77.0.101", 5000))
    client, _ = server.accept()
    print("got", client.makefile().readline().strip(), flush=True)
    while not os.path.exists(sys.argv[2]):
        time.sleep(0.02)
else:
    while True:
        try:
            client = socket.create_connection(("node0", 5000))
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    client.sendall(sys.argv[1].encode() + b"\\n")
    client.recv(1)
"""
    path, go = script(text), tmp_path / "go"
    runs = [start("--rate", "10mbit", "--", path, f"message{i}", str(go)) for i in range(2)]
    for i, run in enumerate(runs):
        assert run.stdout is not None and run.stdout.readline() == f"got message{i}\n"
    for run in runs:
        assert run.poll() is None and len(set(namespaces_of(run.pid))) == 3
    go.touch()
    assert [run.wait() for run in runs] == [0, 0]
    assert [namespaces_of(run.pid) for run in runs] == [[], []]


@pytest.mark.usefixtures("shaped")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_nothing_behind(
    tmp_path: Path, script: Callable[[str], str], start: Callable[..., subprocess.Popen[str]], signum: int
) -> None:
    text = STUBBORN if signum == signal.SIGINT else STUBBORN.replace("SIG_IGN", "SIG_DFL")
    run = start_stubborn(start, script(text), tmp_path / "marks")
    run.send_signal(signum)
    time.sleep(0.1)
    run.send_signal(signum)  # an impatient user does not break the clean-up
    assert run.wait() == 128 + signum
    assert namespaces_of(run.pid) == [] and alive(tmp_path / "marks") == [] and janitor_of(run.pid) is None


@pytest.mark.usefixtures("shaped")
def test_a_killed_run_is_cleaned_up_by_its_janitor(
    tmp_path: Path, script: Callable[[str], str], start: Callable[..., subprocess.Popen[str]]
) -> None:
    run = start_stubborn(start, script(STUBBORN), tmp_path / "marks")
    run.kill()
    wait_for(lambda: not namespaces_of(run.pid) and not alive(tmp_path / "marks"))
    wait_for(lambda: janitor_of(run.pid) is None)


@pytest.mark.usefixtures("shaped")
def test_the_next_start_removes_a_killed_run_and_spares_a_living_one(
    tmp_path: Path, script: Callable[[str], str], start: Callable[..., subprocess.Popen[str]]
) -> None:
    path = script(STUBBORN)
    living = start_stubborn(start, path, tmp_path / "living")
    killed = start_stubborn(start, path, tmp_path / "killed")
    janitor = janitor_of(killed.pid)
    assert janitor is not None
    os.kill(janitor, signal.SIGKILL)
    killed.kill()
    assert len(set(namespaces_of(killed.pid))) == 3 and alive(tmp_path / "killed")
    end = tmp_path / "end.py"
    end.write_text("")
    assert start("--rate", "none", "--", str(end)).wait() == 0
    assert namespaces_of(killed.pid) == [] and alive(tmp_path / "killed") == []
    assert len(set(namespaces_of(living.pid))) == 3 and len(alive(tmp_path / "living")) == 4


@pytest.mark.usefixtures("shaped")
def test_node_0_has_a_terminal_where_we_have_one(
    tmp_path: Path, script: Callable[[str], str], no_torchrun: str
) -> None:
    path = script("import os; print('terminal', os.isatty(1), flush=True)")
    command = [sys.executable, str(LAUNCHER), "--python", no_torchrun, "--logs", str(tmp_path), "--", path]
    ours, child = os.openpty()
    assert subprocess.run(command, stdout=child, stderr=subprocess.DEVNULL).returncode == 0
    os.close(ours)
    os.close(child)
    assert (tmp_path / "node0.log").read_text() == "terminal True\n"
    assert (tmp_path / "node1.log").read_text() == "terminal False\n"


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert shaped_cluster.main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("shaped_cluster: error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "100mbps"], "rate '100mbps' is not understood: write a number above 0 and bit"),
        (["--rate", "0mbit"], "rate '0mbit'"),
        (["--burst", "1kb"], "burst '1kb' holds no packet of 1514 bytes: give 2kb"),
        (["--latency", "5"], "latency '5' is not understood"),
        (["--nodes", "0"], "nodes = 0 is out of range: give 1 to 99"),
        (["--nproc", "0"], "nproc = 0"),
        (["--port", "70000"], "port = 70000"),
    ],
)
def test_wrong_values_are_named(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert message in failure(capsys, *options, "--", __file__)


def test_missing_scripts_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no script was given" in failure(capsys, "--nodes", "2")
    assert "there is no script 'missing.py'" in failure(capsys, "--", "missing.py")
    with pytest.raises(SystemExit):
        shaped_cluster.main(["train.py"])
    assert "put `--` before the script" in capsys.readouterr().err


def test_machines_that_cannot_are_told_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(network_namespaces, "find_tool", lambda name: name)
        patch.setattr(os, "geteuid", lambda: 1000)
        assert "only root may make network namespaces, not uid 1000: run with sudo" in failure(
            capsys, "--", __file__
        )
        assert "only root" in (capabilities() or "")
        patch.setattr(network_namespaces.sys, "platform", "darwin")
        assert "need Linux, this is darwin" in failure(capsys, "--", __file__)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(network_namespaces, "TOOL_FOLDERS", "")
    assert "'ip' was not found" in failure(capsys, "--", __file__)
    assert "apt-get install iproute2" in (capabilities() or "")


@pytest.mark.usefixtures("shaped")
def test_a_kernel_without_tbf_is_named_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tc = tmp_path / "tc"
    tc.write_text("#!/bin/sh\necho 'Error: Specified qdisc kind is unknown.' >&2\nexit 2\n")
    tc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(NetworkError, match=r"qdisc kind is unknown.*modprobe sch_tbf"):
        ShapedCluster(2, "100mbit").__enter__()
    assert namespaces_of(os.getpid()) == []


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def clean_environment(**extra: str) -> dict[str, str]:
    drop = ("RANK", "MASTER_ADDR", "NODE_RANK", "RDZV_ENDPOINT", "NNODES", "NPROC_PER_NODE", "SLURM_JOB_ID")
    return {name: value for name, value in os.environ.items() if name not in drop} | extra


@pytest.mark.skipif(sys.platform != "linux", reason="the loopback interface is called lo on Linux only")
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_torchrun_node_starts_two_nodes(
    tmp_path: Path, script: Callable[[str], str], rendezvous: str
) -> None:
    """With torchrun: two nodes on the loopback interface find each other (with c10d they all-reduce, too)."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    static_text = "import os; print('sum 3.0 of', os.environ['WORLD_SIZE'], os.environ['MASTER_ADDR'])"
    port, path = free_port(), script(static_text if rendezvous == "static" else ALL_REDUCE)
    env = clean_environment(
        NNODES="2", NPROC_PER_NODE="1", IFNAME="lo", LOCAL_ADDR="127.0.0.1", OMP_NUM_THREADS="1",
        TORCHRUN=str(torchrun),
    )  # fmt: skip
    nodes = []
    for rank in range(2):
        static = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": str(rank)}
        meet = static if rendezvous == "static" else {"RDZV_ENDPOINT": f"127.0.0.1:{port}", "RDZV_ID": "test"}
        command, pipe = ["bash", str(NODE_SCRIPT), path, "10"], subprocess.PIPE
        nodes.append(
            subprocess.Popen(command, env=env | meet, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [node.communicate(timeout=60)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert all("sum 3.0 of 2" in output for output in outputs)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "NNODES is not set"),
        ({"NNODES": "2"}, "neither MASTER_ADDR (static) nor RDZV_ENDPOINT (c10d) is set"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK is not set"),
        (
            {"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"},
            "NODE_RANK='2' is not a whole number from 0 to 1",
        ),
        ({"NNODES": "two", "MASTER_ADDR": "a", "NODE_RANK": "0"}, "NNODES='two' is not a whole number"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "a:1", "NODE_RANK": "0"}, "are both set"),
        ({"NNODES": "2", "NPROC_PER_NODE": "x"}, "NPROC_PER_NODE='x'"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "a:1", "TORCHRUN": "/missing"}, "no torchrun was found"),
    ],
)
def test_torchrun_node_checks_its_variables(variables: dict[str, str], message: str) -> None:
    command = ["bash", str(NODE_SCRIPT), __file__]
    done = subprocess.run(command, env=clean_environment(**variables), capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


def test_torchrun_node_explains_itself() -> None:
    helped = subprocess.run(["bash", str(NODE_SCRIPT), "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "RDZV_ENDPOINT" in helped.stdout
    missing = subprocess.run(["bash", str(NODE_SCRIPT), "missing.py"], capture_output=True, text=True)
    assert missing.returncode == 2 and "there is no script 'missing.py'" in missing.stderr


def test_slurm_starts_one_torchrun_on_each_node(tmp_path: Path) -> None:
    """With stand-ins for scontrol, srun (runs the task twice) and torchrun (prints its arguments)."""
    programs = {
        "scontrol": 'test "$*" = "show hostnames nodes[7-8]" && printf "node7\\nnode8\\n"',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; "$@" && "$@"',
        "torchrun": 'echo "torchrun $*"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    spooled = tmp_path / "slurm_script"  # slurmd runs a copy from elsewhere
    shutil.copy(SBATCH, spooled)
    variables = {
        "SLURM_JOB_ID": "1234", "SLURM_JOB_NODELIST": "nodes[7-8]", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": str(ROOT), "TORCHRUN": str(tmp_path / "torchrun"),
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "NODE_RANK": "5",
    }  # fmt: skip
    env = clean_environment(**variables)
    command = ["bash", str(spooled), "launchers/shaped_cluster.py", "a b"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = (
        "torchrun --nnodes 2 --nproc-per-node 4 --max-restarts 0 --rdzv-backend c10d "
        "--rdzv-endpoint node7:21234 --rdzv-id 1234 launchers/shaped_cluster.py a b"
    )
    assert done.stdout.splitlines()[1:] == [expected] * 2
    outside = subprocess.run(
        ["bash", str(SBATCH), "x"], env=clean_environment(), capture_output=True, text=True
    )
    assert outside.returncode == 2 and "start it with sbatch" in outside.stderr


@pytest.mark.parametrize("path", [NODE_SCRIPT, SBATCH], ids=lambda path: path.name)
def test_shell_scripts_are_well_formed(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(path)], check=True)
