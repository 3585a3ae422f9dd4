"""Tokens to their experts on other ranks, and the experts' answers back."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from commcomp.compressors.clusters import Clusters
from commcomp.exchange.transfer import all_to_all_uneven
from commcomp.moe.compressor import TokenCompressor
from commcomp.moe.row_exchange import FromExperts, Route, ToExperts, Traffic
from commcomp.moe.terms import Terms
from commcomp.moe.token_clusters import Centroids, Expanded, Repeated


@dataclass(frozen=True)
class Dispatched:
    """What this rank's experts are to work on."""

    rows: Tensor
    """[r, width]: by expert, and in each by the rank that they come from."""
    rows_per_expert: list[int]
    """Rows of each expert of this rank."""
    way_back: WayBack


@dataclass(frozen=True)
class WayBack:
    """What `combine` needs of `dispatch`."""

    route: Route
    tie: Tensor
    asks: bool
    """Rows have no gradient but answers may have: `combine` asks all ranks."""
    clusters: Clusters | None
    centroids: Tensor | None
    tokens: Tensor | None
    """None: what they differ from the centroids by is left out."""
    apart: Tensor | None
    """None: it is not added to the answers."""


def dispatch(
    rows: Tensor,
    rows_per_expert: Tensor,
    compressor: TokenCompressor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Dispatched:
    """Send rows to the ranks of their experts; a collective, forward and backward.

    `rows`: floating point [n, width], those of expert 0 first, then of 1, ...; for `LSH` in decoders those of an expert
    in the order of time, so that no token sees a later one. `rows_per_expert`: int64 [experts], on the device of
    `rows`; the experts are dealt out evenly over the ranks of `group` (None: all ranks; without torch.distributed this
    process), in order. One wait of the host for the device. Raises ValueError for shapes that do not fit, and on every
    rank where ranks send differently (settings, widths, dtypes, training or evaluation).
    """
    group = group_or_all(group)
    ranks = 1 if group is None else dist.get_world_size(group)
    _require_fitting(rows, rows_per_expert, ranks)
    num_experts = len(rows_per_expert)
    terms = Terms(rows, num_experts, compressor, group)
    terms.agree_at_first()
    experts = torch.arange(num_experts, device=rows.device)
    experts = experts.repeat_interleave(rows_per_expert, output_size=len(rows))
    found = compressor.find(rows.detach(), experts, rows_per_expert) if compressor else None
    counts = rows_per_expert if found is None else found.per_expert
    route = _route(counts, rows_per_expert, terms)
    if compressor is not None:  # only now it is sure that all ranks are in the same pass
        compressor.learn(rows.detach(), experts, rows_per_expert, found, group)
    clusters = centroids = apart = None
    sent, compensated = rows, False
    if found is not None and compressor is not None and compressor.lsh is not None:
        clusters = found.counted(sum(map(sum, route.sent)))
        lsh = compressor.lsh
        sent = centroids = Centroids.apply(rows, clusters, lsh.centroid == "mean", lsh.compensate != "both")
        if lsh.compensate == "both":
            apart = rows.detach() - clusters.spread(centroids.detach())
        compensated = lsh.compensate != "none"
    received, tie = ToExperts.apply(sent, route)
    asks = torch.is_grad_enabled() and not tie.requires_grad  # the same on every rank, by `terms`
    if asks:
        tie.requires_grad_()
    way_back = WayBack(route, tie, asks, clusters, centroids, rows if compensated else None, apart)
    return Dispatched(received, route.rows_per_expert, way_back)


def combine(answers: Tensor, dispatched: Dispatched) -> Tensor:
    """Send what the experts made of `dispatched.rows` back: [n, width] in the order of the rows that were dispatched.

    `answers`: [r, width], in the order of `dispatched.rows`; they travel and come back in the dtype of these. A
    collective, forward and backward: if the rows that were dispatched or any rank's answers have a gradient, what comes
    back has one on every rank, and every rank's loss must be made of it. Experts that got no rows may be left out; no
    answers at all are [0, width]. Where the rows have no gradient, a rank without one waits to hear of the others'.
    """
    back = dispatched.way_back
    if len(answers) != len(dispatched.rows):
        raise ValueError(f"answers are {tuple(answers.shape)}; expected {len(dispatched.rows)} rows, as dispatched")
    if back.tokens is not None and answers.shape[1] != back.tokens.shape[1]:
        raise ValueError(
            f"experts made rows of {answers.shape[1]} values of rows of {back.tokens.shape[1]}; expected as many, or "
            "LSH(compensate='none')"
        )
    # Ranks agree on the dtype of rows; that of answers, with autocast, may depend on whether there were any.
    answers = answers.to(dispatched.rows.dtype)
    returned = FromExperts.apply(answers, back.tie, back.route, answers.requires_grad if back.asks else None)
    if back.clusters is None:
        return returned
    if back.tokens is None:
        return Repeated.apply(returned, back.clusters)
    return Expanded.apply(returned, back.centroids, back.tokens, back.apart, back.clusters)


def _require_fitting(rows: Tensor, rows_per_expert: Tensor, ranks: int) -> None:
    expected = "expected floating-point [n, width] and int64 [experts]"
    fits = rows.dim() == 2 and rows.is_floating_point() and rows_per_expert.dim() == 1 and len(rows_per_expert)
    if not fits or rows_per_expert.dtype != torch.int64:
        found = " and ".join(f"{one.dtype} {tuple(one.shape)}" for one in (rows, rows_per_expert))
        raise ValueError(f"rows and rows_per_expert are {found}; {expected}")
    if len(rows_per_expert) % ranks:
        raise ValueError(
            f"{len(rows_per_expert)} experts cannot be dealt out evenly over {ranks} ranks; give a multiple of it"
        )
    if rows_per_expert.device.type == "cpu":
        counts = rows_per_expert.tolist()
        if sum(counts) != len(rows) or min(counts) < 0:
            raise ValueError(f"rows_per_expert is {counts} for {len(rows)} rows; expected numbers that add to that")


def group_or_all(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """`group`, or all ranks; None where there is no torch.distributed: this process alone."""
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    return group


def _route(counts: Tensor, tokens: Tensor, terms: Terms) -> Route:
    """Tell each rank how many rows come to each of its experts, for how many tokens; and of this rank's total.

    `counts`, `tokens`: int64 [experts], rows and tokens of this rank.
    """
    ranks, compressor = terms.ranks, terms.compressor
    traffic = compressor.traffic if compressor and compressor.active else Traffic()
    own = torch.stack((counts.sum(), tokens.sum(), torch.full_like(counts[0], terms.fingerprint))).expand(ranks, 3)
    message = torch.cat((counts.view(ranks, -1), tokens.view(ranks, -1).sum(1, keepdim=True), own), 1)
    answer = message
    if terms.group is not None:
        answer = torch.empty_like(message)
        sizes = [8 * message.shape[1]] * ranks
        traffic.wire_bytes += sum(sizes[1:])
        data, out = (one.view(-1).view(torch.uint8) for one in (message, answer))
        all_to_all_uneven(out, sizes, data, sizes, terms.group).wait()
    told, heard = torch.stack((message, answer)).tolist()  # the one wait for the device
    if any(one[-1] != terms.fingerprint for one in heard):
        terms.agree()
    if compressor is not None:
        compressor.sent(sum(one[-3] for one in heard), sum(one[-2] for one in heard))
    (sent, for_tokens), (received, of_tokens) = (_parted(side) for side in (told, heard))
    formats = compressor.formats if compressor else (None, None)
    mark = zlib.crc32(repr([one[-3] for one in heard]).encode())
    return Route(terms.group, sent, received, *formats, for_tokens, of_tokens, traffic, mark)


def _parted(side: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    return [one[:-4] for one in side], [one[-4] for one in side]
