"""The worker thread beside the backward pass: order, and its end with the interpreter."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import torch

from commcomp.executor import WorkerThread


def test_jobs_run_in_order_without_gradients():
    worker, seen = WorkerThread(), []
    for number in range(5):
        worker.run(lambda number=number: seen.append((number, torch.is_grad_enabled())))
    worker.drain()
    assert seen == [(number, False) for number in range(5)]
    worker.close()
    worker.drain()  # or it would wait for ever


def test_the_interpreter_waits_for_what_the_last_job_lets_go_of():
    """The last job may hold the last reference to the executor's owner, and so to a process group, whose destructor
    aborts the process when it runs beside the interpreter's shutdown."""
    script = """
        import os, time, weakref
        from commcomp.executor import WorkerThread

        class SlowToEnd:
            def __del__(self):
                time.sleep(0.3)
                os.write(1, b"ended")

        class Owner:
            def __init__(self):
                self.executor = WorkerThread()
                self.slow = SlowToEnd()
                weakref.finalize(self, self.executor.close)

        owner = Owner()
        owner.executor.run(lambda owner=owner: time.sleep(0.05))
        del owner
        time.sleep(0.2)  # the job is over: the thread is letting go of the owner, the executor itself is gone
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (0, "ended"), run.stderr
