"""One file packed, and one restored."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from commcomp.checkpoint import codec_registry
from commcomp.checkpoint.coded import CodedTensor, HostTensor, Reference, SnapshotEncoder, TreeInfo
from commcomp.checkpoint.command_line import restoring
from commcomp.checkpoint.command_line.file_state import PACKED, BasedFile, FileState, header_of, read_state
from commcomp.checkpoint.container import StoredTensor
from commcomp.checkpoint.dtypes import item_bytes
from commcomp.checkpoint.host_copy import as_tensor
from commcomp.checkpoint.saving import HostState, write_state

Advance = Callable[[int], None]  # bytes that were done
_VALUES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Packed:
    """A packed file: what it was made of, and what it says of each tensor; `errors`: the largest, of lossy ones."""

    state: FileState
    stored: Mapping[str, StoredTensor]
    errors: Mapping[str, float]
    file_bytes: int
    has_parent: bool


def pack(
    source: str,
    target: str,
    bases: Sequence[str],
    mode: str,
    coder: str,
    threads: int,
    advance: Advance = lambda _: None,
) -> Packed:
    """Write `target`; the first of `bases` is coded against, the others are for a packed first one.

    Raises as `read_state`, OSError where the disk is full; `target` is not there then.
    """
    if source.endswith(PACKED):
        raise ValueError(f"{source} is packed already; unpack it first")
    previous, step = None, 0
    if bases:
        previous = read_state(bases[0], bases[1:], threads).hashed(threads).reference()
        step = previous.step + 1
    state = read_state(source, (), threads)
    origin = restoring.with_hashes(state, threads) if mode in ("lossless", "stored") else state.origin
    info = TreeInfo(step, state.info.skeleton, state.info.paths)
    host = HostState(info, state.tensors, {"file": origin}, owned=False)
    encoder = _Telling(codec_registry.encoder_for(mode, threads, coder), advance)
    with replacing(target) as unfinished:
        done = write_state(unfinished, host, mode, encoder, previous, threads)
    errors = {name: _largest_error(state.tensors[name], data) for name, data in done.reconstructions.items()}
    return Packed(state, done.tensors, errors, done.file_bytes, done.parent is not None)


def unpack(source: str, target: str, bases: Sequence[str], threads: int, watch: Callable[[BasedFile], None]) -> None:
    """Write the file that `source` was made of; of safetensors and .distcp the same bytes, the other files that are in
    `source` beside it. `watch` gets the open file before.

    Raises SnapshotError, OSError; `target` is not there then, or as it was.
    """
    restored = checked(source, bases, threads, watch)
    targets = [os.path.join(os.path.dirname(target), file.name) for file in restored]
    targets[0] = target
    if there := [path for path in targets[1:] if os.path.lexists(path)]:
        raise FileExistsError(f"{there[0]} is there already, and {source} holds such a file too; move it away")
    with contextlib.ExitStack() as unfinished:
        for path, made in zip(targets, restored):
            with open(unfinished.enter_context(replacing(path)), "wb") as file:
                made.write(file)
                file.flush()
                os.fsync(file.fileno())


def checked(
    source: str, bases: Sequence[str], threads: int, watch: Callable[[BasedFile], None]
) -> list[restoring.RestoredFile]:
    """What a packed file was made of, decoded; every hash is compared, those of the whole files too."""
    with BasedFile(source, bases, threads) as file:
        watch(file)
        state = file.read()
    return restoring.checked_files_of(state, threads)


class _Telling:
    """An encoder that tells how far it is."""

    def __init__(self, encoder: SnapshotEncoder, advance: Advance) -> None:
        self._encoder, self._advance = encoder, advance

    def __call__(
        self, tensors: Mapping[str, HostTensor], tree_info: TreeInfo, previous: Reference | None
    ) -> Iterator[CodedTensor]:
        for coded in self._encoder(tensors, tree_info, previous):
            yield coded
            self._advance(len(tensors[coded.name].data))


def _largest_error(given: HostTensor, decoded: np.ndarray) -> float:
    """Of finite values."""
    header, step, largest = header_of(given), _VALUES_AT_ONCE * item_bytes(given.dtype), 0.0
    for start in range(0, len(decoded), step):
        parts = (data[start : start + step].copy() for data in (given.data, decoded))
        one, other = (as_tensor(header, part, (len(part) // header.item_bytes,)).double() for part in parts)
        largest = max(largest, float((one - other).nan_to_num(0.0, 0.0, 0.0).abs().max()))
    return largest


@contextlib.contextmanager
def replacing(target: str) -> Iterator[str]:
    """A name to write to, which becomes `target` at the end, and is removed where that is not reached."""
    unfinished = f"{target}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        yield unfinished
        os.rename(unfinished, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
