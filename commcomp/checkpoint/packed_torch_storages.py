"""What torch.save would write of an object: its storages, each once, with names by which an encoder knows them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from commcomp.checkpoint.coded import TreeInfo
from commcomp.checkpoint.dtypes import TORCH_DTYPES, dtype_name
from commcomp.checkpoint.state_tree import MAX_DEPTH, TensorPlace, path_text

Path = tuple[Any, ...]
Cut = tuple[int, int]
"""Values, and in how many columns they stand."""

PROTOCOL = 2
"""Of pickle: torch.save's own."""
_LOCAL_HEADER, _CENTRAL_HEADER = 30 + 4, 46
"""At the least what a zip archive of torch.save takes for a record besides its bytes and, in both, its name."""
_OTHER_RECORDS = ("data.pkl", ".format_version", ".storage_alignment", "byteorder", "version", ".data/serialization_id")
_OTHER_BYTES = 50
"""What is in those but the first."""
_NAME_LENGTH = 1000


@dataclass
class Found:
    """A storage of the object that is saved, kept alive so that no other one gets its address; its tensors."""

    storage: torch.UntypedStorage
    number: int
    tensors: list[Tensor] = field(default_factory=list)
    is_raw: bool = False
    """Pickled outside a tensor too: left to torch."""
    parts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """As it is coded: by name the shapes of what lies in it one after another."""

    @property
    def dtype(self) -> torch.dtype:
        """As which its bytes are coded."""
        whole = self.whole()
        tensor = self.tensors[0] if whole is None else whole
        return tensor.dtype if self.storage.nbytes() % tensor.dtype.itemsize == 0 else torch.uint8

    def whole(self) -> Tensor | None:
        """A tensor that has all its bytes in order, if there is one."""
        return next((tensor for tensor in self.tensors if covers(tensor)), None)


def covers(tensor: Tensor) -> bool:
    """Whether it is all of its storage, in order."""
    size = tensor.numel() * tensor.dtype.itemsize
    return tensor.is_contiguous() and tensor.storage_offset() == 0 and size == tensor.untyped_storage().nbytes()


def is_codable(tensor: Tensor) -> bool:
    """Whether its values are those of a plain storage in memory, of a dtype that a snapshot has."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_quantized
        and tensor.device.type != "meta"
        and dtype_name(tensor.dtype) in TORCH_DTYPES
        and type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
        and tensor.untyped_storage().nbytes() > 0
    )


def storages_of(value: Any, stem: str) -> tuple[dict[int, Found], int]:
    """By address, the storages that torch.save would write, found as it finds them: by pickling.

    And the bytes of its file at the least, which are more by the padding between records; `stem`: of the file's name.
    """
    collector = _Collector()
    collector.dump(value)
    storages = collector.storages
    names = [*_OTHER_RECORDS, *(f"data/{number}" for number in range(len(storages)))]
    headers = sum(_LOCAL_HEADER + _CENTRAL_HEADER + 2 * len(f"{stem}/{name}") for name in names)
    values = sum(found.storage.nbytes() for found in storages.values())
    return storages, collector.pickle_bytes + _OTHER_BYTES + headers + values


class _Collector(pickle.Pickler):
    """Pickles into nothing, as torch.save does, and notes the storages."""

    def __init__(self) -> None:
        self._file = io.BytesIO()
        super().__init__(self._file, protocol=PROTOCOL)
        self.storages: dict[int, Found] = {}
        self._of_tensors: list[Any] = []  # kept alive: they are recognised by address
        self._ids: set[int] = set()

    @property
    def pickle_bytes(self) -> int:
        return self._file.tell()

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        reduced = value.__reduce_ex__(PROTOCOL)
        if not is_codable(value):
            return reduced

        def note(storage: Any) -> Any:
            self._of_tensors.append(storage)
            self._ids.add(id(storage))
            self._found(storage).tensors.append(value)
            return storage

        return with_storages(reduced, note)

    def persistent_id(self, value: Any) -> Any:
        if not _is_storage(value):
            return None
        found = self._found(value)
        if id(value) not in self._ids:
            found.is_raw = True
        return "storage", torch.IntStorage, str(found.number), "cpu", 0  # no longer than what torch pickles

    def _found(self, storage: Any) -> Found:
        memory = untyped(storage)
        return self.storages.setdefault(memory._cdata, Found(memory, len(self.storages)))


def with_storages(reduced: Any, change: Callable[[Any], Any]) -> Any:
    """What a tensor's __reduce_ex__ gave, with its storages changed."""
    if type(reduced) is tuple:
        return tuple(with_storages(item, change) for item in reduced)
    return change(reduced) if _is_storage(reduced) else reduced


def _is_storage(value: Any) -> bool:
    return isinstance(value, torch.TypedStorage) or torch.is_storage(value)


def untyped(storage: Any) -> torch.UntypedStorage:
    """The bytes behind a storage of either kind."""
    return storage._untyped_storage if isinstance(storage, torch.TypedStorage) else storage


class Names:
    """Names each storage by its first place in the dicts and lists, by which optimizers' states are known.

    `cut`: of a number of values, the matrices in a flat tensor of that many; none where it is to be left whole.
    """

    def __init__(self, storages: dict[int, Found], cut: Callable[[int], list[Cut]]) -> None:
        self._storages, self._cut, self._taken = storages, cut, set[str]()
        self._paths: dict[str, list[Path]] = {}

    def tree_info(self, value: Any) -> TreeInfo:
        skeleton = self._visit(value, ())
        for number, found in enumerate(self._storages.values()):
            if not found.is_raw and not found.parts:
                self._name(found, f"storage/{number}")
        return TreeInfo(0, skeleton, {name: tuple(paths) for name, paths in self._paths.items()})

    def _visit(self, value: Any, path: Path) -> Any:
        """What roles are told by: containers, numbers, and tensors that are all of their storage."""
        if len(path) >= MAX_DEPTH:
            return None
        if isinstance(value, dict):
            return {key: self._visit(item, (*path, key)) for key, item in dict.items(value)}
        if isinstance(value, (list, tuple)):
            return [self._visit(item, (*path, index)) for index, item in enumerate(value)]
        if isinstance(value, Tensor):
            return self._place(value, path) if is_codable(value) else None
        return value if type(value) in (int, float, str, bool) else None

    def _place(self, tensor: Tensor, path: Path) -> TensorPlace | None:
        found = self._storages.get(tensor.untyped_storage()._cdata)
        if found is None or found.is_raw:
            return None
        if not found.parts:
            self._name(found, path_text(path))
        if not covers(tensor) or not path:
            return None
        if len(found.parts) == 1:
            (name,) = found.parts
            self._paths.setdefault(name, []).append(path)
            return TensorPlace(name)
        for number, name in enumerate(found.parts):  # "state", 0, "exp_avg" becomes "state", 0, number, "exp_avg"
            self._paths.setdefault(name, []).append((*path[:-1], number, path[-1]))
        return None

    def _name(self, found: Found, wanted: str) -> None:
        tensor = found.whole()
        if tensor is None:
            dtype = found.dtype
            found.parts = {self._new_name(wanted): (found.storage.nbytes() // dtype.itemsize,)}
            return
        cuts = self._cut(tensor.numel()) if tensor.dim() == 1 else []
        if len(cuts) < 2 or sum(values for values, _ in cuts) != tensor.numel():
            found.parts = {self._new_name(wanted): tuple(tensor.shape)}
            return
        shapes = [(values,) if columns == 1 else (values // columns, columns) for values, columns in cuts]
        found.parts = {self._new_name(f"{wanted}/{number}"): shape for number, shape in enumerate(shapes)}

    def _new_name(self, wanted: str) -> str:
        wanted = wanted.encode("utf-8", "replace").decode()[:_NAME_LENGTH]
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}#{number}"
        self._taken.add(name)
        return name
