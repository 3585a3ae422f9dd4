"""Which tokens of a pass form clusters, by the settings of `LSH` and what they have been made to by the rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from commcomp.compressors.clusters import FoundClusters, clusters_by_key, clusters_of_leaders
from commcomp.compressors.nearest import nearest_leaders
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
        centred = rows.float() - centres.index_select(0, experts)
        reach = None
        if (farthest := self._farthest()) is not None:
            reach = torch.linalg.vecdot(centred, centred) * farthest**2
        hashing = self._hasher(rows.shape[1])
        if self._lsh.search == "hash":
            return clusters_by_key(rows, experts, hashing.keys(centred, experts), counts, reach)
        assert reach is not None
        leaders = nearest_leaders(hashing.turned(centred), experts, counts, reach)
        return clusters_of_leaders(rows, experts, leaders, counts, reach)

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
