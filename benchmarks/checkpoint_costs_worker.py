"""One measurement of benchmarks.checkpoint_costs in a process of its own: a line of JSON on standard output.

    .venv/bin/python -m benchmarks.checkpoint_costs_worker saving --snapshots runs/snapshots --at 200 --then 250 \\
        --store /tmp/store

Memory is what the kernel counts as resident (VmRSS and its high-water mark, which is set back before), so what the
allocator keeps for later is in it. A small state is saved and loaded before the first measurement: libraries and their
buffers, which do not grow with the state, are left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.checkpoint_training import snapshot_path
from commcomp.checkpoint import SnapshotStore
from commcomp.checkpoint.decoder import decode, whole
from commcomp.checkpoint.parallel import default_threads

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def load_states(folder: Path, steps: list[int]) -> list[Any]:
    """One state of real snapshots: side by side, as a job with several models would save them, in memory of its own."""
    states = [torch.load(snapshot_path(folder, step), weights_only=True, mmap=True) for step in steps]
    return [_mapped(state, torch.clone) for state in states]


def become(state: list[Any], folder: Path, steps: list[int]) -> None:
    """Overwrite the tensors of `state` by those of other steps, as training would."""
    for held, step in zip(state, steps):
        other = torch.load(snapshot_path(folder, step), weights_only=True, mmap=True)
        for to, value in zip(tensors_of(held), tensors_of(other)):
            to.copy_(value)


def _mapped(node: Any, work: Callable[[Tensor], Tensor], done: dict[int, Tensor] | None = None) -> Any:
    """The same containers; tied tensors stay one."""
    done = {} if done is None else done
    if isinstance(node, Tensor):
        key = node.data_ptr()
        return done.setdefault(key, work(node)) if key not in done else done[key]
    if isinstance(node, dict):
        return {key: _mapped(value, work, done) for key, value in node.items()}
    return [_mapped(value, work, done) for value in node] if isinstance(node, list) else node


def tensors_of(node: Any) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, (dict, list)):
        for value in node.values() if isinstance(node, dict) else node:
            yield from tensors_of(value)


def raw_bytes(state: Any) -> int:
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(state)}.values())


def _resident(field: str) -> int:
    """VmRSS or VmHWM in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) << 10


def _resident_now() -> int:
    gc.collect()
    return _resident("VmRSS")


def _peak_of(work: Callable[[], Any]) -> tuple[int, Any]:
    """The high-water mark while `work` runs, and what it returns."""
    gc.collect()
    _CLEAR_REFS.write_text("5")
    result = work()
    return _resident("VmHWM"), result


def _small_state() -> dict[str, Any]:
    model = torch.nn.Linear(256, 256)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 256)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def _warm_up(mode: str, threads: int) -> None:
    with tempfile.TemporaryDirectory() as folder, SnapshotStore(folder, mode, threads=threads) as store:
        for step in (0, 1):
            store.save_async(step, _small_state()).result()
            store.load()


def saving(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes beyond the state while it is saved for the first and the second time, and what the store keeps then."""
    _warm_up(options.mode, options.threads)
    state = load_states(options.snapshots, options.at)
    found: dict[str, Any] = {"raw_bytes": raw_bytes(state)}
    before = _resident_now()
    with SnapshotStore(options.store, options.mode, threads=options.threads, keep_reference=options.keep) as store:
        for step, name in enumerate(("first", "second")):
            if step:
                become(state, options.snapshots, options.then)
            peak, report = _peak_of(lambda step=step: _save(store, step, state, options.save_async))
            found[name] = _row(peak - before, report)
    return found


def reopening(options: argparse.Namespace) -> dict[str, Any]:
    """The same of the first save of a process that goes on with a store."""
    _warm_up(options.mode, options.threads)
    state = load_states(options.snapshots, options.at)
    before = _resident_now()
    with SnapshotStore(options.store, options.mode, threads=options.threads, keep_reference=options.keep) as store:
        step = store.steps()[-1] + 1
        peak, report = _peak_of(lambda: _save(store, step, state, options.save_async))
    return _row(peak - before, report)


def loading(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes beyond the state that is loaded, a delta's."""
    _warm_up(options.mode, options.threads)
    before = _resident_now()
    peak, loaded = _peak_of(lambda: SnapshotStore(options.store, threads=options.threads).load())
    return {"beyond": peak - before - raw_bytes(loaded)}


def _save(store: SnapshotStore, step: int, state: Any, in_background: bool) -> Any:
    return store.save_async(step, state).result() if in_background else store.save(step, state)


def _row(beyond: int, report: Any) -> dict[str, Any]:
    return {"beyond": beyond, "kept": report.kept_bytes, "is_delta": report.parent is not None}


def stall(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds that save_async holds the trainer up, and torch.save of the same state to the same disk, in turns."""
    found: dict[str, Any] = {"later calls": [], "torch.save": [], "torch.save and fsync": []}
    _warm_up(options.mode, options.threads)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        state = load_states(options.snapshots, options.at)
        store = SnapshotStore(Path(folder) / "store", options.mode, threads=options.threads)
        if options.reserve:
            store.reserve(state)
        for step in range(1 + options.repeats):
            start = time.perf_counter()
            future = store.save_async(step, state)
            seconds = time.perf_counter() - start
            future.result()
            if step:
                found["later calls"].append(seconds)
            else:
                found["first call"] = seconds
            become(state, options.snapshots, options.then if step % 2 == 0 else options.at)
            for name, sync in (("torch.save", False), ("torch.save and fsync", True)):
                found[name].append(_torch_save_seconds(state, Path(folder) / "state.pt", sync))
        store.close()
    return found


def _torch_save_seconds(state: Any, path: Path, sync: bool) -> float:
    os.sync()
    start = time.perf_counter()
    with path.open("wb") as file:
        torch.save(state, file)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of encoding deltas to disk, there and back in turns, and of decoding one with its parent at hand."""
    _warm_up(options.mode, options.threads)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        state = load_states(options.snapshots, options.at)
        found: dict[str, Any] = {"raw_bytes": raw_bytes(state), "encode": []}
        with SnapshotStore(folder, options.mode, options.repeats + 2, threads=options.threads) as store:
            store.save(0, state)
            for step in range(1, 1 + options.repeats):
                become(state, options.snapshots, options.then if step % 2 else options.at)
                start = time.perf_counter()
                report = store.save(step, state)
                found["encode"].append(time.perf_counter() - start)
                assert report.parent == step - 1
        del state, store
        found["decode"] = _decode_seconds(folder, options.threads, options.repeats)
    return found


def _decode_seconds(folder: str, threads: int, repeats: int) -> list[float]:
    """Of the snapshot of step 1."""
    store, seconds = SnapshotStore(folder, threads=threads), []
    with store._files.open(0) as chain:
        parent = decode(chain, whole(chain[0]), threads=threads)
    with store._files.open(1) as chain:
        chain.open_all()
        for _ in range(repeats):
            start = time.perf_counter()
            decode(chain, whole(chain[0]), threads=threads, parent=parent)
            seconds.append(time.perf_counter() - start)
    return seconds


WORK = {work.__name__: work for work in (saving, reopening, loading, stall, speed)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WORK)
    parser.add_argument("--snapshots", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, help="where stores are written; default the temporary folder")
    parser.add_argument("--at", type=int, nargs="+", required=True, help="steps of the snapshots that make up a state")
    parser.add_argument("--then", type=int, nargs="+", required=True, help="what they become next")
    parser.add_argument("--mode", default="lossless")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--store", type=Path, help="made by `saving`, used by `reopening` and `loading`")
    parser.add_argument("--forget-reference", dest="keep", action="store_false")
    parser.add_argument("--save-async", action="store_true")
    parser.add_argument("--reserve", action="store_true", help="memory before the first call of save_async")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(WORK[options.what](options)))


if __name__ == "__main__":
    main()
