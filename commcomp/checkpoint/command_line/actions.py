"""What each command does."""

from __future__ import annotations

import argparse
import filecmp
import os
import sys
from collections.abc import Callable

from commcomp.checkpoint.command_line import comparing, folders, packing, snapshots
from commcomp.checkpoint.command_line.file_state import PACKED, kind_of, read_state
from commcomp.checkpoint.command_line.progress import Progress, progress
from commcomp.checkpoint.command_line.tables import Sizes, size_table, sizes_by_class
from commcomp.checkpoint.container_reader import SnapshotReader
from commcomp.checkpoint.errors import SnapshotError

_PACKED_FOLDER = ".packed"


def pack(options: argparse.Namespace) -> int:
    """A file, or a folder of which files that hold no tensors are copied."""
    source = options.input.rstrip(os.sep)
    is_folder = os.path.isdir(source)
    target = options.output or source + (_PACKED_FOLDER if is_folder else PACKED)
    sizes: dict[str, Sizes] = {}
    totals = {"before": 0, "after": 0}

    def one(path: str, to: str, relative: str | None, bar: Progress) -> None:
        bases = folders.bases_of(relative, options.base)
        done = packing.pack(path, to, bases, options.mode, options.coder, options.threads, bar.advance)
        sizes_by_class(done.stored, done.state.info, done.errors, sizes)
        totals["before"] += sum(map(os.path.getsize, folders.packed_with(path)))
        totals["after"] += done.file_bytes
        if options.base and not bases:
            _say(options, f"{relative or path}: no base has a file of that name that can be read; packed alone")
        elif bases and not done.has_parent:
            _say(options, f"{relative or path}: {bases[0]} has nothing that is of use to it; packed alone")

    _require_bases(options.base)
    if not is_folder:
        _require_new(target)
        with progress("packing", os.path.getsize(source), quiet=options.quiet) as bar:
            one(source, target, None, bar)
    else:
        _pack_folder(options, source, target, one)
    if not options.quiet:
        if sizes:
            print(size_table(sizes, totals["after"], with_errors=options.mode not in ("lossless", "stored")))
        print(f"{source}: {totals['before']:,} bytes of checkpoints, now {totals['after']:,} in {target}")
    return 0


def _pack_folder(
    options: argparse.Namespace, source: str, target: str, one: Callable[[str, str, str | None, Progress], None]
) -> None:
    names = folders.files_below(source)
    if packed := [name for name in names if name.endswith(PACKED)]:
        raise ValueError(f"{os.path.join(source, packed[0])} is packed already; unpack it first, or move it away")
    total = sum(os.path.getsize(os.path.join(source, name)) for name in names if kind_of(name))
    with folders.new_folder(target, source) as folder, progress("packing", total, quiet=options.quiet) as bar:
        for name in names:
            path, to = os.path.join(source, name), os.path.join(folder, name)
            if kind_of(name) is None:
                folders.copy(path, to)
                continue
            together = folders.packed_with(path)
            if path != together[0]:
                continue
            try:
                one(path, to + PACKED, name, bar)
            except (ValueError, TypeError) as error:
                for other in together:
                    folders.copy(other, os.path.join(os.path.dirname(to), os.path.basename(other)))
                    _say(options, f"{os.path.relpath(other, source)}: copied as it is: {error}")


def unpack(options: argparse.Namespace) -> int:
    """A file, or a folder of which files that were copied are copied back; snapshots of a store become .pt files."""
    source = options.input.rstrip(os.sep)
    _require_bases(options.base)
    target = options.output or _without_ending(source)
    if not os.path.isdir(source):
        _require_new(target)
        with progress("unpacking", os.path.getsize(source), quiet=options.quiet) as bar, bar.watching() as watch:
            if snapshots.is_snapshot(source):
                snapshots.unpack(source, target, options.threads, watch)
            else:
                packing.unpack(source, target, folders.bases_of(None, options.base), options.threads, watch)
        return 0
    names = folders.files_below(source)
    total = sum(os.path.getsize(os.path.join(source, name)) for name in names if name.endswith(PACKED))
    with folders.new_folder(target, source) as folder, progress("unpacking", total, quiet=options.quiet) as bar:
        for name in names:
            path, to = os.path.join(source, name), os.path.join(folder, name)
            _require_new(to.removesuffix(PACKED))
            if not name.endswith(PACKED):
                folders.copy(path, to)
                continue
            bases = folders.bases_of(name.removesuffix(PACKED), options.base)
            with bar.watching() as watch:
                if snapshots.is_snapshot(path):
                    snapshots.unpack(path, snapshots.restored_name(to), options.threads, watch)
                    continue
                packing.unpack(path, to.removesuffix(PACKED), bases, options.threads, watch)
    return 0


def info(options: argparse.Namespace) -> int:
    """A table over one packed file, or all of a folder; snapshots of a store too."""
    sizes: dict[str, Sizes] = {}
    file_bytes = 0
    for path in _packed_files(options.input):
        with SnapshotReader(path) as reader:
            sizes_by_class(reader.tensors, reader.tree_info, {}, sizes)
            file_bytes += reader.file_bytes
            parent = "alone" if reader.parent is None else f"against state {reader.parent.state_hash}"
            print(f"{path}: {reader.file_bytes:,} bytes, mode {reader.header.mode}, coded {parent}")
            print(f"  state {reader.state_hash}, step {reader.header.step}, {len(reader.tensors)} tensors")
    print(size_table(sizes, file_bytes, with_errors=False))
    return 0


def verify(options: argparse.Namespace) -> int:
    """1 where a file is damaged, or what it was coded against is not there; snapshots of stores and runs too."""
    _require_bases(options.base)
    paths = _packed_files(options.input)
    is_folder, wrong = os.path.isdir(options.input), 0
    with progress("verifying", sum(map(os.path.getsize, paths)), quiet=options.quiet) as bar:
        for path in paths:
            relative = os.path.relpath(path, options.input).removesuffix(PACKED) if is_folder else None
            try:
                with bar.watching() as watch:
                    if snapshots.is_snapshot(path):
                        snapshots.verify(path, options.threads, watch)
                        continue
                    packing.checked(path, folders.bases_of(relative, options.base), options.threads, watch)
            except SnapshotError as error:
                wrong += 1
                print(error)
    if not options.quiet:
        print(f"{len(paths) - wrong} of {len(paths)} files are whole")
    return 1 if wrong else 0


def diff(options: argparse.Namespace) -> int:
    """1 where anything is different."""
    _require_bases(options.base)
    one, other = options.first.rstrip(os.sep), options.second.rstrip(os.sep)
    if os.path.isdir(one) != os.path.isdir(other):
        raise ValueError(f"{one} and {other}: expected two files or two folders")
    if not os.path.isdir(one):
        return 0 if filecmp.cmp(one, other, shallow=False) or _same(options, (one, None), (other, None)) else 1
    names, others = folders.contents(one), folders.contents(other)
    same = names.keys() == others.keys()
    for folder, missing in ((one, names.keys() - others.keys()), (other, others.keys() - names.keys())):
        for name in sorted(missing):
            print(f"only {folder} has {name}")
    compared = set()
    for name in sorted(names.keys() & others.keys()):
        pair = os.path.join(one, names[name]), os.path.join(other, others[name])
        firsts = tuple(folders.packed_with(path)[0] for path in pair)
        if firsts not in compared and not filecmp.cmp(*pair, shallow=False):
            compared.add(firsts)
            same &= _same(options, *((path, os.path.relpath(path, at)) for path, at in zip(firsts, (one, other))))
    return 0 if same else 1


def _same(options: argparse.Namespace, *files: tuple[str, str | None]) -> bool:
    """Of two files with different bytes, each with its relative path where it is one of a folder."""
    one, other = (path for path, _ in files)
    if not all(path.endswith(PACKED) or kind_of(path) for path in (one, other)):
        print(f"{one} and {other} have different bytes")
        return False
    try:
        given = [folders.bases_of(relative and relative.removesuffix(PACKED), options.base) for _, relative in files]
        states = [
            snapshots.read(path, options.threads)
            if snapshots.is_snapshot(path)
            else read_state(path, bases, options.threads)
            for path, bases in zip((one, other), given)
        ]
    except (ValueError, TypeError) as error:
        print(f"{one} and {other} have different bytes, and cannot be compared closer: {error}")
        return False
    same, text = comparing.compare(*states)
    if not same:
        print(f"{one} and {other}:\n{text}")
    return same


def _packed_files(path: str) -> list[str]:
    """Raises ValueError where there are none."""
    if not os.path.isdir(path):
        if not path.endswith(PACKED) and os.path.exists(path):
            raise ValueError(f"{path} is not packed; expected a file {PACKED}, or a folder of such")
        return [path]
    paths = [os.path.join(path, name) for name in folders.files_below(path) if name.endswith(PACKED)]
    if not paths:
        raise ValueError(f"{path} has no packed file ({PACKED})")
    return paths


def _without_ending(source: str) -> str:
    if snapshots.is_snapshot(source):
        return snapshots.restored_name(source)
    for ending in (PACKED, _PACKED_FOLDER):
        if source.endswith(ending):
            return source.removesuffix(ending)
    return source


def _require_new(target: str) -> None:
    if os.path.lexists(target):
        raise FileExistsError(f"{target} is there already; name another file, or remove it")


def _require_bases(bases: list[str]) -> None:
    for base in bases:
        if not os.path.exists(base):
            raise FileNotFoundError(f"the base {base} is not there")


def _say(options: argparse.Namespace, message: str) -> None:
    if not options.quiet:
        print(message, file=sys.stderr)
