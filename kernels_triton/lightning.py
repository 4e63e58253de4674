"""Lightning attention, forward and backward, as scans over chunks of tokens.

Legend: B batch, H heads, T tokens, K key dim, V value dim; C tokens a chunk, U work units.

The recurrence S_t = exp(g) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t and its three gradients are
one scan. With state S (of T tokens a, b, c) transposed, `[c, b]`, and g <= 0:
    forward in time    o_i = scale (exp(g (i+1)) S a_i + sum over j <= i of exp(g (i-j)) (a_i.b_j) c_j)
                       S  <- exp(g C) S + sum over j of exp(g (C-1-j)) c_j b_j^T
    o  = scan(q, k, v),  dq = scan(do, v, k), which starts from the initial state transposed;
    backward in time   i and j count from the right, S holds the gradient of the state, so it is
                       read as exp(g i) S a_i and written with scale exp(g (j+1)) c_j b_j^T:
    dk = scan(v, do, q), dv = scan(k, q, do); both start from the gradient of the final state and
    end with that of the initial one.
Source: MiniMax-01 (arXiv 2501.08313), chunked as in Lightning Attention-2 (arXiv 2401.04658).

A program runs one scan of one work unit (a stretch of one head) for one tile of c. The float32
state stays in registers as the accumulator `[BC, BB]`; being the left operand of S a^T it goes to
the tensor cores from there, and a, b, c come from shared memory as the copy engine (TMA) put them.
Nothing but results is written. Units come in a table that the caller plans: whole sequences,
packed documents, or segments. A segment starts with zero state some tokens early ("warm"), or with
a state from the workspace, which a first pass over the segments and `prefix_kernel` fill.

16-bit inputs: the scores, the state and the weighted c are rounded to the inputs' dtype once, as
operands; SPLIT keeps each as a high and a low half instead. Not supported: a gradient of g, head
dims above 256, float64.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels_triton.tiles import Tile, scan_tile

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
UNIT_COLUMNS = tl.constexpr(9)


class Schedule(NamedTuple):
    """Work units on the device, int32, and what they share. Longest units come first.

    A row of `units` and `state_units` `[U, 9]`: batch, head, first token, end, warm chunks, tokens
    after those, row of the initial states (-1: starts at zero), row of the workspace (-1: none),
    row of the final states (-1: the state is dropped). A scan backward in time reads the same row
    from `end` down, a scan forward in time from the first token up. With `heads_per_row` > 1, a row
    stands for that many heads, and its state rows are those of the first.
    A row of `chains` `[N, 5]`: head, row of the initial states, first workspace row, number of
    workspace rows, tokens a row.
    """

    units: Tensor
    heads_per_row: int = 1
    state_units: Tensor | None = None
    chains: Tensor | None = None
    num_workspace_rows: int = 0


class Scan(NamedTuple):
    """Operands `[B, H, T, D]` of one scan and where its result goes."""

    a: Tensor
    b: Tensor
    c: Tensor
    out: Tensor


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round to nearest even; the interpreter's own cast to bfloat16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr):
    """x @ y + acc in float32; the interpreter's own products of 16-bit operands are wrong."""
    if INTERPRETED:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def load_tile(x, i_b, i_h, i_t, i_d, num_rows, ROWS: tl.constexpr, COLS: tl.constexpr,
              D: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """Tile `[ROWS, COLS]` of x at token i_t and column i_d; rows from num_rows on are zeros."""
    o_r = tl.arange(0, ROWS)
    m_r = o_r[:, None] < num_rows
    if TMA:
        b_x = x.load([i_b, i_h, i_t, i_d]).reshape(ROWS, COLS)
        if not WHOLE:
            b_x = tl.where(m_r, b_x, 0.0)
        return b_x
    p_x, s_b, s_h, s_t = x
    o_d = i_d + tl.arange(0, COLS)
    p_x += i_b.to(tl.int64) * s_b + i_h.to(tl.int64) * s_h + i_t.to(tl.int64) * s_t
    p_rows = p_x + o_r.to(tl.int64)[:, None] * s_t + o_d[None, :]
    if not WHOLE:
        return tl.load(p_rows, mask=m_r & (o_d < D)[None, :], other=0.0)
    if D % COLS == 0:
        return tl.load(p_rows)
    return tl.load(p_rows, mask=(o_d < D)[None, :], other=0.0)
