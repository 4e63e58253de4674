"""Softmax attention on a packed stream that lies on many ranks: MiniMax-01's varlen ring attention.

Legend: W ranks, L tokens of this rank, H query heads, G key heads, K key dim, V value dim.

Keys and values travel around the ring, one rank a step, and each rank attends to what comes by;
the parts merge by their logsumexps (arXiv 2501.08313, section 3.2.1; Ring Attention, arXiv
2310.01889). The ring runs over the whole packed stream, whatever documents are in it: what a rank
sees of another's keys are a few rectangles, known on the host (`PackPlan.rectangles`), and the ring
stops after the farthest step that any rank needs (`PackPlan.hops`), which is exact.

In the backward the gradients of a block's keys and values travel with it, in float32, and go home
in one message. With h steps that makes 3 h + 1 messages a rank: h forward, 2 h + 1 backward.
"""

from typing import Any

import torch
from torch import Tensor

from attnlab.checks import expect
from attnlab.distributed.blocks import Block, block_of, merge
from attnlab.distributed.comm import Group, Pending
from attnlab.distributed.pack import PackPlan


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: PackPlan,
    group: Group,
    *,
    scale: float | None = None,
    kernel: str | None = None,
) -> Tensor:
    """This rank's part `[1, H, L, V]` of causal `softmax_attention_varlen` over the whole pack.

    The gradients are exact as well, if the loss of every rank depends on its output.

    Args:
        query: `[1, H, L, K]`, this rank's tokens as `plan.shard` gives them.
        key, value: `[1, G, L, K or V]`, G a divisor of H.
        plan: the pack and its chunks, the same on all ranks.
        group: the ranks that share the pack.
        scale: of the scores; None is K ** -0.5.
        kernel: of a block, see `attnlab.distributed.blocks`.

    Raises:
        ValueError: for tensors that are not the plan's, or a group of another size; on all ranks,
            if their plans differ.
    """
    group.check_plan(plan)
    expect(group.size == plan.world_size, f"a group of {plan.world_size} ranks", group.size)
    tokens = plan.local_len(group.rank)
    for name, x in (("query", query), ("key", key), ("value", value)):
        ok = x.ndim == 4 and x.shape[0] == 1 and x.shape[2] == tokens
        expect(ok, f"{name} [1, heads, {tokens}, dim] of this rank", list(x.shape))
    heads, kv_heads = query.shape[1], key.shape[1]
    divides = kv_heads > 0 and heads % kv_heads == 0 and value.shape[1] == kv_heads
    expect(divides, f"key and value heads that divide the {heads} query heads", kv_heads)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return _Ring.apply(query, key, value, plan, group, scale, block_of(kernel, query))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: PackPlan,
        group: Group,
        scale: float,
        block: Block,
    ) -> Tensor:
        output, lse = _attend(query, key, value, plan, group, scale, block)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.rest = plan, group, scale, block
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: a recomputed layer gives them only once
        grads = _differentiate(grad, *saved, *ctx.rest)
        cast = [g.to(x.dtype) for g, x in zip(grads, saved[:3], strict=True)]
        return *cast, None, None, None, None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: PackPlan,
    group: Group,
    scale: float,
    block: Block,
) -> tuple[Tensor, Tensor]:
    """Output `[1, H, L, V]` and logsumexp `[1, H, L]`, at least float32."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    output = query.new_zeros(*query.shape[:3], value.shape[3], dtype=dtype)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
    travelling, lengths = _Travelling(key, value), _lengths(plan)
    for step in range(plan.hops + 1):
        source = (group.rank - step) % group.size
        following = lengths[source - 1]
        coming = travelling.pass_on(group, following) if step < plan.hops else None
        for queries, keys, causal in plan.rectangles(group.rank, source):
            rows, columns = slice(*queries), slice(*keys)
            k, v = (x[:, :, columns] for x in travelling.parts(lengths[source]))
            new = block.forward(query[:, :, rows], k, v, causal, scale)
            merged = merge(output[:, :, rows], lse[:, :, rows], *new)
            output[:, :, rows], lse[:, :, rows] = merged
        travelling.take(coming)
    return output, lse


def _differentiate(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    plan: PackPlan,
    group: Group,
    scale: float,
    block: Block,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's queries, keys and values, at least float32."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    dq = torch.zeros_like(query, dtype=dtype)
    travelling, lengths = _Travelling(key, value), _lengths(plan)
    grads = _Travelling(*(torch.zeros_like(x, dtype=dtype) for x in (key, value)))
    coming_grads: Pending | None = None
    for step in range(plan.hops + 1):
        source = (group.rank - step) % group.size
        following = lengths[source - 1]
        coming = travelling.pass_on(group, following) if step < plan.hops else None
        rectangles = [(slice(*a), slice(*b), c) for a, b, c in plan.rectangles(group.rank, source)]
        parts = []
        for rows, keys, causal in rectangles:
            k, v = (x[:, :, keys] for x in travelling.parts(lengths[source]))
            mine = query[:, :, rows], k, v, output[:, :, rows], lse[:, :, rows]
            parts.append(block.backward(grad[:, :, rows], *mine, causal, scale))
        grads.take(coming_grads)
        dk, dv = grads.parts(lengths[source])
        for (rows, keys, _), (add_q, add_k, add_v) in zip(rectangles, parts, strict=True):
            dq[:, :, rows] += add_q
            dk[:, :, keys] += add_k
            dv[:, :, keys] += add_v
        travelling.take(coming)
        coming_grads = grads.pass_on(group, following) if step < plan.hops else None
    if plan.hops:
        grads.take(grads.pass_on(group, lengths[group.rank], distance=-plan.hops))
    return dq, *grads.parts(lengths[group.rank])


class _Travelling:
    """Two tensors of a rank's tokens as one contiguous message that goes from rank to rank."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.shapes = first.shape, second.shape
        self.flat = torch.cat([first.flatten(), second.flatten()])

    def parts(self, length: int) -> tuple[Tensor, Tensor]:
        """The two tensors, views of the message, when it holds `length` tokens."""
        (one, heads, _, dim), (_, _, _, other) = self.shapes
        first, second = self.flat.split([heads * length * dim, heads * length * other])
        return first.view(one, heads, length, dim), second.view(one, heads, length, other)

    def pass_on(self, group: Group, incoming: int, distance: int = 1) -> Pending:
        """Send the message `distance` ranks on, and receive one of `incoming` tokens from behind.

        An empty message is not sent, and both sides know which are.
        """
        (_, heads, _, dim), (_, _, _, other) = self.shapes
        buffer = self.flat.new_empty(heads * incoming * (dim + other))
        ahead, behind = ((group.rank + d) % group.size for d in (distance, -distance))
        sends = [(ahead, self.flat)] if self.flat.numel() else []
        receives = [(behind, buffer)] if incoming else []
        sending = group.exchange(sends, receives)
        return Pending([], lambda: (sending.wait(), buffer)[1])

    def take(self, coming: Pending | None) -> None:
        """Wait for what was received, and hold it instead."""
        if coming is not None:
            self.flat = coming.wait()


def _lengths(plan: PackPlan) -> list[int]:
    """Tokens of each rank; entry -1 is that of the last, the one before rank 0."""
    return [plan.local_len(rank) for rank in range(plan.world_size)]
