"""torch.load of files that may come from anywhere."""

from __future__ import annotations

import io
import re
import zipfile
from typing import Any

import torch

_REASON = re.compile(r"[Uu]nsupported (?:GLOBAL|operand|class|function) .+|GLOBAL .+")


def load(source: str | io.BytesIO) -> Any:
    """What a file of torch.save holds, on the CPU: plain containers, values and tensors.

    Raises ValueError with the reason where it holds more than these, or is damaged; OSError.
    """
    mmap = isinstance(source, str) and zipfile.is_zipfile(source)
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged archives make torch raise all sorts
        text = str(error)
        found = _REASON.search(text)
        # torch's own first line proposes to load it nevertheless
        reason = found[0] if found else "" if "weights_only" in text else text.partition("\n")[0]
        what = "it holds more than plain containers, values and tensors, or is damaged"
        raise ValueError(f"{what} ({reason[:300] or type(error).__name__})") from error
