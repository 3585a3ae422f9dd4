"""What `strict` means: a misconfiguration raises, or is said once as a warning, at the user's own line if there is one.

Hooks run below torch's frames, or on a worker thread: those are never what a warning should name.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings

import torch

_OUR_FILES = os.path.dirname(__file__) + os.sep
_NOT_THE_USERS = (_OUR_FILES, os.path.dirname(torch.__file__) + os.sep, threading.__file__)


def complain(message: str, *, strict: bool, error: type[Exception] = ValueError, unless: str = "") -> None:
    """Raise `error(message)` under `strict`, with the way out; otherwise warn of the same.

    `unless`: in which case strict=False is the right answer, where there is one ("they are its ignored_params").
    """
    if strict:
        raise error(f"{message}, or{f', if {unless},' if unless else ''} pass strict=False")
    warn(message)


def warn(message: str) -> None:
    """A warning that names the innermost line of the user's, or one of commcomp's where none led to it."""
    warnings.warn(message, stacklevel=_users_level() or 2)


def _users_level() -> int:
    """The `stacklevel`, for who called this function, of the innermost frame of the user's; 0 without one."""
    frame, level = sys._getframe(1), 1
    while frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        if frame.f_back is None:
            return 0
        frame, level = frame.f_back, level + 1
    return level
