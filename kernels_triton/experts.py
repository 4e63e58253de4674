"""What stands around the grouped products of a mixture of experts: the gate, and the weighted sum.

    gated_silu      out[s] = SiLU(gate[s]) * up[s]
    weighted_sum    out[n] = sum_j weights[n, j] rows[slots[n, j]]

and their gradients. Each tensor is read and written once, all arithmetic is float32, offsets are
64-bit, and every sum has one order. As separate ops of torch they took a third of a prefill.

For the few slots of a decoding step there are the experts whole, in two kernels: a slot's program
reads the rows of its own expert's weights, so that nothing is sorted. They are bound by those reads.

    gated_products  h[s] = SiLU(W_1 x) * W_3 x        of the slot's token and expert
    summed_products out[n] = sum_j weights[n, j] W_2 h[s]

Legend: S slots (rows of the experts' products), F expert width, N tokens, k experts a token,
D hidden size, E experts.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_triton.launcher import Launcher, kind_of
from kernels_triton.lightning.scan import round_to

_BLOCK = 1024  # channels a program works on at once: 8 a thread
_ROWS, _COLS = 8, 512  # of a weight that a program has on the way at once: 8 KiB


@triton.jit
def _gated_silu_kernel(p_x, p_out, F, BLOCK: tl.constexpr):
    """A block of one slot's channels; `p_x` `[S, 2F]` holds gates, then values."""
    i_s = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o_f < F
    b_gate = tl.load(p_x + i_s * 2 * F + o_f, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_x + i_s * 2 * F + F + o_f, mask=mask, other=0.0).to(tl.float32)
    b_out = b_gate * tl.sigmoid(b_gate) * b_up
    tl.store(p_out + i_s * F + o_f, round_to(b_out, p_out.dtype.element_ty), mask=mask)


@triton.jit
def _gated_silu_backward_kernel(p_x, p_grad, p_out, F, BLOCK: tl.constexpr):
    """Gradients of the gates and the values, `[S, 2F]`, from that of the result `[S, F]`."""
    i_s = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o_f < F
    b_gate = tl.load(p_x + i_s * 2 * F + o_f, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_x + i_s * 2 * F + F + o_f, mask=mask, other=0.0).to(tl.float32)
    b_grad = tl.load(p_grad + i_s * F + o_f, mask=mask, other=0.0).to(tl.float32)
    b_share = tl.sigmoid(b_gate)
    b_slope = b_share * (1.0 + b_gate * (1.0 - b_share))
    p_o = p_out + i_s * 2 * F + o_f
    tl.store(p_o, round_to(b_grad * b_up * b_slope, p_out.dtype.element_ty), mask=mask)
    tl.store(p_o + F, round_to(b_grad * b_gate * b_share, p_out.dtype.element_ty), mask=mask)


@triton.jit
def _weighted_sum_kernel(
    p_rows, p_slots, p_weights, p_out, D, k: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of one token's channels; without weights all of them are 1."""
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o_d < D
    b_out = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(k):
        slot = tl.load(p_slots + i_n * k + j).to(tl.int64)
        b_row = tl.load(p_rows + slot * D + o_d, mask=mask, other=0.0).to(tl.float32)
        if p_weights is not None:
            b_row *= tl.load(p_weights + i_n * k + j)
        b_out += b_row
    tl.store(p_out + i_n * D + o_d, round_to(b_out, p_out.dtype.element_ty), mask=mask)


@triton.jit
def _weighted_sum_backward_kernel(
    p_grad, p_rows, p_slots, p_weights, p_grad_rows, p_grad_weights,
    D, k: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One slot of one token: its row's gradient, and its weight's, a product of two rows."""
    i = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_slots + i).to(tl.int64)
    weight = tl.load(p_weights + i)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        o_d = start + tl.arange(0, BLOCK)
        mask = o_d < D
        b_grad = tl.load(p_grad + i // k * D + o_d, mask=mask, other=0.0).to(tl.float32)
        b_row = tl.load(p_rows + slot * D + o_d, mask=mask, other=0.0).to(tl.float32)
        b_sum += b_grad * b_row
        b_out = round_to(weight * b_grad, p_grad_rows.dtype.element_ty)
        tl.store(p_grad_rows + slot * D + o_d, b_out, mask=mask)
    tl.store(p_grad_weights + i, tl.sum(b_sum, 0))


@triton.jit
def _gated_products_kernel(
    p_x, p_experts, p_weight, p_out, D, F, k: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """ROWS channels of one slot; `p_weight` `[E, 2F, D]` holds W_1 above W_3."""
    i_s = tl.program_id(0).to(tl.int64)
    o_f, o_c = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    p_gate = p_weight + (tl.load(p_experts + i_s).to(tl.int64) * 2 * F + o_f[:, None]) * D
    b_gate = tl.zeros((ROWS, COLS), tl.float32)
    b_up = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, D, COLS):
        o_d = start + o_c
        mask = (o_f < F)[:, None] & (o_d < D)[None, :]
        b_x = tl.load(p_x + i_s // k * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
        p_w = p_gate + o_d[None, :]
        b_gate += b_x * tl.load(p_w, mask=mask, other=0.0).to(tl.float32)
        b_up += b_x * tl.load(p_w + F * D.to(tl.int64), mask=mask, other=0.0).to(tl.float32)
    gate, up = tl.sum(b_gate, 1), tl.sum(b_up, 1)
    b_out = round_to(gate * tl.sigmoid(gate) * up, p_out.dtype.element_ty)
    tl.store(p_out + i_s * F + o_f, b_out, mask=o_f < F)


@triton.jit
def _summed_products_kernel(
    p_h, p_experts, p_weights, p_weight, p_out,
    F, D, k: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS channels of one token; `p_weight` is `[E, D, F]`."""
    i_n = tl.program_id(0).to(tl.int64)
    o_d, o_c = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    b_sum = tl.zeros((ROWS, COLS), tl.float32)
    for j in tl.static_range(k):
        i_s = i_n * k + j
        p_w = p_weight + (tl.load(p_experts + i_s).to(tl.int64) * D + o_d[:, None]) * F
        weight = tl.load(p_weights + i_s)
        for start in range(0, F, COLS):
            o_f = start + o_c
            mask = (o_d < D)[:, None] & (o_f < F)[None, :]
            b_h = tl.load(p_h + i_s * F + o_f, mask=o_f < F, other=0.0).to(tl.float32) * weight
            b_w = tl.load(p_w + o_f[None, :], mask=mask, other=0.0).to(tl.float32)
            b_sum += b_h[None, :] * b_w
    b_out = round_to(tl.sum(b_sum, 1), p_out.dtype.element_ty)
    tl.store(p_out + i_n * D + o_d, b_out, mask=o_d < D)


_launch_gated_products = Launcher(_gated_products_kernel)
_launch_summed_products = Launcher(_summed_products_kernel)
_launch_gated_silu = Launcher(_gated_silu_kernel)
_launch_gated_silu_backward = Launcher(_gated_silu_backward_kernel)
_launch_weighted_sum = Launcher(_weighted_sum_kernel)
_launch_weighted_sum_backward = Launcher(_weighted_sum_backward_kernel)


def gated_silu(x: Tensor) -> Tensor:
    """`[S, F]` from contiguous `[S, 2F]`, gates before values."""
    num_slots, width = x.shape[0], x.shape[1] // 2
    output = x.new_empty(num_slots, width)
    _start(_launch_gated_silu, num_slots, width, (x, output), {})
    return output


def gated_silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of `x` `[S, 2F]` from that of the result, `[S, F]`; both contiguous."""
    grad_x = torch.empty_like(x)
    _start(_launch_gated_silu_backward, *grad.shape, (x, grad, grad_x), {})
    return grad_x


def weighted_sum(rows: Tensor, slots: Tensor, weights: Tensor | None) -> Tensor:
    """`[N, D]`: the rows `slots` `[N, k]` of contiguous `[S, D]`, times weights `[N, k]` float32."""
    num_tokens, k = slots.shape
    output = rows.new_empty(num_tokens, rows.shape[1])
    pointers = rows, slots, weights, output
    _start(_launch_weighted_sum, num_tokens, rows.shape[1], pointers, {"k": k})
    return output


def weighted_sum_backward(
    grad: Tensor, rows: Tensor, slots: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weights; each row belongs to one slot of one token."""
    grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
    pointers = grad, rows, slots, weights, grad_rows, grad_weights
    k, width = slots.shape[1], rows.shape[1]
    _start(_launch_weighted_sum_backward, slots.numel(), width, pointers, {"k": k}, whole=True)
    return grad_rows, grad_weights


def few_experts(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """`[N, D]`: the weighted sum of each token's experts, reading a slot's weights for itself.

    Args:
        x: `[N, D]`; experts: `[N, k]` int64, weights: `[N, k]` float32.
        gate_up: `[E, 2F, D]`, down: `[E, D, F]`; all contiguous.
    """
    (num_tokens, k), (_, hidden, width) = experts.shape, down.shape
    h, output = x.new_empty(num_tokens * k, width), torch.empty_like(x)
    for launch, num_rows, pointers, sizes in (
        (_launch_gated_products, h.shape[0], (x, experts, gate_up, h), (hidden, width)),
        (_launch_summed_products, num_tokens, (h, experts, weights, down, output), (width, hidden)),
    ):
        constants = {"k": k, "ROWS": _ROWS, "COLS": min(_COLS, triton.next_power_of_2(sizes[0]))}
        kind = None if any(n % 16 for n in sizes) else kind_of(x.device, *pointers)
        grid = num_rows, triton.cdiv(sizes[1], _ROWS), 1
        launch(grid, (*pointers, *sizes), constants, kind)
    return output


def _start(
    launch: Launcher,
    num_rows: int,
    width: int,
    pointers: tuple[Tensor | None, ...],
    constants: dict[str, Any],
    whole: bool = False,
) -> None:
    """Start a program a row and block of its channels, or (`whole`) a row."""
    if num_rows == 0:
        return
    block = min(_BLOCK, triton.next_power_of_2(width))
    grid = num_rows, 1 if whole else triton.cdiv(width, block), 1
    # `width` decides how addresses are aligned: Triton makes code for multiples of 16 and for 1.
    kind = None if width % 16 else kind_of(pointers[0].device, *pointers)
    launch(grid, (*pointers, width), constants | {"BLOCK": block}, kind)
