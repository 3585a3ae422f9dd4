"""Runs a script with commcomp in every DeepSpeed engine whose configuration asks for it.

    torchrun --nproc-per-node 2 -m commcomp.deepspeed train.py --deepspeed ds_config.json
    deepspeed --module commcomp.deepspeed train.py --deepspeed_config ds_config.json

A module in place of the script: `-m commcomp.deepspeed -m package.train`.
"""

from __future__ import annotations

import os
import runpy
import sys

from commcomp.deepspeed.attaching import install


def main() -> None:
    """The command line."""
    arguments = sys.argv[1:]
    # DeepSpeed's launcher puts --local_rank first.
    own = next((index for index, value in enumerate(arguments) if value == "-m" or not value.startswith("-")), None)
    is_module = own is not None and arguments[own] == "-m"
    if own is None or len(arguments) == own + is_module:
        raise SystemExit("usage: python -m commcomp.deepspeed {SCRIPT | -m MODULE} [ARGUMENT ...]")
    script = arguments[own + is_module]
    sys.argv = [script, *arguments[:own], *arguments[own + is_module + 1 :]]
    if is_module:
        install()
        runpy.run_module(script, run_name="__main__", alter_sys=True)
        return
    if not os.path.isfile(script):
        raise SystemExit(f"commcomp.deepspeed: there is no script {script!r}")
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    install()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
