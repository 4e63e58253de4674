"""The short convolution of a mixer's input on a packed stream that lies on many ranks.

Legend: L tokens of this rank, D channels, w taps, F fragments of this rank.

Each chunk needs the w - 1 tokens before its first from the document that it goes on with: a halo,
which may lie on several ranks if chunks are short. All halos move in one all-to-all, whose sizes
every rank knows from the plan, and their gradients go back the same way.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.checks import expect
from attnlab.distributed.comm import Group
from attnlab.distributed.pack import PackPlan, Span


def short_convolution(x: Tensor, weight: Tensor, plan: PackPlan, group: Group) -> Tensor:
    """This rank's `[L, D]` of y_t = sum over n < w of weight[:, w-1-n] x_{t-n} in each document.

    `x` `[L, D]` are this rank's tokens, `weight` `[D, w]` is the same on all ranks.

    Raises:
        ValueError: for another number of tokens than the plan gives this rank; on all ranks, if
            their plans differ.
    """
    group.check_plan(plan)
    tokens = plan.local_len(group.rank)
    expect(x.ndim == 2 and x.shape[0] == tokens, f"[{tokens}, D] of this rank", list(x.shape))
    gap = weight.shape[1] - 1
    spans = [plan.local(c, s) for c in plan.chunks(group.rank) for s in plan.fragments(c)]
    joined = x.new_zeros(tokens + gap * len(spans), x.shape[1])  # w - 1 places before each fragment
    places = [torch.arange(a, b) + gap * (n + 1) for n, (a, b) in enumerate(spans)]
    index = torch.cat([torch.empty(0, dtype=torch.int64), *places]).to(x.device)
    joined = joined.index_copy(0, index, x)
    if gap and any(plan.continues(chunk) for chunk in range(plan.num_chunks)):
        halo = _Halo.apply(x, plan, group, gap)
        joined = joined.index_copy(0, _halo_places(plan, group.rank, gap).to(x.device), halo)
    if not spans:
        return joined + weight[:0].sum()  # nothing, but a part of the graph as on other ranks
    taps = F.conv1d(joined.mT[None], weight[:, None], groups=x.shape[1])[0].mT
    return taps[index - gap]


class _Halo(torch.autograd.Function):
    """The tokens before each own chunk, `[halo, D]`, chunk after chunk."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: PackPlan, group: Group, gap: int) -> Tensor:
        ctx.rest = plan, group, gap
        ctx.num_tokens = x.shape[0]
        index, sent, received, order = _routes(plan, group.rank, gap)
        rows = group.all_to_all(x[index.to(x.device)], sent, received).wait()
        return rows[order.to(x.device)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        plan, group, gap = ctx.rest
        index, sent, received, order = _routes(plan, group.rank, gap)
        by_rank = torch.empty_like(grad).index_copy(0, order.to(grad.device), grad)
        back = group.all_to_all(by_rank, received, sent).wait()
        total = grad.new_zeros(ctx.num_tokens, grad.shape[1])
        return total.index_add(0, index.to(grad.device), back), None, None, None


def _halo(plan: PackPlan, chunk: int, gap: int) -> Span:
    """Places in the pack of the tokens before a chunk that its convolution needs."""
    lo = plan.bounds[chunk]
    if not plan.continues(chunk):
        return Span(lo, lo)
    return Span(max(plan.document_start(lo), lo - gap), lo)


def _wanted(plan: PackPlan, rank: int, gap: int) -> list[int]:
    """Places in the pack of all tokens of a rank's halos."""
    return [t for chunk in plan.chunks(rank) for t in range(*_halo(plan, chunk, gap))]


def _routes(plan: PackPlan, rank: int, gap: int) -> tuple[Tensor, list[int], list[int], Tensor]:
    """Own tokens to send, in the order of ranks; rows to and from each; where each halo row came."""
    home = torch.empty(plan.num_tokens, dtype=torch.int64)
    place = torch.empty(plan.num_tokens, dtype=torch.int64)
    for owner in range(plan.world_size):
        positions = plan.positions(owner)
        home[positions] = owner
        place[positions] = torch.arange(positions.shape[0])
    wanted = [
        torch.tensor(_wanted(plan, r, gap), dtype=torch.int64) for r in range(plan.world_size)
    ]
    mine = [place[tokens[home[tokens] == rank]] for tokens in wanted]
    sources = home[wanted[rank]]
    received = torch.bincount(sources, minlength=plan.world_size).tolist()
    order = torch.empty_like(sources)
    arrival = sources.argsort(stable=True)
    order[arrival] = torch.arange(arrival.shape[0])
    return torch.cat(mine), [len(x) for x in mine], received, order


def _halo_places(plan: PackPlan, rank: int, gap: int) -> Tensor:
    """Rows of the joined input that the halo's tokens take: the last of the gap before a chunk."""
    places, fragments = [], 0
    for chunk in plan.chunks(rank):
        start = plan.local(chunk, plan.first_fragment(chunk)).start + gap * (fragments + 1)
        length = _halo(plan, chunk, gap).length
        places.append(torch.arange(start - length, start))
        fragments += len(plan.fragments(chunk))
    return torch.cat([torch.empty(0, dtype=torch.int64), *places])
