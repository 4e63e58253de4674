"""A short causal depthwise convolution along the tokens of each sequence, and its gradients.

    y_t = sum over w < W of weight[:, W-1-w] * x_{t-w}

Before the start of a sequence are zeros, or its last inputs of an earlier call. In the backward the
gradients of x and of the weight are made of the same pairs, x_t and grad y_{t+w}: a program reads a
tile of x and W tiles of the gradient that overlap, so that memory is read once. A fixed number of
programs share the tokens, each adds up the weight's gradient over its own, and `partial_sums` adds
theirs. All arithmetic is float32, offsets are 64-bit.

Legend: R tokens of all rows or sequences, T tokens a row, D channels, W taps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_triton.launcher import Launcher, kind_of
from kernels_triton.lightning.scan import round_to
from kernels_triton.partial_sums import column_sums

_WIDTH = 128  # channels of a program
_TILE, _BACKWARD_TILE = 2048, 1024  # values of a tile: 16 and 8 a thread
_PROGRAMS = 1056  # of a backward, 8 to each multiprocessor of an H100


@triton.jit(do_not_specialize=["R", "T"])
def _convolution_kernel(
    p_x, p_sequence, p_before, p_weight, p_out, R, T,
    D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS tokens, BLOCK channels; `p_before` `[rows, W-1, D]` holds earlier inputs."""
    o_t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_t, m_d = o_t < R, o_d < D
    if p_sequence is not None:
        b_own = tl.load(p_sequence + o_t, mask=m_t, other=-1)
    b_out = tl.zeros((ROWS, BLOCK), tl.float32)
    for w in tl.static_range(W):
        if p_sequence is not None:
            m_w = m_t & (o_t >= w)
            m_w &= tl.load(p_sequence + o_t - w, mask=m_w, other=-2) == b_own
        else:
            m_w = m_t & (o_t % T >= w)
        o = (o_t - w).to(tl.int64)[:, None] * D + o_d[None, :]
        mask = m_w[:, None] & m_d[None, :]
        b_x = tl.load(p_x + o, mask=mask, other=0.0).to(tl.float32)
        if p_before is not None:
            o_b = (o_t // T).to(tl.int64) * (W - 1) + W - 1 + o_t % T - w
            mask = (m_t & (o_t % T < w))[:, None] & m_d[None, :]
            p_b = p_before + o_b[:, None] * D + o_d[None, :]
            b_x += tl.load(p_b, mask=mask, other=0.0).to(tl.float32)
        b_weight = tl.load(p_weight + o_d * W + W - 1 - w, mask=m_d, other=0.0).to(tl.float32)
        b_out += b_x * b_weight[None, :]
    o = o_t.to(tl.int64)[:, None] * D + o_d[None, :]
    mask = m_t[:, None] & m_d[None, :]
    tl.store(p_out + o, round_to(b_out, p_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R", "T"])
def _convolution_backward_kernel(
    p_grad, p_x, p_sequence, p_weight, p_grad_x, p_sums, R, T,
    D: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every so many tiles of ROWS tokens, BLOCK channels; TAPS is W or the power of two above it.

    The program's share of the weight's gradient goes to `p_sums` `[programs, D, W]`.
    """
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < D
    o_w = tl.arange(0, TAPS)
    o_weight = o_d[None, :] * W + (W - 1 - o_w)[:, None]
    m_weight = (o_w < W)[:, None] & m_d[None, :]
    b_weight = tl.load(p_weight + o_weight, mask=m_weight, other=0.0).to(tl.float32)
    b_sum = tl.zeros((TAPS, ROWS, BLOCK), tl.float32)
    for i_tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        o_t = i_tile * ROWS + tl.arange(0, ROWS)
        m_t = o_t < R
        o_g = o_t[None, :] + o_w[:, None]  # [TAPS, ROWS], the tokens that read x
        if p_sequence is not None:
            m_g = (o_w < W)[:, None] & (o_g < R)
            b_own = tl.load(p_sequence + o_t, mask=m_t, other=-1)
            m_g &= tl.load(p_sequence + o_g, mask=m_g, other=-2) == b_own[None, :]
        else:
            m_g = (o_w < W)[:, None] & m_t[None, :] & ((o_t % T)[None, :] + o_w[:, None] < T)
        o = o_g.to(tl.int64)[:, :, None] * D + o_d[None, None, :]
        mask = m_g[:, :, None] & m_d[None, None, :]
        b_grad = tl.load(p_grad + o, mask=mask, other=0.0).to(tl.float32)
        o = o_t.to(tl.int64)[:, None] * D + o_d[None, :]
        mask = m_t[:, None] & m_d[None, :]
        b_x = tl.load(p_x + o, mask=mask, other=0.0).to(tl.float32)
        b_sum += b_grad * b_x[None, :, :]
        b_out = tl.sum(b_grad * b_weight[:, None, :], 0)
        tl.store(p_grad_x + o, round_to(b_out, p_grad_x.dtype.element_ty), mask=mask)
    p_own = p_sums + tl.program_id(0) * D * W + o_weight
    tl.store(p_own, tl.sum(b_sum, 1), mask=m_weight)


_launch_convolution = Launcher(_convolution_kernel)
_launch_convolution_backward = Launcher(_convolution_backward_kernel)


def convolution(
    x: Tensor, weight: Tensor, sequence: Tensor | None = None, before: Tensor | None = None
) -> Tensor:
    """`[B, T, D]` of contiguous x like it and weight `[D, W]`, of one dtype.

    Each row of x is a sequence, or with `sequence` `[B T]`, the number of each token's, every run of
    equal numbers. `before` `[B, W-1, D]` are the inputs before those of rows.
    """
    output = torch.empty_like(x)
    if x.numel() == 0:
        return output
    (channels, taps), num_tokens = weight.shape, x.numel() // weight.shape[0]
    constants = {"D": channels, "W": taps} | _tile(channels, _TILE)
    pointers = x, sequence, before, weight, output
    grid = triton.cdiv(num_tokens, constants["ROWS"]), triton.cdiv(channels, constants["BLOCK"]), 1
    arguments = *pointers, num_tokens, x.shape[1]
    _launch_convolution(grid, arguments, constants, kind_of(x.device, *pointers))
    return output


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, sequence: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight from that of the result, contiguous like x."""
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    if x.numel() == 0:
        return grad_x, grad_weight.zero_()
    (channels, taps), num_tokens = weight.shape, x.numel() // weight.shape[0]
    tile = _tile(channels, _BACKWARD_TILE)
    constants = {"D": channels, "W": taps, "TAPS": triton.next_power_of_2(taps)} | tile
    num_blocks = triton.cdiv(channels, tile["BLOCK"])
    num_tiles = triton.cdiv(num_tokens, tile["ROWS"])
    num_programs = min(num_tiles, max(_PROGRAMS // num_blocks, 1))
    sums = x.new_empty(num_programs, channels * taps, dtype=torch.float32)
    pointers = grad, x, sequence, weight, grad_x, sums
    arguments, grid = (*pointers, num_tokens, x.shape[1]), (num_programs, num_blocks, 1)
    _launch_convolution_backward(grid, arguments, constants, kind_of(x.device, *pointers))
    column_sums(sums, grad_weight)
    return grad_x, grad_weight


def _tile(channels: int, size: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(channels), _WIDTH)
    return {"ROWS": size // block, "BLOCK": block}
