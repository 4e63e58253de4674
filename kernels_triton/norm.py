"""RMSNorm of rows, of a sum of two if wanted, behind a gate or times a scale a row, and its gradients.

    z = x  or  alpha x + beta y
    out = weight * z * rsqrt(mean(z^2) + eps)  [* sigmoid(gate)  or  * scale of the row]

Each tensor is read and written once, in float32 arithmetic; a sum z is never rounded. A program holds
whole rows in registers, several where they are short, so nothing but the inputs is kept for the
backward: what it needs of a row is two sums, which it takes together. There a fixed number of
programs share the rows, each adds up the weight's gradient over its own, and `partial_sums` adds
theirs. Offsets are 64-bit. Not supported: rows of more than 8192 channels,
which would spill.

Legend: N rows, D channels, S scales: row n has number n modulo S.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_triton.launcher import Launcher, kind_of
from kernels_triton.lightning.scan import round_to
from kernels_triton.partial_sums import column_sums

_TILE = 2048  # channels of all rows that four warps hold: 16 a thread of each tensor
_PROGRAMS = 528  # of a backward, 4 to each multiprocessor of an H100


@triton.jit
def _load_sum(p_x, p_y, o, mask, alpha, beta):
    b_x = tl.load(p_x + o, mask=mask, other=0.0).to(tl.float32)
    if p_y is not None:
        b_x = alpha * b_x + beta * tl.load(p_y + o, mask=mask, other=0.0).to(tl.float32)
    return b_x


@triton.jit(do_not_specialize=["N", "S"])
def _rms_norm_kernel(
    p_x, p_y, p_gate, p_scale, p_weight, p_out, alpha, beta, eps, N, S,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows."""
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK)
    mask = (o_n < N)[:, None] & (o_d < D)[None, :]
    o = o_n[:, None] * D + o_d[None, :]
    b_x = _load_sum(p_x, p_y, o, mask, alpha, beta)
    b_weight = tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)
    if p_scale is not None:
        b_rstd *= tl.load(p_scale + o_n % S, mask=o_n < N, other=0.0)
    b_out = b_x * b_rstd[:, None] * b_weight[None, :]
    if p_gate is not None:
        b_out *= tl.sigmoid(tl.load(p_gate + o, mask=mask, other=0.0).to(tl.float32))
    tl.store(p_out + o, round_to(b_out, p_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "S"])
def _rms_norm_backward_kernel(
    p_grad, p_x, p_y, p_gate, p_scale, p_weight,
    p_grad_x, p_grad_y, p_grad_gate, p_grad_scale, p_sums,
    alpha, beta, eps, N, S, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every so many tiles of ROWS rows; their share of the weight's gradient goes to `p_sums`."""
    o_d = tl.arange(0, BLOCK)
    b_weight = tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    b_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for i_tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        o_n = (i_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (o_n < N)[:, None] & (o_d < D)[None, :]
        o = o_n[:, None] * D + o_d[None, :]
        b_x = _load_sum(p_x, p_y, o, mask, alpha, beta)
        b_grad = tl.load(p_grad + o, mask=mask, other=0.0).to(tl.float32)
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]
        b_normed = b_x * b_rstd
        if p_gate is not None:
            b_open = tl.sigmoid(tl.load(p_gate + o, mask=mask, other=0.0).to(tl.float32))
            b_out = b_grad * b_normed * b_weight * b_open * (1.0 - b_open)
            tl.store(p_grad_gate + o, round_to(b_out, p_grad_gate.dtype.element_ty), mask=mask)
            b_grad *= b_open
        if p_scale is not None:
            b_out = tl.sum(b_grad * b_normed * b_weight, 1)
            tl.store(p_grad_scale + o_n, b_out, mask=o_n < N)
            b_grad *= tl.load(p_scale + o_n % S, mask=o_n < N, other=0.0)[:, None]
        b_sum += b_grad * b_normed
        b_slope = b_grad * b_weight
        b_along = tl.sum(b_slope * b_x, 1)[:, None] / D * b_rstd
        b_out = b_rstd * (b_slope - b_normed * b_along)
        if p_y is not None:
            tl.store(p_grad_y + o, round_to(beta * b_out, p_grad_y.dtype.element_ty), mask=mask)
            b_out *= alpha
        tl.store(p_grad_x + o, round_to(b_out, p_grad_x.dtype.element_ty), mask=mask)
    tl.store(p_sums + tl.program_id(0) * D + o_d, tl.sum(b_sum, 0), mask=o_d < D)


_launch_rms_norm = Launcher(_rms_norm_kernel)
_launch_rms_norm_backward = Launcher(_rms_norm_backward_kernel)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """The result, like x; x, y and gate are contiguous `[..., D]`, weight `[D]`, of one dtype.

    `scale` is contiguous float32 of S elements, and S a divisor of N. With it there is no gate.
    """
    output = torch.empty_like(x)
    if x.numel() == 0:
        return output
    pointers = x, y, gate, scale, weight, output
    constants, num_warps = _tile(weight.shape[0])
    num_rows = x.numel() // weight.shape[0]
    num_scales = num_rows if scale is None else scale.numel()
    arguments = *pointers, float(alpha), float(beta), eps, num_rows, num_scales
    grid = triton.cdiv(num_rows, constants["ROWS"]), 1, 1
    kind = kind_of(x.device, *pointers)
    _launch_rms_norm(grid, arguments, constants, kind, num_warps=num_warps)
    return output


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Gradients of x, y, gate, scale and weight from that of the result, contiguous like x.

    That of the scale is `[N]` float32, a row's own.
    """
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    grad_y, grad_gate = (None if z is None else torch.empty_like(z) for z in (y, gate))
    num_rows = x.numel() // weight.shape[0]
    grad_scale = None if scale is None else x.new_empty(num_rows, dtype=torch.float32)
    if num_rows == 0:
        return grad_x, grad_y, grad_gate, grad_scale, grad_weight.zero_()
    constants, num_warps = _tile(weight.shape[0])
    num_programs = min(triton.cdiv(num_rows, constants["ROWS"]), _PROGRAMS)
    sums = x.new_empty(num_programs, weight.shape[0], dtype=torch.float32)
    inputs, grads = (grad, x, y, gate, scale, weight), (grad_x, grad_y, grad_gate, grad_scale)
    pointers = *inputs, *grads, sums
    num_scales = num_rows if scale is None else scale.numel()
    arguments = *pointers, float(alpha), float(beta), eps, num_rows, num_scales
    kind = kind_of(x.device, *pointers)
    _launch_rms_norm_backward((num_programs, 1, 1), arguments, constants, kind, num_warps=num_warps)
    column_sums(sums, grad_weight)
    return *grads, grad_weight


def _tile(width: int) -> tuple[dict[str, int], int]:
    """Constants of the kernels for rows of so many channels, and warps: 16 channels a thread."""
    block = triton.next_power_of_2(width)
    rows = max(_TILE // block, 1)
    return {"D": width, "ROWS": rows, "BLOCK": block}, max(rows * block // 512, 4)
