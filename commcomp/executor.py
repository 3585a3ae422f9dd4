"""Where a step's reduction runs: beside the backward pass, in an order that is the same on every rank.

On CPUs one worker thread takes the work in the order in which the buckets became ready; it may wait for the network
while the backward pass goes on. On CUDA a side stream does, and the host never waits. (Launching a dependent
collective from a future's callback instead hangs gloo from two buckets on: its own threads wait for each other.)
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future

from commcomp.precision import full_precision

Job = Callable[[], None]

_SECONDS_TO_END = 5.0
_SECONDS_TO_LOOK = 0.05


class Promise:
    """A gradient bucket's result to be: `future` goes to the framework, `resolve` or `fail` completes it."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda":
            self._source: Future[Any] = Future(devices=[device])
            self.future: Future[Tensor] = self._source
        else:
            self._source = Future()
            # set_exception() would reach a C++ waiter as a value of the wrong type; raising in a callback does not.
            self.future = self._source.then(_value_or_raise)

    def resolve(self, value: Tensor) -> None:
        self._source.set_result(value)

    def fail(self, error: Exception) -> None:
        if not self._source.done():
            self._source.set_result(error)


def _value_or_raise(future: Future[Any]) -> Tensor:
    value = future.value()
    if isinstance(value, Exception):
        raise value
    return value


_running: dict[threading.Thread, queue.SimpleQueue[Job | None]] = {}


@atexit.register
def _end_all() -> None:
    # A daemon thread that lets go of a process group while the interpreter shuts down aborts the process. Threads are
    # kept here by themselves: the last job may hold the last reference to its GradientSync, and so to the executor.
    for thread, jobs in list(_running.items()):
        _end(thread, jobs)


def _end(thread: threading.Thread, jobs: queue.SimpleQueue[Job | None]) -> None:
    """End a worker after what is queued; wait for it, unless it is stuck in a broken network."""
    jobs.put(None)
    if threading.current_thread() is not thread:
        thread.join(_SECONDS_TO_END)


class WorkerThread:
    """Runs jobs one after another on a single daemon thread, without gradients."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        # Intra-op thread counts are per thread: take over the training thread's.
        threads = torch.get_num_threads()
        self._thread = threading.Thread(target=_serve, args=(self._jobs, threads), name="commcomp", daemon=True)
        _running[self._thread] = self._jobs
        self._thread.start()

    def run(self, job: Job) -> None:
        """Queue `job`; it must not raise."""
        self._jobs.put(job)

    def drain(self) -> None:
        """Return when everything queued so far has run; at once after `close`."""
        done = threading.Event()
        self.run(done.set)
        while not done.wait(_SECONDS_TO_LOOK) and self._thread.is_alive():
            pass

    def close(self) -> None:
        """End the thread after what is queued; waits for it, unless it is stuck in a broken network."""
        _end(self._thread, self._jobs)


def _serve(jobs: queue.SimpleQueue[Job | None], threads: int) -> None:
    torch.set_num_threads(threads)
    with torch.no_grad():
        while (job := jobs.get()) is not None:
            job()
            del job  # a finished job must not keep its bucket's tensors alive
    _running.pop(threading.current_thread(), None)


class SideStream:
    """Runs jobs at once on the host, their device work on one CUDA stream behind the current one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, job: Job) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # The backward pass may run under autocast, and the script may allow TF32: neither must reach the factors, or
        # what the residual keeps and what the gradient gets would differ by 5e-4.
        with full_precision(self._device), torch.cuda.stream(self._stream):
            job()

    def drain(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def close(self) -> None:
        self.drain()


Executor = WorkerThread | SideStream


def make_executor(device: torch.device) -> Executor:
    """The executor for gradients on `device` (cpu or cuda)."""
    return SideStream(device) if device.type == "cuda" else WorkerThread()
