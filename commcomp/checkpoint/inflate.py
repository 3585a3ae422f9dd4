"""Unpacking of zlib streams whose length is declared beforehand."""

from __future__ import annotations

import zlib


def inflate(data: bytes | memoryview, num_bytes: int) -> bytes:
    """A zlib stream of exactly `num_bytes`; never more memory than that. Raises ValueError for any other."""
    inflater = zlib.decompressobj()
    try:
        # zlib multiplies by 1032 at most, so a bare claim of gigabytes takes no memory.
        result = inflater.decompress(data, num_bytes + 1) if num_bytes <= 1040 * len(data) else b""
    except zlib.error as error:
        raise ValueError(f"the zlib stream cannot be read ({error})") from error
    if len(result) != num_bytes or not inflater.eof or inflater.unused_data:
        raise ValueError(f"the zlib stream does not hold exactly {num_bytes} bytes")
    return result
