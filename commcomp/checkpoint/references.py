"""The parent snapshot as encoders read it: kept in memory, or decoded from its file range by range."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from commcomp.checkpoint.chain import SnapshotChain
from commcomp.checkpoint.coded import TensorHeader, TreeInfo
from commcomp.checkpoint.container import StoredTensor
from commcomp.checkpoint.decoder import decode, whole


class _Reference:
    def __init__(self, step: int, state_hash: str, tree_info: TreeInfo, tensors: Mapping[str, StoredTensor]) -> None:
        self.step, self.state_hash, self.tree_info, self._tensors = step, state_hash, tree_info, tensors

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def header(self, name: str) -> TensorHeader | None:
        tensor = self._tensors.get(name)
        return None if tensor is None else tensor.header

    def hash_of(self, name: str) -> str | None:
        tensor = self._tensors.get(name)
        return None if tensor is None else tensor.hash

    def _range(self, name: str, start: int, stop: int | None) -> tuple[int, int]:
        total = self._tensors[name].header.num_values
        stop = total if stop is None else stop
        if not 0 <= start <= stop <= total:
            raise ValueError(f"values [{start}, {stop}) of {name!r}, which has {total}")
        return start, stop


class MemoryReference(_Reference):
    """`arrays`: the raw bytes of every tensor that was not released, uint8, flat."""

    def __init__(
        self,
        step: int,
        state_hash: str,
        tree_info: TreeInfo,
        tensors: Mapping[str, StoredTensor],
        arrays: dict[str, np.ndarray],
    ) -> None:
        super().__init__(step, state_hash, tree_info, tensors)
        self.arrays = arrays

    @classmethod
    def of_file(cls, chain: SnapshotChain, threads: int) -> MemoryReference:
        """Decode a snapshot whole. Raises as `decode`."""
        reader = chain[0]
        pieces = decode(chain, whole(reader), threads=threads)
        arrays = {name: piece.data for name, piece in pieces.items()}
        return cls(reader.header.step, reader.state_hash, reader.tree_info, reader.tensors, arrays)

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def is_whole(self) -> bool:
        return len(self.arrays) == len(self._tensors)

    def release(self, name: str) -> np.ndarray | None:
        array = self.arrays.pop(name, None)
        return array if array is not None and array.flags.writeable else None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        start, stop = self._range(name, start, stop)
        width = self._tensors[name].header.item_bytes
        data = self.arrays[name][start * width : stop * width]
        data.flags.writeable = False
        return data


class FileReference(_Reference):
    """Decodes again what is read, from the open chain."""

    def __init__(self, chain: SnapshotChain) -> None:
        reader = chain[0]
        super().__init__(reader.header.step, reader.state_hash, reader.tree_info, reader.tensors)
        self._chain = chain

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        start, stop = self._range(name, start, stop)
        return decode(self._chain, {name: (start, stop)})[name].values(start, stop)

    def release(self, name: str) -> np.ndarray | None:
        return None
