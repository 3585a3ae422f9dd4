"""Writers that die, at random moments and at every single one, and disks that are full."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from commcomp.checkpoint import SnapshotStore, WrongParentError
from tests.checkpoint.states import assert_same, changing_state, random_tensor

REPOSITORY = Path(__file__).parents[2]
KILLS = int(os.environ.get("COMMCOMP_KILLS", "20"))


@pytest.mark.timeout(1200)
def test_killed_at_random_moments(tmp_path):
    """COMMCOMP_KILLS=200 for the long run."""
    (tmp_path / "store").mkdir()
    command = [sys.executable, "-m", "tests.checkpoint.killed_writer", tmp_path / "store", str(KILLS), "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{KILLS} kills" in done.stdout
    print(done.stdout)


def test_a_script_that_ends_waits_for_what_is_saved_in_the_background(tmp_path):
    script = (
        "import sys, torch\n"
        "from commcomp.checkpoint import SnapshotStore\n"
        "store = SnapshotStore(sys.argv[1], threads=2)\n"
        "store.save_async(1, {str(i): torch.randn(200, 300) for i in range(30)})\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert SnapshotStore(tmp_path).steps() == [1] and SnapshotStore(tmp_path).verify() == []


class _PowerCut(BaseException):
    pass


class _Fuse:
    """Lets so many calls that change the disk pass, then none, as if the process were gone."""

    def __init__(self, monkeypatch, calls: int) -> None:
        self.left, self.blown = calls, False
        for name in ("rename", "unlink", "fsync"):
            monkeypatch.setattr(os, name, self._guarded(getattr(os, name)))

    def _guarded(self, call):
        def guarded(*args, **kwargs):
            if self.blown or not self.left:
                self.blown = True
                raise _PowerCut
            self.left -= 1
            return call(*args, **kwargs)

        return guarded


@pytest.mark.parametrize("doing", ["save", "overwrite", "prune"])
def test_cut_off_at_every_moment(tmp_path, monkeypatch, doing):
    """Whatever was not removed on purpose can be loaded after each."""
    source = tmp_path / "source"
    store = SnapshotStore(source, keyframe_every=6)
    for step in range(7):
        store.save(step, changing_state(0) | {"n": step})
    assert [store.info(step).parent for step in store.steps()] == [None, 0, 1, 2, 3, 4, None]
    calls, cut = 0, True
    while cut:
        folder = tmp_path / str(calls)
        shutil.copytree(source, folder)
        writer, cut = SnapshotStore(folder, threads=1), False
        with monkeypatch.context() as patch:
            _Fuse(patch, calls)
            try:
                if doing == "save":
                    writer.save(7, changing_state(0) | {"n": 7})
                elif doing == "overwrite":
                    writer.save(6, changing_state(1) | {"n": 60}, overwrite=True)
                else:
                    writer.prune(steps=[0, 1, 3])
            except _PowerCut:
                cut = True
        opened = SnapshotStore(folder, threads=1)
        steps = opened.steps()
        assert set(steps) >= ({2, 4, 5, 6} if doing == "prune" else set(range(7)))
        for step in steps:
            loaded = opened.load(step)
            if loaded["n"] == 60:
                loaded |= {"n": step} | {key: changing_state(0)[key] for key in "wmb"} | {"step": 0}
            assert_same(changing_state(0) | {"n": step}, loaded)
        opened.save(9, changing_state(0))
        assert not any(name.startswith(".tmp-") for name in os.listdir(folder))
        calls += 1
        shutil.rmtree(folder)
    assert calls > {"save": 3, "overwrite": 3, "prune": 8}[doing]


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 2 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.parametrize("way", ["save", "save_async"])
@pytest.mark.parametrize("size", [70_000, 300_000, 2_500_000])
def test_a_full_disk(small_disk, way, size):
    store = SnapshotStore(small_disk)

    def save(step: int):
        result = getattr(store, way)(step, {"w": random_tensor("uint8", (size,), step)})
        return result.result() if way == "save_async" else result

    saved = 0
    with pytest.raises(OSError, match=f"No space left.*the snapshot of step {2_000_000 // size}.*store is as before"):
        for saved in range(100):
            save(saved)
    with pytest.raises(OSError) as caught:
        save(saved)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(small_disk)
    assert sorted(os.listdir(small_disk)) == [".lock", *(f"step-{step:012d}.ccsnap" for step in range(saved))]
    assert store.steps() == list(range(saved)) and store.verify() == []
    if saved:
        store.prune(keep=1)
        save(saved)
        assert store.verify() == []


def test_a_disk_that_fills_while_pruning(small_disk):
    """Two children are to be coded anew and one has room: nothing is lost."""
    store = SnapshotStore(small_disk)
    big = random_tensor("uint8", (900_000,))
    for step, size in ((0, 900_000), (1, 900_000)):
        store.save(step, {"w": big[:size]})
    (small_disk / "filler").write_bytes(bytes(800_000))
    with pytest.raises(OSError, match="No space left"):
        store.prune(steps=[0])
    assert store.steps() == [0, 1] and store.verify() == []
    (small_disk / "filler").unlink()
    assert store.prune(steps=[0]).recoded == (1,)
    assert_same({"w": big}, store.load())


def test_the_fuse_itself(tmp_path):
    """That these tests can fail: a parent removed before its child is found out."""
    store = SnapshotStore(tmp_path)
    for step in (0, 1):
        store.save(step, changing_state(0))
    os.unlink(store._files.path_of(0))
    with pytest.raises(WrongParentError):
        store.load(1)
