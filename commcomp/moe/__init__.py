"""Compression of the tokens that an expert-parallel Mixture-of-Experts layer sends between ranks."""

from commcomp.moe.compressor import TokenCompressor, compressing
from commcomp.moe.dispatching import Dispatched, combine, dispatch
from commcomp.moe.functional import RowAllToAll
from commcomp.moe.layer import MoELayer, clip_grad_norm_, local_experts_of
from commcomp.moe.settings import LSH, MoEConfig, Quantized

__all__ = [
    "LSH",
    "Dispatched",
    "MoEConfig",
    "MoELayer",
    "Quantized",
    "RowAllToAll",
    "TokenCompressor",
    "clip_grad_norm_",
    "combine",
    "compressing",
    "dispatch",
    "local_experts_of",
]
