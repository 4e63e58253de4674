"""Tokens to the slots of their experts and back, and the experts' gate, as ops with gradients.

Legend: N tokens, k experts a token, S = N k slots sorted by expert, D hidden size, F expert width.

On a GPU they are the kernels of `kernels_triton.experts`; elsewhere a few ops of torch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.custom_op import CustomOp
from attnlab.model.fused import has_kernels

_FEW_SLOTS = 32  # above, slots share experts: their weights are read once for all in sorted order


def to_slots(x: Tensor, order: Tensor, slots: Tensor) -> Tensor:
    """`[S, D]`: each slot's token of `x` `[N, D]`; slot `order[s]` of the tokens lies in row s.

    `slots` `[N, k]` is the inverse of `order`: where each token's slots lie. Differentiable in x.
    """
    return _to_slots(x, order, slots)


def from_slots(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """`[N, D]`: each token's rows of `[S, D]`, weighted; the sums run in float32.

    `slots` `[N, k]` says where they lie. Differentiable in rows and in weights `[N, k]`.
    """
    return _from_slots(rows, slots, weights)


def few_experts(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor | None:
    """`[N, D]`: experts `[N, k]` of few tokens, weighted, without sorting; None where there are many.

    None, too, where a gradient is wanted or there is no such kernel. `gate_up` is `[E, 2F, D]` and
    `down` `[E, D, F]`.
    """
    if not has_kernels(x) or experts.numel() > _FEW_SLOTS or torch.is_grad_enabled():
        return None
    return _few_experts(x, experts, weights, gate_up, down)


def gated_silu(x: Tensor) -> Tensor:
    """`[S, F]`: SiLU(gate) * up of `[S, 2F]`, gates before values. Differentiable."""
    return _gated_silu(x)


def _gather(x: Tensor, order: Tensor, slots: Tensor) -> Tensor:
    return x[order // slots.shape[1]]


def _fake_gather(x: Tensor, order: Tensor, slots: Tensor) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


def _save_slots(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _backward_of_gather(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _sum_of_slots(grad.contiguous(), ctx.saved_tensors[0]), None, None


_to_slots = CustomOp(
    "to_slots", _gather, _fake_gather, setup_context=_save_slots, backward=_backward_of_gather
)


def _add_up(rows: Tensor, slots: Tensor) -> Tensor:
    if has_kernels(rows):
        from kernels_triton import experts

        return experts.weighted_sum(rows, slots, None)
    return _weighted_sum(rows, slots, torch.ones_like(slots, dtype=rows.dtype))


def _fake_add_up(rows: Tensor, slots: Tensor) -> Tensor:
    return rows.new_empty(slots.shape[0], rows.shape[1])


_sum_of_slots = CustomOp("sum_of_slots", _add_up, _fake_add_up)


def _weighted_sum(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    if has_kernels(rows):
        from kernels_triton import experts

        return experts.weighted_sum(rows.contiguous(), slots, weights.float().contiguous())
    own = rows[slots.flatten()].unflatten(0, slots.shape)  # [N, k, D]
    return torch.bmm(weights.to(rows.dtype)[:, None], own)[:, 0]


def _fake_weighted_sum(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return rows.new_empty(slots.shape[0], rows.shape[1])


def _differentiate(
    grad: Tensor, rows: Tensor, slots: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    if has_kernels(rows):
        from kernels_triton import experts

        tensors = grad.contiguous(), rows.contiguous(), slots, weights.float().contiguous()
        grad_rows, grad_weights = experts.weighted_sum_backward(*tensors)
        return grad_rows, grad_weights.to(weights.dtype)
    own = rows[slots.flatten()].unflatten(0, slots.shape)  # [N, k, D]
    grad_weights = torch.bmm(own, grad[:, :, None])[:, :, 0].to(weights.dtype)
    grad_own = weights.to(rows.dtype)[:, :, None] * grad[:, None]
    grad_rows = torch.empty_like(rows)
    grad_rows[slots.flatten()] = grad_own.flatten(0, 1)
    return grad_rows, grad_weights


def _fake_differentiate(
    grad: Tensor, rows: Tensor, slots: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


_gradients = CustomOp("from_slots_backward", _differentiate, _fake_differentiate)


def _save_all(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_of_weighted_sum(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    grad_rows, grad_weights = _gradients(grad, *ctx.saved_tensors)
    return grad_rows, None, grad_weights


_from_slots = CustomOp(
    "from_slots",
    _weighted_sum,
    _fake_weighted_sum,
    setup_context=_save_all,
    backward=_backward_of_weighted_sum,
)


def _run_few(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    from kernels_triton import experts as kernels

    return kernels.few_experts(x.contiguous(), experts, weights.float(), gate_up, down)


def _fake_few(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_few_experts = CustomOp("few_experts", _run_few, _fake_few)


def _gate(x: Tensor) -> Tensor:
    if has_kernels(x):
        from kernels_triton import experts

        return experts.gated_silu(x.contiguous())
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _fake_gate(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


def _differentiate_gate(grad: Tensor, x: Tensor) -> Tensor:
    if has_kernels(x):
        from kernels_triton import experts

        return experts.gated_silu_backward(grad.contiguous(), x.contiguous())
    gate, up = x.chunk(2, -1)
    share = gate.sigmoid()
    slope = share * (1 + gate * (1 - share))
    return torch.cat([grad * up * slope, grad * gate * share], -1)


def _fake_differentiate_gate(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_gate_gradient = CustomOp("gated_silu_backward", _differentiate_gate, _fake_differentiate_gate)


def _backward_of_gate(ctx: Any, grad: Tensor) -> Tensor:
    return _gate_gradient(grad, *ctx.saved_tensors)


_gated_silu = CustomOp(
    "gated_silu", _gate, _fake_gate, setup_context=_save_all, backward=_backward_of_gate
)
