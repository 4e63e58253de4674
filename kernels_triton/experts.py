"""What stands around the grouped products of a mixture of experts: the gate, and the weighted sum.

    gated_silu      out[s] = SiLU(gate[s]) * up[s]
    weighted_sum    out[n] = sum_j weights[n, j] rows[slots[n, j]]

and their gradients. Each tensor is read and written once, all arithmetic is float32, offsets are
64-bit, and every sum has one order. As separate ops of torch they took a third of a prefill.

Legend: S slots (rows of the experts' products), F expert width, N tokens, k experts a token, D hidden.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_triton.launcher import Launcher, kind_of
from kernels_triton.lightning.scan import round_to

_BLOCK = 1024  # channels a program works on at once: 8 a thread


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
