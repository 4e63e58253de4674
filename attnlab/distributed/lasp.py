"""Lightning attention on a packed stream that lies on many ranks: LASP+ and its baselines.

Legend: W ranks, L tokens of this rank, H heads, K key dim, V value dim, m chunks of this rank, F
fragments of this rank.

Each rank runs the op of the registry on its own tokens, every fragment from a zero state, and
leaves a state a chunk. Those states cross the ranks (`states`) while the op runs, and what enters a
chunk is added to its first fragment: o_t += scale exp(g (t - lo + 1)) q_t P, lo its first token.
Alternatively (`overlap=False`) the op itself starts from P, which saves that product and waits for
the exchange. In the backward the gradients of P cross while the op's own backward runs (`overlap`).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnlab.checks import expect, remembered, values_of
from attnlab.distributed.comm import Group
from attnlab.distributed.overlap import begin
from attnlab.distributed.pack import UNREACHED, PackPlan
from attnlab.distributed.states import Exchange, Gather, Pruned, Serial
from attnlab.functional import lightning_attention_varlen, lightning_state
from attnlab.reference import decay_mask
from attnlab.registry import list_backends

METHODS = ("gather", "serial", "pruned")


def lasp_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    plan: PackPlan,
    group: Group,
    *,
    scale: float = 1.0,
    method: str = "gather",
    epsilon: float = 2.0**-24,
    overlap: bool = True,
    precision: str = "default",
    backend: str | None = None,
) -> Tensor:
    """This rank's part `[1, H, L, V]` of `lightning_attention_varlen` over the whole pack.

    The gradients are exact as well, if the loss of every rank depends on its output.

    Args:
        query, key: `[1, H, L, K]`, this rank's tokens as `plan.shard` gives them.
        value: `[1, H, L, V]`.
        log_decay: `[H]`, without a gradient.
        plan: the pack and its chunks, the same on all ranks.
        group: the ranks that share the pack.
        scale, precision, backend: as in `attnlab.lightning_attention`.
        method: "gather" (LASP+), "serial" (LASP), or "pruned".
        epsilon: weight up to which "pruned" leaves states out.
        overlap: send states while the op runs, instead of starting the op from them.

    Raises:
        ValueError: for tensors that are not the plan's, a group of another size, or a log_decay
            that requires a gradient.
    """
    _check(query, log_decay, plan, group, method)
    inputs = query, key, value, log_decay
    bounds = plan.local_cu_seqlens(group.rank)
    flags: dict[str, Any] = {"scale": scale, "precision": precision, "backend": backend}
    if not plan.crosses_chunks:
        return lightning_attention_varlen(*inputs, bounds, **flags).output
    exchange = _exchange(plan, group, log_decay, method, epsilon)
    left = _outgoing(key, value, log_decay, plan, group.rank, backend)  # [m, H, K, V]
    transit = begin(left, *(partial(exchange.start, backward=x) for x in (False, True)))
    if not overlap:
        entering = transit.end()
        initial = _initial_states(entering, plan, group.rank, bounds.shape[0] - 1)
        output = lightning_attention_varlen(*inputs, bounds, initial_state=initial, **flags).output
        return output + 0 * initial.sum() if output.numel() == 0 else output
    output = lightning_attention_varlen(*inputs, bounds, **flags).output
    entering = transit.end()  # [m, H, K, V]
    return _add_past(output, query, entering, log_decay, plan, group.rank, scale, precision)


def _exchange(
    plan: PackPlan, group: Group, log_decay: Tensor, method: str, epsilon: float
) -> Exchange:
    decays = remembered(log_decay, values_of)
    if method == "gather":
        return Gather(plan, group, decays)
    if method == "serial":
        return Serial(plan, group, decays)
    return Pruned(plan, group, decays, epsilon)


def _outgoing(
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    plan: PackPlan,
    rank: int,
    backend: str | None,
) -> Tensor:
    """State `[m, H, K, V]` that each own chunk's last fragment leaves; zero if none goes on there."""
    states = []
    # A backend that has no such op leaves it to the first that can run it.
    backend = backend if backend in list_backends("lightning_state") else None
    for chunk in plan.chunks(rank):
        start, stop = plan.local(chunk, plan.last_fragment(chunk))
        if not (plan.distances[:, chunk] != UNREACHED).any():
            start = stop
        k, v = key[:, :, start:stop], value[:, :, start:stop]
        state = lightning_state(k, v, log_decay, backend=backend)
        # A sum of nothing is 0 and ties zeros to the graph: every rank has to run the backward.
        states.append(state[0] + (key[:, :, :0].sum() + value[:, :, :0].sum()))
    if not states:
        dtype = torch.promote_types(key.dtype, torch.float32)
        shape = 0, key.shape[1], key.shape[3], value.shape[3]
        return key.new_zeros(shape, dtype=dtype) + (key[:, :, :0].sum() + value[:, :, :0].sum())
    return torch.stack(states)


def _initial_states(entering: Tensor, plan: PackPlan, rank: int, num_fragments: int) -> Tensor:
    """`[F, H, K, V]`: what enters each fragment, zero but at the first of a chunk."""
    firsts, count = [], 0
    for chunk in plan.chunks(rank):
        fragments = len(plan.fragments(chunk))
        firsts.append(count if fragments else num_fragments)
        count += fragments
    states = entering.new_zeros(num_fragments + 1, *entering.shape[1:])
    index = torch.tensor(firsts, device=entering.device, dtype=torch.int64)
    return states.index_add(0, index, entering)[:num_fragments]  # an empty chunk's goes to the rest


def _add_past(
    output: Tensor,
    query: Tensor,
    entering: Tensor,
    log_decay: Tensor,
    plan: PackPlan,
    rank: int,
    scale: float,
    precision: str,
) -> Tensor:
    """Add to each own chunk's first fragment what the state that enters it gives."""
    wide = torch.promote_types(query.dtype, torch.float32)
    dtype = query.dtype if precision == "default" else wide
    for slot, chunk in enumerate(plan.chunks(rank)):
        start, stop = plan.local(chunk, plan.first_fragment(chunk))
        stop = stop if plan.continues(chunk) else start  # no token, yet a part of the graph
        steps = torch.arange(1, stop - start + 1, device=query.device)
        decay = decay_mask(log_decay.to(query.device), steps, wide)[..., None]  # [H, n, 1]
        decayed = (query[:, :, start:stop] * (scale * decay)).to(dtype)
        output[:, :, start:stop] += decayed @ entering[slot].to(dtype)
    return output + 0 * entering.sum() if not plan.chunks(rank) else output


def _check(query: Tensor, log_decay: Tensor, plan: PackPlan, group: Group, method: str) -> None:
    expect(method in METHODS, f"a method among {', '.join(METHODS)}", repr(method))
    expect(group.size == plan.world_size, f"a group of {plan.world_size} ranks", group.size)
    tokens = plan.local_len(group.rank)
    got = list(query.shape)
    expect(query.ndim == 4 and query.shape[2] == tokens, f"this rank's {tokens} tokens", got)
    expect(not log_decay.requires_grad, "a log_decay without gradient", "one that requires it")
