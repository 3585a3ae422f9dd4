"""Runs a script with commcomp in every DeepSpeed engine whose configuration asks for it.

    torchrun --nproc-per-node 2 -m commcomp.deepspeed train.py --deepspeed ds_config.json
    deepspeed --module commcomp.deepspeed train.py --deepspeed_config ds_config.json
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
    script = next((index for index, value in enumerate(arguments) if not value.startswith("--")), None)
    if script is None:
        raise SystemExit("usage: python -m commcomp.deepspeed SCRIPT [ARGUMENT ...]")
    path = arguments[script]
    if not os.path.isfile(path):
        raise SystemExit(f"commcomp.deepspeed: there is no script {path!r}")
    sys.argv = [path, *arguments[:script], *arguments[script + 1 :]]
    sys.path[0] = os.path.dirname(os.path.abspath(path))
    install()
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    main()
