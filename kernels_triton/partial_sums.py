"""Sums of what several programs added up, one row each, in one order.

A gradient of a weight that all tokens share is summed by a fixed number of programs first, and their
rows here: no atomics, so the same inputs give the same bits. Legend: P programs, C columns.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels_triton.launcher import Launcher, kind_of
from kernels_triton.lightning.scan import round_to

_ROWS, _COLS = 128, 16  # a program has on the way at once


@triton.jit(do_not_specialize=["P", "C"])
def _column_sums_kernel(p_rows, p_out, P, C, ROWS: tl.constexpr, COLS: tl.constexpr):
    o_c = tl.program_id(0) * COLS + tl.arange(0, COLS)
    b_sum = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, P, ROWS):
        o_p = start + tl.arange(0, ROWS)
        mask = (o_p < P)[:, None] & (o_c < C)[None, :]
        o = o_p.to(tl.int64)[:, None] * C + o_c[None, :]
        b_sum += tl.load(p_rows + o, mask=mask, other=0.0)
    b_out = round_to(tl.sum(b_sum, 0), p_out.dtype.element_ty)
    tl.store(p_out + o_c, b_out, mask=o_c < C)


_launch_column_sums = Launcher(_column_sums_kernel)


def column_sums(rows: Tensor, out: Tensor) -> None:
    """Fill contiguous `out` of C elements, of any dtype, from contiguous `[P, C]` float32."""
    arguments = rows, out, rows.shape[0], out.numel()
    constants = {"ROWS": _ROWS, "COLS": _COLS}
    grid = triton.cdiv(out.numel(), _COLS), 1, 1
    _launch_column_sums(grid, arguments, constants, kind_of(out.device, rows, out))
