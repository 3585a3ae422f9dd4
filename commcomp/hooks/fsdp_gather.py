"""Parameter all-gathers of FSDP2 in 8 or 4 bits: what the forward and backward passes see is rounded.

As ZeRO++ (Wang et al. 2023, arXiv:2306.10209) and SDP4Bit (Jia et al. 2024, arXiv:2410.15526) do elsewhere. The sharded
parameters that the optimizer moves stay exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultAllocMixin,
    ProcessGroupAllocAllGather,
)
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from commcomp.compressors import native
from commcomp.compressors.wire import Format, RowFormat
from commcomp.config import Quantized
from commcomp.exchange.agreement import require_agreement_of_all
from commcomp.exchange.exchange import decode, encode, encoded_bytes
from commcomp.exchange.transfer import all_gather
from commcomp.layout import Entry, Spans, row_format
from commcomp.precision import full_precision
from commcomp.sharded_model import chunk_shape, sharded_modules

_EXACT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass
class GatherCompression:
    """What the compressed all-gathers of one model have sent."""

    wire_bytes: int = 0
    """Bytes that this rank has sent."""
    plain_wire_bytes: int = 0
    """Bytes that torch's all-gathers would have sent."""
    memory_bytes: int = 0
    """Bytes kept between gathers: with `difference`, the model as it was last gathered."""


def compress_all_gathers(model: nn.Module, method: Quantized, *, difference: bool = False) -> GatherCompression:
    """Send the parameters of a `fully_shard`ed model in quantised form when they are gathered, frozen ones included.

    Matrices are quantised, vectors go as they are. It changes what the model computes: watch the loss.

    Args:
        model: after `fully_shard`, before training.
        method: bits, block and rotation; `Quantized(bits=8)` is the careful choice.
        difference: quantise what a parameter has moved since it was last gathered. Errors then do not stay but vanish
            with time, and 4 bits will do. It costs a copy of the whole model a rank, so it suits models that fit; the
            backward pass takes its parameters from there and nothing is sent for it.

    Call it on every rank with the same arguments; that is checked by one collective.

    Raises:
        TypeError: for another method.
        ValueError: for stochastic rounding; naming the module, if nothing is sharded, all-gathers are compressed or
            replaced already, or parameters are gathered in another format than fp32 or bf16 (or several in one group);
            or, on every rank, what ranks disagree on.
    """
    counters = GatherCompression()
    places = list(sharded_modules(model))
    if not places:
        raise ValueError("no fully_shard was applied to this model; there are no all-gathers to compress")
    comms: list[_CompressedAllGather] = []
    problem: Exception | None = None
    try:
        if not isinstance(method, Quantized):
            raise TypeError(f"compress_all_gathers got {method!r}; expected commcomp.Quantized(bits=8) or (bits=4)")
        if method.rounding == "stochastic":
            raise ValueError(
                "compress_all_gathers got rounding='stochastic'; parameters are gathered for the forward and again for "
                "the backward pass, which would see other weights: use rounding='nearest'"
            )
        for path, _, param_group in places:
            comms.append(_make(path, param_group, row_format(method), counters, difference=difference))
    except (TypeError, ValueError) as error:  # the other ranks wait for this one: tell them before raising
        problem = error
    _require_agreement(places[0][2], comms, {"method": str(method), "difference": difference}, problem)
    if problem is not None:
        raise problem
    for (_, module, _), comm in zip(places, comms, strict=True):
        module.set_custom_all_gather(comm)
    return counters


def _require_agreement(
    param_group: Any, comms: list[_CompressedAllGather], arguments: dict[str, Any], problem: Exception | None
) -> None:
    facts = {
        "arguments that cannot work": problem and str(problem),
        **arguments,
        "parameters of the groups": [comm.facts for comm in comms],
        "arithmetic": native.arithmetic(param_group.device),
    }
    remedy = "call compress_all_gathers with the same model and arguments, and on like machines, on every rank"
    # Over the replicas too, so that all ranks raise or none.
    groups = reversed(param_group.mesh_info.mesh.get_all_groups())
    require_agreement_of_all([(facts, group) for group in groups], param_group.device, remedy=remedy)


def _make(
    path: str, param_group: Any, format: Format, counters: GatherCompression, *, difference: bool
) -> _CompressedAllGather:
    """The compressed all-gather of one group; raises ValueError if there can be none."""
    if not hasattr(param_group.mesh_info, "shard_process_group"):
        raise ValueError(f"{path!r} is replicated and not sharded; there are no all-gathers to compress")
    present = param_group._all_gather_comm
    if isinstance(present, _CompressedAllGather):
        raise ValueError(f"the all-gathers of {path!r} are compressed already; call compress_all_gathers once a model")
    if type(present) not in (DefaultAllGather, ProcessGroupAllocAllGather):
        raise ValueError(
            f"{path!r} gathers its parameters by set_custom_all_gather({type(present).__name__}); leave that out, "
            "there can be one only"
        )
    dtypes = {_gathered_in(fsdp_param, param_group.mp_policy.param_dtype) for fsdp_param in param_group.fsdp_params}
    if len(dtypes) > 1 or not dtypes <= _EXACT.keys():
        raise ValueError(
            f"the parameters of {path!r} are gathered in {', '.join(sorted(map(str, dtypes)))}; expected torch.float32 "
            "or torch.bfloat16, one in a group: set param_dtype of the MixedPrecisionPolicy"
        )
    return _CompressedAllGather(param_group, dtypes.pop(), format, counters, difference=difference)


def _gathered_in(fsdp_param: Any, requested: torch.dtype | None) -> torch.dtype:
    dtype: torch.dtype = fsdp_param.sharded_param.dtype
    return requested or dtype if dtype.is_floating_point else dtype


class _CompressedAllGather(DefaultAllocMixin, AllGather):
    """torch's all-gather of one group: every rank's piece as bytes, decoded by all alike."""

    def __init__(
        self, param_group: Any, dtype: torch.dtype, format: Format, counters: GatherCompression, *, difference: bool
    ) -> None:
        self._counters, self._difference = counters, difference
        self._param_group = param_group
        self._last: Tensor | None = None
        self._num_ranks = dist.get_world_size(param_group.mesh_info.shard_process_group)
        entries, offset = [], 0
        for fsdp_param in param_group.fsdp_params:
            entries.append(Entry(str(offset), offset, chunk_shape(fsdp_param, self._num_ranks)))
            offset += entries[-1].numel
        self._numel = offset
        self.facts = f"{[entry.shape for entry in entries]} in {dtype}"
        """What is gathered, in a word."""
        by_kind: dict[bool, list[Entry]] = {True: [], False: []}
        for entry in entries:
            by_kind[len(entry.shape) > 1].append(entry)
        formats: dict[bool, Format] = {True: format, False: RowFormat(_EXACT[dtype])}
        self._spans = [Spans(tuple(own), formats[kind]) for kind, own in by_kind.items() if own]

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        if num_ranks != self._num_ranks:  # reshard_after_forward=<int>: what was decoded, from nearer ranks
            self._gather_whole(output_tensor, input_tensor, group)
            return
        if input_tensor.numel() != self._numel:
            raise RuntimeError(f"an all-gather of {input_tensor.numel()} values came; expected {self._numel} a rank")
        whole = output_tensor.view(num_ranks, -1)
        if self._difference and self._last is None:
            self._gather_whole(output_tensor, input_tensor, group)
            self._last = _finite(whole.to(torch.float32, copy=True))
            self._counters.memory_bytes += self._last.nbytes
            return
        self._counters.plain_wire_bytes += (num_ranks - 1) * input_tensor.numel() * input_tensor.element_size()
        if self._last is not None and self._param_group._training_state == TrainingState.PRE_BACKWARD:
            whole.copy_(self._last)  # what the forward pass saw, and nothing has moved since
            return
        values = input_tensor.float()
        if self._last is not None:
            values = values - self._last[rank]
        pieces = self._exchange(values, num_ranks, group)
        for spans, decoded in zip(self._spans, pieces, strict=True):
            if self._last is None:
                spans.scatter(whole, decoded)
            else:
                torch._foreach_add_(spans.slices(self._last), list(spans.split(decoded)))
        if self._last is not None:
            whole.copy_(self._last)
            _finite(self._last)

    def _gather_whole(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup) -> None:
        own = input_tensor.clone()  # torch hands a piece of the output as the input
        dist.all_gather_single(output_tensor, own, group=group)
        num_bytes = (dist.get_world_size(group) - 1) * own.numel() * own.element_size()
        self._counters.wire_bytes += num_bytes
        self._counters.plain_wire_bytes += num_bytes

    def _exchange(self, values: Tensor, num_ranks: int, group: dist.ProcessGroup) -> list[Tensor]:
        """Every rank's values, [ranks, numel] for each of the spans, as all ranks decode them."""
        with full_precision(values.device):  # we are in the user's forward pass, perhaps under autocast
            return self._exchange_exactly(values, num_ranks, group)

    def _exchange_exactly(self, values: Tensor, num_ranks: int, group: dist.ProcessGroup) -> list[Tensor]:
        sections = [spans.section for spans in self._spans]
        own = torch.empty(encoded_bytes(sections), dtype=torch.uint8, device=values.device)
        encode(own, [spans.gather(values).unsqueeze(0) for spans in self._spans], sections, None)
        everyone = own.new_empty(num_ranks, own.numel())
        all_gather(everyone, own, group).wait()
        self._counters.wire_bytes += (num_ranks - 1) * own.numel()
        return [block.squeeze(1) for block in decode(everyone, sections)]


def _finite(last: Tensor) -> Tensor:
    """Zeros for Inf and NaN, in place: a difference from them would never be a number again."""
    return last.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
