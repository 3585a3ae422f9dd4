"""The largest values of each row and where they lie (compressors/sparsify.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from commcomp.compressors import sparsify
from commcomp.compressors.native_codecs import SparseCode, places
from commcomp.compressors.wire import Format, RowFormat, aligned
from commcomp.compressors.wire_blocks import BlockFormat

_ROOM = 1.1
"""Places a row has over those asked for: a threshold from a sample lets through a few percent more or fewer."""
_VALUE_BLOCK = 64
_TYPICAL = 1 << 20

_VALUE_FORMATS: dict[str, Format] = {
    "fp32": RowFormat("fp32"),
    "bf16": RowFormat("bf16"),
    "int8": BlockFormat(8, _VALUE_BLOCK),
}


@dataclass(frozen=True)
class SparseFormat(Format):
    """About `density` of each row's values, the largest ones; the others decode to 0.

    A row of n values with room for c = 1.1 density n takes c bytes of offsets and n / 256 of counts, or a bitmap of
    n / 8 where that is smaller, and c values of `values` format. A row that holds Inf or NaN has at least one NaN when
    it is decoded.
    """

    density: float
    values: str = "bf16"
    """fp32, bf16, or int8 with a bf16 scale for every 64 values."""

    def encoded_bytes(self, rows: int, length: int) -> int:
        capacity = self.capacity(length)
        return rows * (self._index_bytes(length, capacity) + self._value_format.encoded_bytes(1, capacity))

    def capacity(self, length: int) -> int:
        """Places for values in a row."""
        return min(length, int(self.density * _ROOM * length) + 1)

    def encode_into(self, out: Tensor, values: Tensor, generator: torch.Generator | None = None) -> None:
        pieces = out.unflatten(-1, (values.shape[-2], -1))
        for place in places(values.shape[:-1]):
            self._encode_row(pieces[place], values[place])

    def decode(self, data: Tensor, rows: int, length: int) -> Tensor:
        pieces = data.unflatten(-1, (rows, -1))
        out = torch.empty(*pieces.shape[:-1], length, device=data.device)
        for place in places(pieces.shape[:-1]):
            self._decode_row(out[place], pieces[place].unsqueeze(0))
        return out

    def decode_mean(self, data: Tensor, rows: int, length: int) -> Tensor:
        pieces = data.unflatten(-1, (rows, -1))
        out = torch.empty(rows, length, device=data.device)
        for row in range(rows):
            self._decode_row(out[row], pieces[:, row])
        return out

    def subtract_decoded(self, out: Tensor, total: Tensor, data: Tensor, rows: int, length: int) -> None:
        pieces = data.unflatten(-1, (rows, -1))
        for place in places(pieces.shape[:-1]):
            if not self._decode_natively(out[place], pieces[place].unsqueeze(0), total[place]):
                decoded = torch.empty(length, device=data.device)
                self._decode_row(decoded, pieces[place].unsqueeze(0))
                torch.sub(total[place], decoded, out=out[place])

    def of_mean(self, num_ranks: int) -> Format:
        """Room for what all ranks chose, should they have chosen differently; whole rows where that is smaller."""
        union = replace(self, density=min(1.0, self.density * num_ranks))
        whole = self._value_format
        return union if union.encoded_bytes(1, _TYPICAL) < whole.encoded_bytes(1, _TYPICAL) else whole

    def _encode_row(self, out: Tensor, row: Tensor) -> None:
        length = row.numel()
        threshold = sparsify.magnitude_threshold(row, max(1, round(self.density * length)))
        code = self._code(length)
        chosen = code.select(out, row, threshold)
        if chosen is None:
            chosen = self._select(out, row, threshold, code)
        self._value_format.encode_into(out[self._index_bytes(length, code.capacity) :], chosen.unsqueeze(0))

    def _select(self, out: Tensor, row: Tensor, threshold: Tensor, code: SparseCode) -> Tensor:
        """`SparseCode.select` by torch's operations."""
        length, capacity = row.numel(), code.capacity
        positions = sparsify.select(row, threshold, capacity, by_offsets=code.counts > 0)
        used = positions < length
        chosen = torch.where(used, row[positions.clamp_max(length - 1)], 0.0)
        # What is not finite may be past the places there are: then it must show in what is sent all the same.
        chosen[0] = torch.where(row.abs().amax().isfinite(), chosen[0], torch.nan)
        if not code.counts:
            mask = torch.zeros(length + 1, dtype=torch.bool, device=row.device)
            mask[positions] = True
            packed = sparsify.pack_bitmap(mask[:-1])
            out[: packed.numel()] = packed
        else:
            counts, offsets = sparsify.encode_positions(positions, length)
            out[: counts.numel()] = counts
            out[counts.numel() : counts.numel() + capacity] = offsets
        return chosen

    def _decode_row(self, out: Tensor, data: Tensor) -> None:
        """out, fp32 [length] = the mean of encoded rows, uint8 [N, bytes], added in rank order."""
        if not self._decode_natively(out, data):
            out.zero_()
            for one in data:  # the positions of one rank are all different
                self._add_row(out, one)
            out /= len(data)

    def _decode_natively(self, out: Tensor, data: Tensor, total: Tensor | None = None) -> bool:
        """As `_decode_row`, or with `total`, total minus it; False, and nothing done, where that cannot be."""
        code = self._code(out.numel())
        if not code.usable(out, data, total):
            return False
        values = self._value_format.decode(data[:, self._index_bytes(code.length, code.capacity) :], 1, code.capacity)
        code.decode(out, data, values.squeeze(1), total)
        return True

    def _code(self, length: int) -> SparseCode:
        capacity = self.capacity(length)
        return SparseCode(length, capacity, 0 if self._by_bitmap(length, capacity) else sparsify.num_blocks(length))

    def _add_row(self, out: Tensor, data: Tensor) -> None:
        length = out.numel()
        capacity = self.capacity(length)
        if self._by_bitmap(length, capacity):
            mask = sparsify.unpack_bitmap(data[: -(-length // 8)], length)
            positions = torch.nonzero_static(mask, size=capacity, fill_value=length).view(-1)
        else:
            blocks = sparsify.num_blocks(length)
            positions = sparsify.decode_positions(data[:blocks], data[blocks : blocks + capacity], length)
        values = self._value_format.decode(data[self._index_bytes(length, capacity) :], 1, capacity)[0]
        # Unused places hold `length`: they add their zero to the last value.
        out.scatter_add_(0, positions.clamp_max(length - 1), torch.where(positions < length, values, 0.0))

    def _index_bytes(self, length: int, capacity: int) -> int:
        if self._by_bitmap(length, capacity):
            return aligned(-(-length // 8))
        return aligned(sparsify.num_blocks(length) + capacity)

    @staticmethod
    def _by_bitmap(length: int, capacity: int) -> bool:
        return -(-length // 8) < sparsify.num_blocks(length) + capacity

    @property
    def _value_format(self) -> Format:
        return _VALUE_FORMATS[self.values]
