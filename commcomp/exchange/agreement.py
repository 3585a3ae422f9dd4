"""One checked exchange at construction: ranks that disagree find out together instead of hanging later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

SAME_ARGUMENTS = "construct GradientSync with the same model and settings, and on like machines, on every rank"


def require_agreement(
    facts: Mapping[str, Any], group: dist.ProcessGroup, device: torch.device, *, remedy: str = SAME_ARGUMENTS
) -> None:
    """Raise the same ValueError on every rank unless `facts` (JSON-able) is equal on all ranks of `group`.

    The error names the first fact that differs, the ranks and their values, and the `remedy`.
    """
    encoded = json.dumps(facts, sort_keys=True, default=str).encode()
    digest = torch.frombuffer(bytearray(hashlib.sha256(encoded).digest()), dtype=torch.uint8).to(device)
    digests = [torch.empty_like(digest) for _ in range(dist.get_world_size(group))]
    dist.all_gather(digests, digest, group=group)
    if all(torch.equal(other, digests[0]) for other in digests):
        return
    everyone = _gather_bytes(encoded, group, device)
    found = [json.loads(text) for text in everyone]
    raise ValueError(_describe_difference(found, dist.get_process_group_ranks(group), remedy))


def require_agreement_of_all(
    facts_by_group: Sequence[tuple[Mapping[str, Any], dist.ProcessGroup]],
    device: torch.device,
    *,
    remedy: str = SAME_ARGUMENTS,
) -> None:
    """`require_agreement` over one group after another, as over replicas and then over shards: all ranks raise or none.

    What ranks disagree on in one group counts as a fact in the next ones.
    """
    problem: ValueError | None = None
    for facts, group in facts_by_group:
        try:
            facts = {**facts, "agreement of other groups": problem and str(problem)}
            require_agreement(facts, group, device, remedy=remedy)
        except ValueError as error:
            problem = problem or error
    if problem is not None:
        raise problem


def _gather_bytes(data: bytes, group: dist.ProcessGroup, device: torch.device) -> list[bytes]:
    num_ranks = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(num_ranks)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device), group=group)
    longest = max(int(size) for size in sizes)
    padded = torch.frombuffer(bytearray(data.ljust(longest, b" ")), dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(padded) for _ in range(num_ranks)]
    dist.all_gather(gathered, padded, group=group)
    return [bytes(block.cpu().numpy()[: int(size)]) for block, size in zip(gathered, sizes, strict=True)]


def _describe_difference(everyone: list[dict[str, Any]], ranks: Sequence[int], remedy: str) -> str:
    """`ranks`: the numbers in the whole world of those whose facts `everyone` lists."""
    for key in everyone[0]:
        values = [facts.get(key) for facts in everyone]
        odd = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if odd is not None:
            first, other = _first_difference(values[0], values[odd])
            return (
                f"ranks disagree on {key}: rank {ranks[0]} has {first}, rank {ranks[odd]} has {other}; "
                f"{remedy}"
            )
    return "ranks disagree on the set of settings; run the same version of commcomp on every rank"


def _first_difference(left: Any, right: Any) -> tuple[Any, Any]:
    """The smallest differing part of two JSON values, so that the message stays short."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in [*left, *right]:
            if left.get(key) != right.get(key):
                inner_left, inner_right = _first_difference(left.get(key), right.get(key))
                return f"{key}={inner_left}", f"{key}={inner_right}"
    if isinstance(left, list) and isinstance(right, list):
        for index in range(max(len(left), len(right))):
            inner = [side[index] if index < len(side) else None for side in (left, right)]
            if inner[0] != inner[1]:
                return _first_difference(*inner)
    return left, right
