"""Files of torch.save whose tensors are one snapshot: what is loaded, how large, and what damage does."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from commcomp.checkpoint import DamagedFileError, SnapshotError, packed_torch, packed_torch_writer
from commcomp.checkpoint.packed_torch_storages import storages_of
from tests.checkpoint.same_objects import assert_same_object


class Holder:
    """Pickled as it is, with a tensor in it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.scale, self.tensor = 3.0, tensor


def trained(rows: int = 200, columns: int = 96) -> dict[str, Any]:
    """Something like a training state after a few steps."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    first = torch.randn(rows, columns, generator=generator) * 1e-3
    return {
        "module": OrderedDict({"a.weight": weight, "a.half": weight.bfloat16(), "ids": torch.arange(5000)}),
        "optimizer": {
            "state": {0: {"step": torch.tensor(7.0), "exp_avg": first, "exp_avg_sq": first**2 * 0.3}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}],
        },
        "steps": 7,
    }


def unusual() -> dict[str, Any]:
    flat = torch.randn(10_000)
    parameter = torch.nn.Parameter(torch.randn(64, 64))
    tagged = torch.randn(50)
    tagged.tag = "kept"  # type: ignore[attr-defined]
    return {
        "views": [flat[:3000].view(30, 100), flat[3000:], flat.view(100, 100).t(), flat[::2]],
        "parameter": parameter,
        "same": (parameter.data, parameter.data.view(-1)),
        "frozen": torch.randn(8, 8).requires_grad_(),
        "holder": Holder(flat[5:10]),
        "tagged": tagged,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "conjugate": torch.randn(20, dtype=torch.complex64).conj(),
        "sparse": torch.eye(30).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.randn(40), 0.1, 0, torch.qint8),
        "storage": torch.arange(4).untyped_storage(),
        "expanded": torch.randn(1, 40).expand(100, 40),
        "bits": torch.randint(0, 2, (4000,), dtype=torch.bool),
        "float8": torch.randn(3000).to(torch.float8_e4m3fn),
        "unsigned": torch.arange(3000).to(torch.uint16),
        ("a", 1): [torch.full((4000,), float("nan")), {1: torch.zeros(4000)}],
    }


def plain_of(value: Any, path: Path) -> Path:
    torch.save(value, path)
    return path


def pack(value: Any, path: Path) -> packed_torch_writer.PackedReport:
    return packed_torch_writer.save(value, str(path), lambda other: torch.save(value, other))


@pytest.mark.parametrize("make", [trained, unusual])
def test_loads_as_the_plain_file_and_is_no_larger(make: Any, tmp_path: Path) -> None:
    value = make()
    report = pack(value, tmp_path / "ours.pt")
    plain = plain_of(value, tmp_path / "plain.pt")
    assert report.packed and packed_torch.is_packed(str(tmp_path / "ours.pt"))
    assert report.bytes == os.path.getsize(tmp_path / "ours.pt") < os.path.getsize(plain)
    assert 0.98 * os.path.getsize(plain) <= report.plain_bytes <= os.path.getsize(plain)
    assert sorted(os.listdir(tmp_path)) == ["ours.pt", "plain.pt"]
    for options in ({}, {"mmap": True}, {"map_location": "cpu"}, {"map_location": lambda storage, place: storage}):
        ours = torch.load(tmp_path / "ours.pt", weights_only=False, **options)
        assert_same_object(ours, torch.load(plain, weights_only=False, **options))
    assert not packed_torch.is_packed(str(plain))


@pytest.mark.parametrize("name", ["a.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_the_bytes_of_the_plain_file_are_known_before(name: str, tmp_path: Path) -> None:
    """Never more than it has, so that no file is larger; less by padding and the like."""
    for sizes in ([], [1], [16] * 300, [48] * 300, [64] * 2000, [1000, 3, 0, 70_000]):
        value = {str(number): torch.zeros(size, dtype=torch.int8) for number, size in enumerate(sizes)}
        _, bytes_before = storages_of(value, name.removesuffix(".pt"))
        plain = os.path.getsize(plain_of(value, tmp_path / name))
        assert plain - 96 * (len(sizes) + 8) <= bytes_before <= plain, sizes[:1]


def test_noise_is_written_plain(tmp_path: Path) -> None:
    value = [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in (1, 30_000)]
    report = pack(value, tmp_path / "ours.pt")
    (tmp_path / "plain").mkdir()
    assert not report.packed and report.bytes == report.plain_bytes
    assert (tmp_path / "ours.pt").read_bytes() == plain_of(value, tmp_path / "plain" / "ours.pt").read_bytes()
    assert_same_object(torch.load(tmp_path / "ours.pt", weights_only=False), value)


def test_without_tensors(tmp_path: Path) -> None:
    assert not pack({"steps": 3}, tmp_path / "ours.pt").packed
    assert torch.load(tmp_path / "ours.pt", weights_only=False) == {"steps": 3}


def test_loaded_storages_are_shared_and_writable(tmp_path: Path) -> None:
    pack(unusual(), tmp_path / "ours.pt")
    loaded = torch.load(tmp_path / "ours.pt", weights_only=False)
    loaded["views"][0].fill_(7)
    assert (loaded["views"][2].t().reshape(-1)[:3000] == 7).all() and (loaded["holder"].tensor == 7).all()


def test_a_flipped_byte_is_named_or_does_no_harm(tmp_path: Path) -> None:
    """Through plain torch.load, whatever is in the snapshot; through `check`, all of the file."""
    value = trained(40, 30)
    path = tmp_path / "run" / "ours.pt"
    path.parent.mkdir()
    pack(value, path)
    good = path.read_bytes()
    start = good.index(b"CCSNAP\x00\x01")
    end = good.rindex(b"CCSNAP\x00\x01") + 8
    named = 0
    for at in range(0, len(good), 41 if len(good) < 40_000 else 401):
        damaged = bytearray(good)
        damaged[at] ^= 0x41
        path.write_bytes(damaged)
        try:
            loaded = load_checked(str(path))
        except SnapshotError as error:
            named += 1
            assert "ours.pt" in str(error)
        else:
            assert_same_object(loaded, value)
        if start <= at < end:
            with pytest.raises(DamagedFileError, match=r"run/ours\.pt"):
                torch.load(path, weights_only=False)
    assert named > 20


def load_checked(path: str) -> Any:
    """As CheckpointWriter.load does."""
    if packed_torch.is_packed(path):
        packed_torch.check(path)
    try:
        return torch.load(path, weights_only=False)
    except SnapshotError:
        raise
    except Exception as error:
        packed_torch.blame_damage(path, error)
        raise


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ours.pt"
    pack(trained(40, 30), path)
    good = path.read_bytes()
    for length in range(2, len(good), len(good) // 37):
        path.write_bytes(good[:length])
        with pytest.raises(DamagedFileError, match=r"ours\.pt"):
            load_checked(str(path))


def test_forged_sizes_take_no_memory(tmp_path: Path) -> None:
    storages = packed_torch.LoadedStorages("run/x.pt", {}, torch.device("cpu"))
    for payload in (torch.zeros(100, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8), torch.zeros(4), "x"):
        with pytest.raises(DamagedFileError, match=r"run/x\.pt|packed file"):
            packed_torch.open_snapshot(payload, "run/x.pt")  # type: ignore[arg-type]
    with pytest.raises(DamagedFileError, match="tensor 'w'"):
        packed_torch.load_storage(storages, ("w",), 1 << 60, torch.float32, None)


def test_what_fails_leaves_the_file_that_was(tmp_path: Path) -> None:
    path = tmp_path / "ours.pt"
    pack(trained(), path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        pack({"tensor": torch.randn(5000), "function": lambda: None}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["ours.pt"]


def test_leftovers_of_a_killed_writer_are_replaced(tmp_path: Path) -> None:
    (tmp_path / ".ours.pt.unfinished").mkdir()
    for name in ("ours.pt", "snapshot"):
        (tmp_path / ".ours.pt.unfinished" / name).write_bytes(b"half")
    assert pack(trained(), tmp_path / "ours.pt").packed
    assert os.listdir(tmp_path) == ["ours.pt"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_come_back_to_their_devices_or_where_they_are_sent(tmp_path: Path) -> None:
    value = {"cpu": torch.zeros(5000), "gpu": torch.arange(5000, device="cuda:0")}
    pack(value, tmp_path / "ours.pt")
    for place in (None, "cpu", "cuda:0", {"cuda:0": "cpu"}):
        loaded = torch.load(tmp_path / "ours.pt", weights_only=False, map_location=place)
        plain = torch.load(plain_of(value, tmp_path / "plain.pt"), weights_only=False, map_location=place)
        assert_same_object(loaded, plain)
