"""Mixture of experts: a float32 router, the best few experts a token, their weighted sum.

Legend: N tokens, D hidden size, E experts, k experts a token, F expert width, S = N k slots.

MiniMax-01, arXiv 2501.08313, section 2.1: the weights are a softmax over all experts, cut to the
top k and divided by their sum. Slots are sorted by expert, so that each expert works on a run of
rows in one grouped product; no loop runs over tokens, and nothing waits for the device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.model.config import HybridConfig
from attnlab.model.grouped import grouped_linear
from attnlab.model.slots import few_experts, from_slots, gated_silu, to_slots

_TOKENS_AT_ONCE = 65_536  # without gradients: bounds the slots' memory in a long prefill


class RouterLoad(NamedTuple):
    """How a layer's router spread its tokens over the experts, both `[E]` float32.

    `fraction` of the tokens that chose an expert, which sums to k; mean `probability` of the
    router, which sums to 1 and carries gradients.
    """

    fraction: Tensor
    probability: Tensor


class Router(nn.Module):
    """Linear map to one logit an expert, computed in float32 whatever the model's dtype."""

    def __init__(self, config: HybridConfig, **factory: Any) -> None:
        """Make the weight `[E, D]`."""
        super().__init__()
        shape = config.num_local_experts, config.hidden_size
        self.weight = nn.Parameter(torch.empty(shape, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, E]` of `[N, D]`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            if _multiplies_into_float32(x, self.weight):
                return torch.mm(x, self.weight.T, out_dtype=wide)
            return F.linear(x.to(wide), self.weight.to(wide))


class Experts(nn.Module):
    """Feed-forward networks W_2 (SiLU(W_1 x) * W_3 x), all experts' weights in two tensors."""

    def __init__(self, config: HybridConfig, **factory: Any) -> None:
        """Make `gate_up_proj` `[E, 2F, D]`, W_1 above W_3, and `down_proj` `[E, D, F]`."""
        super().__init__()
        experts, hidden = config.num_local_experts, config.hidden_size
        width = config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden, **factory))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width, **factory))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """`[S, D]` from rows sorted by expert; `offsets` `[E]` int32 are the ends of their runs."""
        gated = gated_silu(grouped_linear(x, self.gate_up_proj, offsets))  # [S, F]
        return grouped_linear(gated, self.down_proj, offsets)

    def only(self, x: Tensor) -> Tensor:
        """`[N, D]` from all tokens, of the one expert there is."""
        gated = gated_silu(F.linear(x, self.gate_up_proj.squeeze(0)))  # [N, F]
        return F.linear(gated, self.down_proj.squeeze(0))


class MixtureOfExperts(nn.Module):
    """Router and experts of one layer.

    In training with a `capacity_factor`, an expert takes at most its share of slots, in the order
    of the tokens, and the slots that are dropped weigh nothing. `global_counts` is for training on
    several devices: it maps this device's slots of each expert, `[E]` int32, to their sums over all
    devices, before it is decided how many to drop; by default the counts are all there are.

    An expert that is alone takes every token with weight 1, and its router gets no gradient.
    """

    def __init__(self, config: HybridConfig, **factory: Any) -> None:
        """Build one layer's router and experts."""
        super().__init__()
        self.num_experts, self.num_chosen = config.num_local_experts, config.num_experts_per_tok
        self.capacity_factor = config.capacity_factor
        self.global_counts: Callable[[Tensor], Tensor] | None = None
        self.gate = Router(config, **factory)
        self.experts = Experts(config, **factory)

    def forward(self, hidden: Tensor) -> tuple[Tensor, RouterLoad | None]:
        """`[B, T, D]` and, in training, how the router spread the tokens."""
        x = hidden.flatten(0, -2)  # [N, D]
        if self.training or torch.is_grad_enabled() or x.shape[0] <= _TOKENS_AT_ONCE:
            output, load = self._mix(x)
            return output.view(hidden.shape), load
        output = torch.empty_like(x)
        for part, target in zip(
            x.split(_TOKENS_AT_ONCE), output.split(_TOKENS_AT_ONCE), strict=True
        ):
            target.copy_(self._mix(part)[0])
        return output.view(hidden.shape), None

    def _mix(self, x: Tensor) -> tuple[Tensor, RouterLoad | None]:
        drops = self.training and self.capacity_factor is not None and self.capacity_factor < 1
        if self.num_experts == 1 and not drops:
            one = torch.ones(1, device=x.device) if self.training else None
            return self.experts.only(x), None if one is None else RouterLoad(one, one)
        logits = self.gate(x)
        best, experts = logits.topk(self.num_chosen, dim=-1)
        weights = best.softmax(-1)  # that over all experts, divided by the sum of the chosen ones
        if not self.training:
            matrices = self.experts.gate_up_proj, self.experts.down_proj
            output = few_experts(x, experts, weights, *matrices)
            if output is not None:
                return output, None
        order, offsets = sort_by_expert(experts, self.num_experts)
        load = None
        if self.training:
            counts = offsets.diff(prepend=offsets.new_zeros(1))
            load = RouterLoad(counts / x.shape[0], logits.softmax(-1).mean(0))
            if self.capacity_factor is not None:
                kept = self._kept(order, offsets, counts, self.capacity_factor)
                weights = weights * kept.view_as(weights)
        slots = torch.empty_like(order)
        slots[order] = torch.arange(order.shape[0], device=order.device)
        slots = slots.view(weights.shape)  # [N, k], where each token's rows lie
        rows = self.experts(to_slots(x, order, slots), offsets)  # [S, D]
        return from_slots(rows, slots, weights), load

    def _kept(self, order: Tensor, offsets: Tensor, counts: Tensor, factor: float) -> Tensor:
        """Which of the `[S]` slots, in the order of the tokens, their experts have room for.

        A device may keep the part of its slots that all devices together may keep of theirs.
        """
        total = counts if self.global_counts is None else self.global_counts(counts)
        share = total.sum().double() * (factor / self.num_experts)
        capacity = share.ceil().long()
        room = counts * capacity // torch.maximum(total, capacity)  # [E]
        place = torch.arange(order.shape[0], device=order.device)
        expert = torch.searchsorted(offsets, place.to(offsets.dtype), right=True)
        rank = place - (offsets - counts)[expert]
        return torch.zeros_like(place, dtype=torch.bool).index_copy(0, order, rank < room[expert])


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Order `[S]` that sorts the slots of `experts` `[N, k]`, and the ends `[E]` of their runs.

    The ends are int32. Slots of one expert stay in the order of the tokens.
    """
    sorted_experts, order = experts.flatten().sort(stable=True)
    number = torch.arange(num_experts, device=experts.device)
    return order, torch.searchsorted(sorted_experts, number, right=True, out_int32=True)


def balancing_loss(loads: list[RouterLoad], normalisation: str) -> Tensor:
    """Load-balancing loss of all layers, a float32 scalar without its coefficient.

    "transformers" is E sum_i f_i P_i with f and P averaged over the layers first, k where all
    experts are used alike; "paper" (arXiv 2501.08313, section 2.1) is (1/E) sum_i f_i m_i, averaged
    over the layers, k / E^2 there.
    """
    fraction = torch.stack([load.fraction for load in loads])  # [layers, E]
    probability = torch.stack([load.probability for load in loads])
    num_experts = fraction.shape[1]
    if normalisation == "transformers":
        return num_experts * (fraction.mean(0) * probability.mean(0)).sum()
    return (fraction * probability).sum(1).mean() / num_experts


def _multiplies_into_float32(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of 16-bit operands can give its float32 sums, which saves their copies.

    torch has such products on GPUs, without gradients.
    """
    half = x.is_cuda and x.dtype == weight.dtype and x.dtype.itemsize == 2
    return half and not torch.is_grad_enabled()
