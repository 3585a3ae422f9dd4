"""The command itself, on real files: what comes back, what it says, how it fails."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from commcomp.checkpoint import DeltaStorageWriter, SnapshotStore
from commcomp.checkpoint.command_line import progress
from commcomp.checkpoint.command_line.main import main
from tests.checkpoint.command_line import files
from tests.checkpoint.command_line.files import run
from tests.checkpoint.states import assert_same


def test_the_command_packs_and_restores_a_file_to_the_byte(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    files.write_safetensors(source, files.tensors(0), {"author": "x", "ü": "y"})

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "commcomp.checkpoint.command_line", "ckpt", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, timeout=120)

    packed = command("pack", source)
    assert packed.returncode == 0, packed.stderr
    assert "weights" in packed.stdout and "bits a value" in packed.stdout
    assert os.path.getsize(f"{source}.ccsnap") < 0.9 * os.path.getsize(source)
    restored = command("unpack", f"{source}.ccsnap", tmp_path / "back.safetensors")
    assert restored.returncode == 0, restored.stderr
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()
    run("unpack", f"{source}.ccsnap", expect=2)  # it is there


def _bytes_below(folder: Path) -> dict[str, bytes | None]:
    return {name: data for name, data in files.bytes_below(folder).items() if not name.endswith(".pt")}


def test_a_folder_comes_back_with_and_without_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / f"model-{number}" for number in range(3)]
    for number, folder in enumerate(folders):
        files.model_folder(folder, float(number), 20 + 10 * number)
    run("pack", folders[0])
    told = capsys.readouterr()
    assert "first moments" in told.out and "broken.safetensors: copied as it is" in told.err
    packed = [Path(f"{folder}.packed") for folder in folders]
    run("pack", folders[1], "--base", folders[0])
    run("pack", folders[2], packed[2], "--base", packed[1], "--base", folders[0], "--threads", 2)
    sizes = [sum(path.stat().st_size for path in folder.rglob("*.ccsnap")) for folder in packed]
    assert sizes[1] < 0.8 * sizes[0] and sizes[2] < 0.8 * sizes[0]
    bases: list[Sequence[object]] = [(), ("--base", packed[0]), ("--base", packed[1], "--base", folders[0])]
    for number, (folder, base) in enumerate(zip(folders, bases)):
        back = tmp_path / f"back-{number}"
        run("unpack", packed[number], back, *base)
        assert _bytes_below(back) == _bytes_below(folder)
        saved, loaded = (torch.load(one / "optimizer.pt", weights_only=True) for one in (folder, back))
        assert_same(saved, loaded)
        run("verify", packed[number], *base)
        run("diff", folder, back)
        run("diff", folder, packed[number], *base)
    capsys.readouterr()
    run("verify", packed[2], "--base", packed[1], expect=1)  # the base's own base is missing
    assert "name it with --base" in capsys.readouterr().out
    run("info", packed[1])
    told = capsys.readouterr()
    assert "second moments" in told.out and "coded against state" in told.out
    run("diff", folders[0], folders[1], expect=1)
    assert "largest difference" in capsys.readouterr().out
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]


def test_lossy_modes_say_their_largest_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, base = tmp_path / "state.pt", tmp_path / "before.pt"
    torch.save(files.trained(30), source)
    torch.save(files.trained(20), base)
    run("pack", source, "--mode", "standard", "--base", base)
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "largest error" in lines[""]
    told = float(lines["first moments"].split()[-1])
    run("unpack", f"{source}.ccsnap", tmp_path / "back.pt", "--base", base)
    given, back = (torch.load(path, weights_only=True) for path in (source, tmp_path / "back.pt"))
    errors = []
    for number, state in given["optimizer"]["state"].items():
        found = back["optimizer"]["state"][number]
        errors.append(float((state["exp_avg"] - found["exp_avg"]).abs().max()))
        assert torch.equal(state["step"], found["step"])
    assert 0 < max(errors) == pytest.approx(told, rel=1e-2)
    run("diff", source, tmp_path / "back.pt", expect=1)
    assert "weights" in capsys.readouterr().out


def test_damage_is_found_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "model.safetensors"
    files.write_safetensors(source, files.tensors(0))
    run("pack", source, "--quiet")
    packed = Path(f"{source}.ccsnap")
    whole = packed.read_bytes()
    for place in range(0, len(whole), len(whole) // 40):
        packed.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        run("verify", packed, "--quiet", expect=1)
        assert str(packed) in capsys.readouterr().out
        run("unpack", packed, tmp_path / "back", expect=2)
        assert not (tmp_path / "back").exists()
    packed.write_bytes(whole)
    run("verify", packed)


def _file(header: object, data: bytes = b"", raw: bytes | None = None) -> bytes:
    text = json.dumps(header).encode() if raw is None else raw
    return struct.pack("<Q", len(text)) + text + data


_F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no file of safetensors"),
        (struct.pack("<Q", 1 << 60) + b"{}", "no file of safetensors"),
        (_file([1]), "no JSON object"),
        (_file(None, raw=b"{nonsense"), "no JSON"),
        (_file(None, raw=b'{"a": "\xff\xfe"}'), "no JSON"),
        (_file(None, raw=b'{"a": 1, "a": 2}'), "there twice"),
        (_file({"a": {"dtype": "F32"}}), "described wrongly"),
        (_file({"a": _F32}, bytes(7)), "end at byte 8 of 7"),
        (_file({"a": _F32}, bytes(9)), "end at byte 8 of 9"),
        (_file({"a": {**_F32, "data_offsets": [4, 12]}}, bytes(12)), "expected 0"),
        (_file({"a": _F32, "b": _F32}, bytes(8)), "expected 8"),
        (_file({"a": {**_F32, "shape": [-2]}}, bytes(8)), "shape"),
        (_file({"a": {**_F32, "shape": [3]}}, bytes(8)), "has 8 bytes"),
        (_file({"a": {**_F32, "data_offsets": [8, 0]}}, bytes(8)), "bytes 8 to 0"),
    ],
)
def test_files_that_are_none_of_safetensors_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    source = tmp_path / "x.safetensors"
    source.write_bytes(content)
    run("pack", source, expect=2)
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_unknown_dtypes_and_other_orders_come_back(tmp_path: Path) -> None:
    header = {
        "b": {"dtype": "F8_E4M3", "shape": [3, 2], "data_offsets": [5, 11]},
        "a": {"dtype": "F4_OF_TOMORROW", "shape": [10], "data_offsets": [0, 5]},
        "c": {"dtype": "F32", "shape": [0], "data_offsets": [11, 11]},
    }
    source = tmp_path / "x.safetensors"
    source.write_bytes(_file(header, bytes(range(11))))
    run("pack", source)
    run("unpack", f"{source}.ccsnap", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()


class _Evil:
    def __reduce__(self) -> object:
        return os.system, ("touch /tmp/commcomp-was-here",)


def test_wrong_use_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "state.pt"
    torch.save({"a": _Evil()}, source)
    run("pack", source, expect=2)
    message = capsys.readouterr().err
    assert "more than plain containers" in message and "system" in message and "weights_only" not in message
    torch.save({"a": torch.ones(3)}, source)
    run("pack", source, "--base", tmp_path / "nowhere.pt", expect=2)
    assert "is not there" in capsys.readouterr().err
    run("pack", source)
    for command in ("pack", "unpack"):
        run(command, source if command == "pack" else f"{source}.ccsnap", expect=2)
        assert "is there already" in capsys.readouterr().err
    run("pack", f"{source}.ccsnap", expect=2)
    assert "packed already" in capsys.readouterr().err
    run("pack", tmp_path, expect=2)
    assert "packed already" in capsys.readouterr().err
    os.unlink(f"{source}.ccsnap")
    run("pack", tmp_path, tmp_path / "inside", expect=2)
    assert "outside" in capsys.readouterr().err
    run("info", source, expect=2)
    assert "is not packed" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("x")
    run("pack", tmp_path / "notes.txt", expect=2)
    assert "no checkpoint by its name" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "state.pt"]
    with pytest.raises(SystemExit):
        main(["ckpt", "pack", str(source), "--mode", "best"])


def test_files_of_the_package_safetensors_come_back(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    safetensors.torch.save_file(files.tensors(3), source, {"format": "pt"})
    run("pack", source)
    run("unpack", f"{source}.ccsnap", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_stores_and_runs_are_described_and_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = SnapshotStore(tmp_path / "store")
    for step in (10, 11):
        store.save(step, files.trained(step))
        dcp.save({"state": files.trained(step)}, storage_writer=DeltaStorageWriter(tmp_path / "run", step))
    for name, path in (
        ("store", tmp_path / "store" / "step-000000000011.ccsnap"),
        ("run", tmp_path / "run" / "step-000000000011" / "rank-00000.ccsnap"),
    ):
        run("info", tmp_path / name)
        assert "second moments" in capsys.readouterr().out
        run("verify", tmp_path / name)
        assert "2 of 2 files are whole" in capsys.readouterr().out
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
        run("verify", tmp_path / name, expect=1)
        assert f"{path}, tensor" in capsys.readouterr().out
    os.rename(tmp_path / "run" / "step-000000000010", tmp_path / "away")
    run("verify", tmp_path / "run", expect=1)
    assert "coded against step 10" in capsys.readouterr().out


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_shows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "model.safetensors"
    files.write_safetensors(source, files.tensors(0))
    moved: list[int] = []
    advance = progress.Progress.advance
    monkeypatch.setattr(progress.Progress, "advance", lambda self, n: moved.append(n) or advance(self, n))
    monkeypatch.setattr(sys, "stderr", terminal := _Terminal())
    run("pack", source)
    assert 0 < sum(moved) <= source.stat().st_size
    assert "packing" in terminal.getvalue()
    moved.clear()
    run("unpack", f"{source}.ccsnap", tmp_path / "back")
    assert sum(moved) == os.path.getsize(f"{source}.ccsnap")
    assert "unpacking" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", terminal := _Terminal())
    run("verify", f"{source}.ccsnap", "--quiet")
    assert terminal.getvalue() == ""
