"""The command line: commcomp ckpt pack, unpack, info, verify, diff."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from commcomp.checkpoint import codec_registry
from commcomp.checkpoint.codec.native import CODERS, FAST
from commcomp.checkpoint.command_line import actions
from commcomp.checkpoint.errors import SnapshotError
from commcomp.checkpoint.parallel import default_threads
from commcomp.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 where verify found damage or diff a difference, 2 for an error, told on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return options.action(options)
    except (SnapshotError, ValueError, TypeError, OSError, ImportError) as error:
        print(f"commcomp ckpt {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="commcomp")
    parser.add_argument("--version", action="version", version=__version__)
    checkpoints = parser.add_subparsers(required=True).add_parser("ckpt", help="checkpoint files and folders")
    commands = checkpoints.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=_positive, default=default_threads(), help="default: the cores, at most 8")
    common.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    base = "file or folder that it is coded against; more for a packed one that has a base itself"
    common.add_argument("--base", action="append", default=[], help=base)

    what = "make .pt, .safetensors and .distcp files, or a folder, small"
    pack = commands.add_parser("pack", parents=[common], help=what)
    pack.add_argument("input")
    pack.add_argument("output", nargs="?", help="default: the input's name and .ccsnap, of a folder and .packed")
    pack.add_argument("--coder", default=FAST, choices=CODERS, help="max: a little smaller, many times slower")
    pack.add_argument("--mode", default="lossless", choices=sorted(codec_registry.encoders))
    pack.set_defaults(action=actions.pack)

    unpack = commands.add_parser("unpack", parents=[common], help="restore what was packed, a store's snapshot as .pt")
    unpack.add_argument("input")
    name = "default: the input's name without .ccsnap or .packed, a snapshot's with .pt"
    unpack.add_argument("output", nargs="?", help=name)
    unpack.set_defaults(action=actions.unpack)

    info = commands.add_parser("info", help="what packed files hold, without reading them")
    info.add_argument("input")
    info.set_defaults(action=actions.info)

    verify = commands.add_parser("verify", parents=[common], help="decode and compare every hash")
    verify.add_argument("input")
    verify.set_defaults(action=actions.verify)

    diff = commands.add_parser("diff", parents=[common], help="compare two files or folders, packed or not")
    diff.add_argument("first")
    diff.add_argument("second")
    diff.set_defaults(action=actions.diff)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}; expected at least 1")
    return value
