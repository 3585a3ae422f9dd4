"""Fuzzes the reader of snapshot files: python -m tests.checkpoint.fuzz.fuzz_files FOLDER [libFuzzer's options]"""

from __future__ import annotations

import gc
import sys
from types import FunctionType

import atheris

from tests.checkpoint.fuzz.files import outcome


def check(data: bytes) -> None:
    outcome(data)


if __name__ == "__main__":
    # An editable installation has an importer of its own, which atheris does not instrument.
    for found in gc.get_objects():
        if type(found) is FunctionType and str(found.__module__).startswith("commcomp.checkpoint"):
            atheris.instrument_func(found)
    # libFuzzer starts itself again by this name when it merges.
    atheris.Setup([f"{sys.executable} -m tests.checkpoint.fuzz.fuzz_files", *sys.argv[1:]], check)
    atheris.Fuzz()
