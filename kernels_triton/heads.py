"""Queries, keys and values out of one projection that holds them interleaved, through SiLU, and back.

    q[n], k[n], v[n] = SiLU(x[n, 0]), SiLU(x[n, 1]), SiLU(x[n, 2])

of each token's head n, and the gradient of x. Each tensor is read and written once, in float32
arithmetic; offsets are 64-bit.

Legend: B batch, T tokens, H heads, K head dim, N = B T H.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_triton.launcher import Launcher, kind_of
from kernels_triton.lightning.scan import round_to

_TILE = 1024  # values of a tile: 8 a thread, 16 bytes of a 16-bit tensor


@triton.jit(do_not_specialize=["N"])
def _silu_heads_kernel(
    p_x, p_q, p_k, p_v, N, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_k = tl.arange(0, BLOCK)
    mask = (o_n < N)[:, None] & (o_k < K)[None, :]
    for j in tl.static_range(3):
        p_out = p_q if j == 0 else p_k if j == 1 else p_v
        p_own = p_x + o_n[:, None] * (3 * K) + j * K + o_k[None, :]
        b_x = tl.load(p_own, mask=mask, other=0.0).to(tl.float32)
        b_out = round_to(b_x * tl.sigmoid(b_x), p_out.dtype.element_ty)
        tl.store(p_out + o_n[:, None] * K + o_k[None, :], b_out, mask=mask)


@triton.jit(do_not_specialize=["N", "T"])
def _silu_heads_backward_kernel(
    p_dq, p_dk, p_dv, p_x, p_grad, N, T,
    H: tl.constexpr, K: tl.constexpr, HEADS_FIRST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the results are `[B, T, H, K]`, or with HEADS_FIRST `[B, H, T, K]`."""
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_k = tl.arange(0, BLOCK)
    mask = (o_n < N)[:, None] & (o_k < K)[None, :]
    o_from = o_n
    if HEADS_FIRST:
        o_t = o_n // H
        o_from = ((o_t // T) * H + o_n % H) * T + o_t % T
    for j in tl.static_range(3):
        p_from = p_dq if j == 0 else p_dk if j == 1 else p_dv
        p_d = p_from + o_from[:, None] * K + o_k[None, :]
        b_grad = tl.load(p_d, mask=mask, other=0.0).to(tl.float32)
        o = o_n[:, None] * (3 * K) + j * K + o_k[None, :]
        b_x = tl.load(p_x + o, mask=mask, other=0.0).to(tl.float32)
        b_share = tl.sigmoid(b_x)
        b_out = b_grad * b_share * (1.0 + b_x * (1.0 - b_share))
        tl.store(p_grad + o, round_to(b_out, p_grad.dtype.element_ty), mask=mask)


_launch_silu_heads = Launcher(_silu_heads_kernel)
_launch_silu_heads_backward = Launcher(_silu_heads_backward_kernel)


def silu_heads(x: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `[B, T, H, K]` of contiguous `[B, T, H 3 K]`."""
    shape = *x.shape[:2], x.shape[2] // (3 * head_dim), head_dim
    query, key, value = (x.new_empty(shape) for _ in range(3))
    num_rows, pointers = query.numel() // head_dim, (x, query, key, value)
    if num_rows:
        constants = {"K": head_dim} | _tile(head_dim)
        grid = triton.cdiv(num_rows, constants["ROWS"]), 1, 1
        kind = kind_of(x.device, *pointers)
        _launch_silu_heads(grid, (*pointers, num_rows), constants, kind)
    return query, key, value


def silu_heads_backward(
    grads: tuple[Tensor, Tensor, Tensor], x: Tensor, *, heads_first: bool
) -> Tensor:
    """Gradient of x from those of query, key and value, contiguous `[B, T, H, K]`.

    With `heads_first` they are contiguous `[B, H, T, K]`.
    """
    grad_x, head_dim = torch.empty_like(x), grads[0].shape[3]
    num_heads = grads[0].shape[1 if heads_first else 2]
    num_rows, pointers = grads[0].numel() // head_dim, (*grads, x, grad_x)
    if num_rows:
        constants = {"H": num_heads, "K": head_dim, "HEADS_FIRST": heads_first} | _tile(head_dim)
        grid = triton.cdiv(num_rows, constants["ROWS"]), 1, 1
        arguments = *pointers, num_rows, x.shape[1]
        _launch_silu_heads_backward(grid, arguments, constants, kind_of(x.device, *pointers))
    return grad_x


def _tile(head_dim: int) -> dict[str, int]:
    block = triton.next_power_of_2(head_dim)
    return {"ROWS": max(_TILE // block, 1), "BLOCK": block}
