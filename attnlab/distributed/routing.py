"""Which expert takes which token, decided once a pass over the tokens of all ranks together.

Legend: N tokens of this rank, D hidden size, E experts, k experts a token.

Drops are decided before the tokens are cut into groups and do not depend on how many there are: an
extra all-gather of counts gives every slot its number among all ranks' slots of the same expert
(MiniMax-01's global router, arXiv 2501.08313, section 2.1.2), and slots from the capacity on are
dropped. With contiguous packs the order of ranks is that of the tokens, so that what is dropped is
what one process drops.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.distributed.comm import Group, sum_over_ranks
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
) -> tuple[Routing, RouterLoad]:
    """The best experts of `[N, D]`, and how all ranks' tokens spread over the experts.

    `weight` `[E, D]` is the router's, `tokens` the ranks that route together. The load's mean
    probabilities carry gradients to all ranks' tokens: a loss of it counts once if every rank adds
    its share 1 / ranks of it.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(x.to(wide), weight.to(wide))  # [N, E]
    best, experts = logits.topk(num_chosen, dim=-1)
    counts = torch.bincount(experts.flatten(), minlength=weight.shape[0])  # [E]
    table = tokens.all_gather(counts).wait()  # [ranks, E]
    kept = torch.ones_like(experts, dtype=torch.bool)
    if capacity_factor is not None:
        kept = _kept(experts, table, tokens.rank, capacity_factor)
    total = table.sum()
    mass = sum_over_ranks(logits.softmax(-1).sum(0), tokens)
    load = RouterLoad(table.sum(0).to(wide) * num_chosen / total, mass * num_chosen / total)
    return Routing(experts, best.softmax(-1), kept), load


def _kept(experts: Tensor, table: Tensor, rank: int, factor: float) -> Tensor:
    """Whether each slot's number among all slots of its expert is below the capacity, `[N, k]`."""
    slots = experts.flatten()
    order = slots.argsort(stable=True)
    counts = table[rank]
    starts = counts.cumsum(0) - counts  # of each expert's run in the sorted slots
    number = torch.empty_like(slots)
    number[order] = torch.arange(slots.shape[0], device=slots.device) - starts[slots[order]]
    before = table[:rank].sum(0)  # slots of earlier ranks
    capacity = (table.sum().double() * (factor / table.shape[1])).ceil()
    return (before[slots] + number < capacity).view(experts.shape)
