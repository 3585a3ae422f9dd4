"""Forks writers, kills each with SIGKILL at a random moment, and looks at the store that it leaves.

Arguments: folder, number of kills, seed. Forking spares the seconds that importing torch takes.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

from commcomp.checkpoint import SnapshotStore
from tests.checkpoint.states import assert_same, training_state

ROWS = 300


def write_for_ever(folder: str, acknowledge: int, seed: int) -> None:
    """Save, and prune now and then; each step is told when save() has returned."""
    chance = random.Random(seed)
    store = SnapshotStore(folder, keyframe_every=4, threads=1)
    step = max(store.steps(), default=-1)
    while True:
        step += 1
        if chance.random() < 0.5:
            store.save(step, training_state(step // 3, ROWS))  # some states repeat: deltas
        else:
            store.save_async(step, training_state(step // 3, ROWS)).result()
        os.write(acknowledge, step.to_bytes(8, "little"))
        if chance.random() < 0.4:
            steps = store.steps()
            store.prune(steps=chance.sample(steps[:-1], min(len(steps) - 1, 2)))


def acknowledged(pipe: int) -> int:
    """The last step that was told; -1 for none."""
    told = b""
    while piece := os.read(pipe, 1 << 16):
        told += piece
    return int.from_bytes(told[-8:], "little") if told else -1


def main(folder: str, kills: int, seed: int) -> None:
    chance, last, leftovers, deltas = random.Random(seed), -1, 0, 0
    for kill in range(kills):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            try:
                write_for_ever(folder, writing, seed * 1000 + kill)
            finally:
                os._exit(1)
        os.close(writing)
        time.sleep(chance.random() * 0.25)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the writer ended by itself: {status}"
        last = max(last, acknowledged(reading))
        os.close(reading)
        leftovers += any(name.startswith(".tmp-") for name in os.listdir(folder))
        store = SnapshotStore(folder, threads=1)
        steps = store.steps()
        assert last == -1 or steps[-1] in (last, last + 1), (steps, last)
        for step in steps:
            assert_same(training_state(step // 3, ROWS), store.load(step))
            deltas += store.info(step).parent is not None
    SnapshotStore(folder).save(last + 2, training_state(0))
    assert not any(name.startswith(".tmp-") for name in os.listdir(folder))
    print(f"{kills} kills, last step {last}, {leftovers} left a file unfinished, {deltas} deltas loaded")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
