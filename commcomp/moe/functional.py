"""torch's differentiable all-to-all with compressed rows, for token dispatchers that call it."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from commcomp.moe.row_exchange import Route, ToExperts, Traffic
from commcomp.moe.settings import Quantized


class RowAllToAll:
    """Stands for `torch.distributed._functional_collectives.all_to_all_single_autograd`: rows and their gradients
    cross in the number format of `quantized`.

    `all_to_all = RowAllToAll(Quantized(dtype="int8"))`, then the same call. The result is a plain tensor that has
    arrived. While `enabled` is False rows travel as they are.
    """

    def __init__(self, quantized: Quantized) -> None:
        if not isinstance(quantized, Quantized):
            raise TypeError(f"RowAllToAll got {quantized!r}; expected commcomp.moe.Quantized(...)")
        self.quantized, self.enabled = quantized, True
        self.traffic = Traffic()

    def __call__(
        self,
        rows: Tensor,
        output_split_sizes: list[int] | None,
        input_split_sizes: list[int] | None,
        group: dist.ProcessGroup | DeviceMesh | str,
        tag: str = "",
    ) -> Tensor:
        """`rows`: floating point [n, ...]; what is behind the first dimension is one row, with its own scale.

        `input_split_sizes`: rows for each rank, `output_split_sizes`: from each; None: equally many. Returns
        [sum of output_split_sizes, ...]. Raises ValueError for sizes that do not fit, TypeError for
        rows of whole numbers.
        """
        if not rows.is_floating_point():
            raise TypeError(f"RowAllToAll got rows of {rows.dtype}; expected floating point, others by torch's own")
        process_group = _process_group(group)
        ranks = dist.get_world_size(process_group)
        if (output_split_sizes is None) != (input_split_sizes is None):
            raise ValueError("one of output_split_sizes and input_split_sizes is None; expected both or neither")
        if input_split_sizes is None or output_split_sizes is None:
            if len(rows) % ranks:
                raise ValueError(f"{len(rows)} rows cannot be split evenly over {ranks} ranks; give both split sizes")
            input_split_sizes = output_split_sizes = [len(rows) // ranks] * ranks
        if len(input_split_sizes) != ranks or len(output_split_sizes) != ranks or sum(input_split_sizes) != len(rows):
            raise ValueError(
                f"split sizes are {input_split_sizes} and {output_split_sizes} for {len(rows)} rows; expected {ranks} "
                "each, the first adding to the number of rows"
            )
        forward = backward = None
        if self.enabled:
            forward, backward = self.quantized.forward_format(), self.quantized.backward_format()
        sent, received = ([[count] for count in sizes] for sizes in (input_split_sizes, output_split_sizes))
        route = Route(
            process_group, sent, received, forward, backward, input_split_sizes, output_split_sizes, self.traffic
        )
        arrived, _ = ToExperts.apply(rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1), route)
        return arrived.view(len(arrived), *rows.shape[1:])


def _process_group(group: dist.ProcessGroup | DeviceMesh | str) -> dist.ProcessGroup:
    if isinstance(group, DeviceMesh):
        return group.get_group()
    return _resolve_process_group(GroupName(group)) if isinstance(group, str) else group
