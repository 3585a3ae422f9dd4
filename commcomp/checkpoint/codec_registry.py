"""Which decoder reads a method, and which encoder serves a mode of the store. Codecs put themselves in here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from commcomp.checkpoint.codec import float_tensor, lattice, planes
from commcomp.checkpoint.codec.lossless import LosslessEncoder
from commcomp.checkpoint.codec.lossy import QUALITIES, LossyEncoder
from commcomp.checkpoint.codec.native import CODERS, FAST
from commcomp.checkpoint.coded import ChunkDecoder, SnapshotEncoder
from commcomp.checkpoint.exact_codec import ExactEncoder, decode_raw, decode_same

EncoderFactory = Callable[[int, str], SnapshotEncoder]  # the arguments: threads, coder

decoders: dict[str, ChunkDecoder] = {
    "raw": decode_raw,
    "same": decode_same,
    float_tensor.METHOD: float_tensor.decode_chunk,
    lattice.METHOD: lattice.decode_chunk,
    planes.METHOD: planes.decode_chunk,
}

encoders: dict[str, EncoderFactory] = {
    "lossless": LosslessEncoder,
    **{mode: partial(LossyEncoder, quality) for mode, quality in QUALITIES.items()},
    "stored": lambda threads, coder: ExactEncoder(threads),
}


def encoder_for(mode: str, threads: int, coder: str = FAST) -> SnapshotEncoder:
    """A new encoder of `mode` with one of CODERS. Raises ValueError naming the modes, or coders, there are."""
    if mode not in encoders:
        raise ValueError(f"mode={mode!r}; expected one of {', '.join(map(repr, encoders))}")
    if coder not in CODERS:
        raise ValueError(f"coder={coder!r}; expected one of {', '.join(map(repr, CODERS))}")
    return encoders[mode](threads, coder)
