"""Which tokens of a pass form clusters, by the settings of `LSH` and what they have been made to by the rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from commcomp.compressors.clusters import FoundClusters, clusters_by_key, clusters_of_leaders
from commcomp.compressors.nearest import nearest_leaders
from commcomp.compressors.row_pieces import by_pieces, squared_lengths_
from commcomp.compressors.token_hash import TokenHash, most_coords
from commcomp.moe.rate_control import HashControl, ReachControl
from commcomp.moe.settings import LSH


class Grouping:
    """Finds clusters; `control` changes what it goes by, None keeps it as the settings say."""

    def __init__(self, lsh: LSH) -> None:
        self._lsh = lsh
        self.control: HashControl | ReachControl | None = None
        if lsh.rate is not None and lsh.search == "hash":
            self.control = HashControl(lsh.rate)
        elif lsh.rate is not None and lsh.farthest is not None:
            self.control = ReachControl(lsh.rate, lsh.farthest)
        self._hash: TokenHash | None = None

    def find(self, rows: Tensor, experts: Tensor, counts: Tensor, centres: Tensor) -> FoundClusters:
        """`rows`: [n, width], by expert; `experts`: int64 [n]; `counts`: int64 [experts]; `centres`: fp32 [experts,
        width], about what each expert's rows are."""
        hashing, by_hash, farthest = self._hasher(rows.shape[1]), self._lsh.search == "hash", self._farthest()

        def prepared(some: Tensor, their_experts: Tensor) -> list[Tensor]:
            centred = centres.index_select(0, their_experts)
            torch.sub(some.float(), centred, out=centred)
            turned = hashing.keys(centred, their_experts) if by_hash else hashing.turned(centred)
            return [turned] if farthest is None else [turned, squared_lengths_(centred) * farthest**2]

        turned, *reaches = by_pieces(prepared, rows, experts)
        reach = reaches[0] if reaches else None
        if by_hash:
            return clusters_by_key(rows, experts, turned, counts, reach)
        assert reach is not None
        return clusters_of_leaders(rows, experts, nearest_leaders(turned, experts, counts, reach), counts, reach)

    def _farthest(self) -> float | None:
        return self.control.value if isinstance(self.control, ReachControl) else self._lsh.farthest

    def _hasher(self, width: int) -> TokenHash:
        hashes, coords = 1, self._lsh.coords
        if isinstance(self.control, HashControl):
            hashes, coords = self.control.shape(width)
        elif self._lsh.search == "hash":
            hashes = self._lsh.hashes
        coords = min(coords, most_coords(width, hashes))
        if self._hash is None or (self._hash.hashes, self._hash.coords) != (hashes, coords):
            self._hash = TokenHash(width, hashes, coords, self._lsh.seed)
        return self._hash

    def stats(self) -> dict[str, Any]:
        """hashes, coords, farthest as they are now; None before the first pass."""
        made = self._hash
        hashes = made.hashes if made and self._lsh.search == "hash" else None
        return {"hashes": hashes, "coords": made.coords if made else None, "farthest": self._farthest()}
