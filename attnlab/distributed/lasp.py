"""Lightning attention on a packed stream that lies on many ranks: LASP+ and its baselines.

Legend: W ranks, L tokens of this rank, H heads, K key dim, V value dim, m chunks of this rank, F
fragments of this rank.

Each rank runs the op of the registry on its own tokens, every fragment from a zero state, and
leaves a state a chunk. Those states cross the ranks (`states`) while the op runs, and what enters a
chunk is added to its first fragment: o_t += scale exp(g (t - lo + 1)) q_t P, lo its first token.
In the backward the gradients of P cross while the op's own backward runs.

Alternatively (`overlap=False`) the op itself starts from P, and its backward from the gradient of
what it leaves: both wait for the exchange, which saves that product, and all sums stay inside the
op, whose 16-bit results are rounded once.
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
            that requires a gradient; on all ranks, if their plans differ.
    """
    _check(query, log_decay, plan, group, method)
    inputs = query, key, value, log_decay
    bounds = plan.local_cu_seqlens(group.rank)
    flags: dict[str, Any] = {"scale": scale, "precision": precision, "backend": backend}
    if not plan.crosses_chunks:
        return lightning_attention_varlen(*inputs, bounds, **flags).output
    exchange = _exchange(plan, group, log_decay, method, epsilon)
    if not overlap:
        return _Fused.apply(*inputs, plan, exchange, group.rank, flags)
    left = _outgoing(key, value, log_decay, plan, group.rank, backend)  # [m, H, K, V]
    transit = begin(left, *(partial(exchange.start, backward=x) for x in (False, True)))
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
        return key.new_zeros(0, *_state_shape(key, value), dtype=dtype) + (
            key[:, :, :0].sum() + value[:, :, :0].sum()
        )
    return torch.stack(states)


class _Fused(torch.autograd.Function):
    """The op between two exchanges: it starts from what enters, its backward from what D is."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        plan: PackPlan,
        exchange: Exchange,
        rank: int,
        flags: dict[str, Any],
    ) -> Tensor:
        left = _outgoing(key, value, log_decay, plan, rank, flags["backend"])
        entering = exchange.start(left, backward=False).wait()
        initial = _at_fragments(entering, plan, rank, last=False)
        needed = ctx.needs_input_grad[:3]
        with torch.set_grad_enabled(any(needed)):
            leaves = [x.detach().requires_grad_(any(needed)) for x in (query, key, value)]
            q, k, v = leaves
            bounds = plan.local_cu_seqlens(rank)
            states: dict[str, Any] = {"initial_state": initial, "return_final_state": True}
            output, final = lightning_attention_varlen(
                q, k, v, log_decay, bounds, **flags, **states
            )
        ctx.graph = leaves, output, final
        ctx.rest = log_decay, plan, exchange, rank, flags
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        leaves, output, final = ctx.graph
        log_decay, plan, exchange, rank, flags = ctx.rest
        entered = _entered(leaves[0], grad, log_decay, plan, rank, flags)
        left = exchange.start(entered, backward=True).wait()  # D of each own chunk
        none = (None,) * 5
        if not output.numel():
            return *(torch.zeros_like(x) for x in leaves), *none
        outer = grad, _at_fragments(left, plan, rank, last=True)
        # Kept, since a caller may walk its own graph again.
        grads = torch.autograd.grad((output, final), leaves, outer, retain_graph=True)
        return *grads, *none


def _entered(
    query: Tensor,
    grad: Tensor,
    log_decay: Tensor,
    plan: PackPlan,
    rank: int,
    flags: dict[str, Any],
) -> Tensor:
    """Gradients `[m, H, K, V]` of the states that enter: scale exp(g (t - lo + 1)) q_t do_t, summed.

    Seen from its end, a first fragment leaves this sum as a state does.
    """
    backend = flags["backend"] if flags["backend"] in list_backends("lightning_state") else None
    dtype = torch.promote_types(query.dtype, torch.float32)
    found = query.new_zeros(len(plan.chunks(rank)), *_state_shape(query, grad), dtype=dtype)
    step = torch.exp(log_decay.to(query.device, dtype))[:, None, None] * flags["scale"]
    for slot, chunk in enumerate(plan.chunks(rank)):
        if plan.continues(chunk):
            own = slice(*plan.local(chunk, plan.first_fragment(chunk)))
            q, do = (x[:, :, own].detach().flip(2) for x in (query, grad))
            found[slot] = step * lightning_state(q, do, log_decay, backend=backend)[0]
    return found


def _state_shape(key: Tensor, value: Tensor) -> tuple[int, int, int]:
    return key.shape[1], key.shape[3], value.shape[3]


def _at_fragments(states: Tensor, plan: PackPlan, rank: int, *, last: bool) -> Tensor:
    """`[F, H, K, V]`: each own chunk's state at its first or `last` fragment, zero elsewhere."""
    places, count = [], 0
    num_fragments = plan.local_cu_seqlens(rank).shape[0] - 1
    for chunk in plan.chunks(rank):
        fragments = len(plan.fragments(chunk))
        place = count + fragments - 1 if last else count
        places.append(place if fragments else num_fragments)
        count += fragments
    found = states.new_zeros(num_fragments + 1, *states.shape[1:])
    index = torch.tensor(places, device=states.device, dtype=torch.int64)
    return found.index_add(0, index, states)[:num_fragments]  # an empty chunk's goes to the rest


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
    group.check_plan(plan)
    expect(method in METHODS, f"a method among {', '.join(METHODS)}", repr(method))
    expect(group.size == plan.world_size, f"a group of {plan.world_size} ranks", group.size)
    tokens = plan.local_len(group.rank)
    got = list(query.shape)
    expect(query.ndim == 4 and query.shape[2] == tokens, f"this rank's {tokens} tokens", got)
    expect(not log_decay.requires_grad, "a log_decay without gradient", "one that requires it")
