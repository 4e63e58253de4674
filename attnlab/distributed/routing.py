"""Which expert takes which token, decided once a pass over the tokens of all ranks together.

Legend: N tokens of this rank, D hidden size, E experts, k experts a token, m runs of a rank.

Drops are decided before the tokens are cut into groups and do not depend on how many there are: an
extra all-gather of counts gives every slot its number among all ranks' slots of the same expert
(MiniMax-01's global router, arXiv 2501.08313, section 2.1.2), and slots from the capacity on are
dropped. Slots are numbered in the order of the pack's tokens, wherever those lie: counts are those of
runs, tokens of a rank that follow each other in the pack, so that what is dropped is what one
process drops.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.checks import expect
from attnlab.distributed.comm import Group, sum_over_ranks
from attnlab.distributed.pack import Span
from attnlab.model.moe import RouterLoad


class Routing(NamedTuple):
    """Of each token the chosen experts `[N, k]`, their weights, and whether they have room."""

    experts: Tensor
    weights: Tensor
    kept: Tensor


def route(
    x: Tensor,
    weight: Tensor,
    num_chosen: int,
    tokens: Group,
    *,
    capacity_factor: float | None = None,
    runs: Sequence[Sequence[Span]] | None = None,
) -> tuple[Routing, RouterLoad]:
    """The best experts of `[N, D]`, and how all ranks' tokens spread over the experts.

    The load's mean probabilities carry gradients to all ranks' tokens: a loss of it counts once if
    every rank adds its share 1 / ranks of it.

    Args:
        x: this rank's tokens.
        weight: `[E, D]`, the router's.
        num_chosen: experts a token.
        tokens: the ranks that route together.
        capacity_factor: of the mean number of slots of an expert, which it has room for; None is all.
        runs: of each rank of `tokens`, the spans of the pack that its tokens are, the same on all
            ranks; None where the tokens come in the order of the ranks.

    Raises:
        ValueError: for runs of another number of ranks, or of tokens.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(x.to(wide), weight.to(wide))  # [N, E]
    best, experts = logits.topk(num_chosen, dim=-1)
    lengths, starts = _lengths_and_starts(runs, tokens, x.shape[0])
    num_experts, most = weight.shape[0], max(1, *(len(row) for row in starts))
    each = torch.tensor(lengths, dtype=torch.int64)
    run = torch.arange(len(lengths)).repeat_interleave(each).to(x.device)
    slots = experts + num_experts * run[:, None]  # [N, k], of an expert in a run
    counts = torch.bincount(slots.flatten(), minlength=most * num_experts)
    table = tokens.all_gather(counts.view(most, -1)).wait()  # [ranks, m, E]
    kept = torch.ones_like(experts, dtype=torch.bool)
    if capacity_factor is not None:
        kept = _kept(slots, table, starts, tokens.rank, capacity_factor)
    total = table.sum()
    mass = sum_over_ranks(logits.softmax(-1).sum(0), tokens)
    load = RouterLoad(table.sum((0, 1)).to(wide) * num_chosen / total, mass * num_chosen / total)
    return Routing(experts, best.softmax(-1), kept), load


def _lengths_and_starts(
    runs: Sequence[Sequence[Span]] | None, tokens: Group, num_tokens: int
) -> tuple[list[int], list[list[int]]]:
    """Tokens of each of this rank's runs, and where each rank's start in the pack, or in its stead."""
    if runs is None:
        return [num_tokens], [[rank] for rank in range(tokens.size)]
    expect(len(runs) == tokens.size, f"runs of {tokens.size} ranks", len(runs))
    lengths = [span.length for span in runs[tokens.rank]]
    expect(sum(lengths) == num_tokens, f"runs of this rank's {num_tokens} tokens", lengths)
    return lengths, [[span.start for span in spans] for spans in runs]


def _kept(
    slots: Tensor, table: Tensor, starts: list[list[int]], rank: int, factor: float
) -> Tensor:
    """Whether each slot's number among all slots of its expert is below the capacity, `[N, k]`."""
    flat = slots.flatten()
    order = flat.argsort(stable=True)
    counts = table[rank].flatten()  # [m E]
    first = counts.cumsum(0) - counts  # of each run's and expert's slots among the sorted ones
    number = torch.empty_like(flat)
    number[order] = torch.arange(flat.shape[0], device=flat.device) - first[flat[order]]
    capacity = (table.sum().double() * (factor / table.shape[2])).ceil()
    return (_before(table, starts)[rank].flatten()[flat] + number < capacity).view(slots.shape)


def _before(table: Tensor, starts: list[list[int]]) -> Tensor:
    """Slots of each expert in all runs that come before a run in the pack, `[ranks, m, E]`."""
    places = [(at, rank, n) for rank, row in enumerate(starts) for n, at in enumerate(row)]
    index = torch.tensor(sorted(places), dtype=torch.int64).view(-1, 3).to(table.device)
    _, ranks, numbers = index.unbind(1)
    in_order = table[ranks, numbers]  # [runs, E]
    before = torch.zeros_like(table)
    before[ranks, numbers] = in_order.cumsum(0) - in_order
    return before
