"""Archives of torch.save: damaged in any way, and large."""

from __future__ import annotations

import io
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commcomp.checkpoint.command_line.distcp import archive


def _archives() -> Sequence[bytes]:
    found = []
    for value in (torch.arange(12.0).reshape(3, 4), torch.ones(3, dtype=torch.float8_e5m2), 0.5):
        torch.save(value, file := io.BytesIO())
        found.append(file.getvalue())
    return found


@given(st.sampled_from(_archives()), st.data())
def test_whatever_an_item_holds_only_a_value_error_is_raised(item: bytes, data: st.DataObject) -> None:
    broken = bytearray(item)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(item) - 1))] = data.draw(st.integers(0, 255))
    start = data.draw(st.integers(0, 30))
    array = torch.frombuffer(broken, dtype=torch.uint8).numpy()[start:]
    for read in (archive.tensor_in, archive.plain_value_in):
        try:
            found = read(array)
        except ValueError as error:
            assert str(error)
        else:
            if read is archive.tensor_in and found is not None:
                assert 0 <= found.start <= found.stop <= len(array)


def test_the_pickle_of_a_large_item_is_not_read() -> None:
    """Values of a tensor lie beside it."""
    torch.save([0.5] * 50_000, file := io.BytesIO())
    item = np.frombuffer(file.getvalue(), np.uint8)
    tracemalloc.start()
    try:
        assert archive.tensor_in(item) is None
        with pytest.raises(ValueError, match="a pickle of"):
            archive.plain_value_in(item)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_large_archives_are_read(tmp_path: Path) -> None:
    """More than 4 GiB, in a file that has a hole there."""
    values = 3 << 29
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, 0, 0, 0, 0, 7, 0xFFFFFFFF, 0xFFFFFFFF, 6, 20, 0, 0, 0, 0, 0)
    extra = struct.pack("<2H2Q", 1, 16, 4 * values, 4 * values)
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0, 0, 0, 0, 7, 0xFFFFFFFF, 0xFFFFFFFF, 6, 0)
    head, directory = local + b"data/0", entry + b"data/0" + extra
    start = len(head) + 4 * values
    end = start + len(directory)
    tail = directory + struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, 1, 1, len(directory), start)
    tail += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    tail += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    with open(tmp_path / "large", "wb") as file:
        file.write(head)
        file.seek(start)
        file.write(tail)
    item = np.asarray(np.memmap(tmp_path / "large", np.uint8, "r"))
    (found,) = archive._entries(item).items()
    assert found == ("data/0", archive._Entry(0, len(head), start, (start + 16, 14)))
