"""Lightning attention, forward and backward, as scans over chunks of tokens.

Legend: B batch, H heads, T tokens, K key dim, V value dim; C tokens a chunk, U work units.

The recurrence S_t = exp(g) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t (MiniMax-01, arXiv
2501.08313) and its three gradients are one scan over tokens a, b, c. It carries the state
transposed, S = sum of c b^T; in chunks (Lightning Attention-2, arXiv 2401.04658; g <= 0):
    o_i = scale (exp(g (i+1)) S a_i + sum over j <= i of exp(g (i-j)) (a_i . b_j) c_j)
    S  <- exp(g C) S + sum over j of exp(g (C-1-j)) c_j b_j^T
Forward in time, o = scan(q, k, v) and dq = scan(do, v, k), the latter from the initial state
transposed. Backward in time, dk = scan(v, do, q) and dv = scan(k, q, do): i and j count from the
right, and S is the gradient of the state, read as exp(g i) S a_i and written with
scale exp(g (j+1)) c_j b_j^T, so that it starts as the gradient of the final state and ends as that
of the initial one.

A program runs one scan of one work unit (a stretch of a head) for one tile of c. The float32 state
stays in registers as an accumulator `[BC, BB]`; as the left operand of S a^T it enters the tensor
cores from there, and a, b, c enter from shared memory as the copy engine (TMA) put them there.
Nothing but results is written. Units come in a table that the caller plans: whole sequences, packed
documents, or segments. A segment starts some tokens early with zero state ("warm" chunks), or with
a state of the workspace, which a first pass over the segments and `prefix_kernel` fill.

16-bit inputs: scores, state and weighted c are rounded once, as operands of products; with SPLIT
each enters as a high and a low half. With SPLIT and in float32 a chunk's share is summed up apart
before it joins the state. Offsets are 64-bit. Not supported: a gradient of g, head dims
above 256, float64.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
UNIT_COLUMNS = tl.constexpr(9)


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
    """x y + acc in float32; the interpreter's own products of 16-bit operands are wrong."""
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def _dot_wide_left(x, y, acc, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    """x y + acc for a float32 x that is rounded, or split, to the dtype of y."""
    high = round_to(x, y.dtype)
    if SPLIT:
        low = round_to(x - high.to(tl.float32), y.dtype)
        acc = dot(low, y, acc, PRECISION)
    return dot(high, y, acc, PRECISION)


@triton.jit
def _dot_wide_right(x, y, acc, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    """x y + acc for a float32 y that is rounded, or split, to the dtype of x."""
    high = round_to(y, x.dtype)
    if SPLIT:
        low = round_to(y - high.to(tl.float32), x.dtype)
        acc = dot(x, low, acc, PRECISION)
    return dot(x, high, acc, PRECISION)


@triton.jit
def _load(
    x, i_b, i_h, i_t, i_d, num_rows,
    ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr,
    TMA: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Tile `[ROWS, COLS]` at token i_t and column i_d; rows from num_rows on are zeros."""
    o_r = tl.arange(0, ROWS)
    m_r = (o_r < num_rows)[:, None]
    if TMA:
        b_x = x.load([i_b, i_h, i_t, i_d]).reshape(ROWS, COLS)
        if not WHOLE:
            b_x = tl.where(m_r, b_x, 0.0)
    else:
        p_x, s_b, s_h, s_t = x
        o_d = i_d + tl.arange(0, COLS)
        m_d = (o_d < D)[None, :]
        p_x += i_b.to(tl.int64) * s_b + i_h.to(tl.int64) * s_h
        p_x = p_x + (i_t + o_r).to(tl.int64)[:, None] * s_t + o_d[None, :]
        if not WHOLE:
            b_x = tl.load(p_x, mask=m_r & m_d, other=0.0)
        elif D % COLS != 0:
            b_x = tl.load(p_x, mask=m_d, other=0.0)
        else:
            b_x = tl.load(p_x)
    return b_x


@triton.jit
def _store(
    x, p_x, b_x, i_b, i_h, i_t, i_d, num_rows, r_b, r_h, r_t,
    ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr,
    TMA: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Round and store a float32 tile, a whole one through TMA; strides count rows of D columns."""
    b_x = round_to(b_x, p_x.dtype.element_ty)
    if TMA and WHOLE:
        x.store([i_b, i_h, i_t, i_d], b_x.reshape(1, 1, ROWS, COLS))
    else:
        o_r = tl.arange(0, ROWS)
        o_d = i_d + tl.arange(0, COLS)
        o_t = i_b.to(tl.int64) * r_b + i_h * r_h + (i_t + o_r) * r_t
        m_x = (o_r < num_rows)[:, None] & (o_d < D)[None, :]
        tl.store(p_x + o_t[:, None] * D + o_d[None, :], b_x, mask=m_x)


@triton.jit
def _read(
    b_s, b_a, b_b, b_c, b_mask, w_read, PRECISION: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Outputs of a chunk `[BC, C]`: past the chunk's edge from the state, inside it from scores."""
    zeros = tl.zeros([b_b.shape[0], b_a.shape[0]], tl.float32)
    # [C, BB] @ [BB, C] -> [C, C], a row for each written token, a column for each reading one
    b_p = dot(b_b, tl.trans(b_a), zeros, PRECISION) * b_mask
    zeros = tl.zeros([b_s.shape[0], b_a.shape[0]], tl.float32)
    # [BC, BB] @ [BB, C] -> [BC, C]
    b_o = _dot_wide_left(b_s, tl.trans(b_a), zeros, PRECISION, SPLIT) * w_read[None, :]
    # [BC, C] @ [C, C] -> [BC, C]
    return _dot_wide_right(tl.trans(b_c), b_p, b_o, PRECISION, SPLIT)


@triton.jit
def _write(
    b_s, b_b, b_c, w_write, decay, factor,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """State `[BC, BB]` after a chunk.

    APART adds the chunk's product, times `factor`, as a whole: tensor cores truncate what they
    accumulate, and a float32 sum over all tokens one by one is rounded once a token.
    """
    weighted = tl.trans(b_c).to(tl.float32) * w_write[None, :]
    # [BC, C] @ [C, BB] -> [BC, BB]
    if APART:
        zeros = tl.zeros(b_s.shape, tl.float32)
        added = _dot_wide_left(weighted, b_b, zeros, PRECISION, SPLIT)
        b_s = tl.fma(b_s, decay, added * factor)
    else:
        b_s = _dot_wide_left(weighted, b_b, b_s * decay, PRECISION, SPLIT)
    return b_s


@triton.jit
def _load_state(p_states, row, SIZE: tl.constexpr, o_c, o_b, m_state):
    """State `row` at offsets o_c `[BC, 1]` and o_b `[1, BB]`; zeros if row is -1 or none exist."""
    if p_states is None:
        b_s = tl.zeros(m_state.shape, tl.float32)
    else:
        p_s = p_states + row.to(tl.int64) * SIZE + o_c + o_b
        b_s = tl.load(p_s, mask=m_state & (row >= 0), other=0.0)
    return b_s


@triton.jit(do_not_specialize=["heads_per_row", "r_b", "r_h", "r_t"])
def scan_kernel(
    a_0, b_0, c_0, out_0, p_out_0,
    a_1, b_1, c_1, out_1, p_out_1,
    a_2, b_2, c_2, out_2, p_out_2,
    p_units, p_log_decay, p_initial, p_workspace, p_initial_back, p_workspace_back, p_final,
    scale, heads_per_row, r_b, r_h, r_t,
    NUM_SCANS: tl.constexpr, FIRST_BACK: tl.constexpr, NUM_KEY_SCANS: tl.constexpr,
    FIRST_KEPT: tl.constexpr,
    DB: tl.constexpr, DC: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, C: tl.constexpr,
    NUM_STAGES: tl.constexpr, OUTPUT: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One scan of one unit, one tile of c; see `launch_scans` for the parameters."""
    i = tl.program_id(0)
    NUM_TILES: tl.constexpr = (DC + BC - 1) // BC
    i_c = (i % NUM_TILES) * BC
    i_scan = i // NUM_TILES % NUM_SCANS
    i_head = i // (NUM_TILES * NUM_SCANS) % heads_per_row
    p_unit = p_units + i // (NUM_TILES * NUM_SCANS) // heads_per_row * UNIT_COLUMNS
    i_b, i_h = tl.load(p_unit), tl.load(p_unit + 1) + i_head
    begin, end = tl.load(p_unit + 2), tl.load(p_unit + 3)
    num_warm, num_tokens = tl.load(p_unit + 4), tl.load(p_unit + 5)
    a, b, c, out, p_out = a_0, b_0, c_0, out_0, p_out_0
    if NUM_SCANS > 1:  # noqa: SIM102  (a condition at compile time, then one at run time)
        if i_scan == 1:
            a, b, c, out, p_out = a_1, b_1, c_1, out_1, p_out_1
    if NUM_SCANS > 2:  # noqa: SIM102
        if i_scan == 2:
            a, b, c, out, p_out = a_2, b_2, c_2, out_2, p_out_2

    # Distances that a state travels from the chunk's edge to its reader and from a writer to the
    # edge: backward in time a read costs one step less, and a write one more.
    back = i_scan >= FIRST_BACK
    g = tl.load(p_log_decay + i_h)
    o_i = tl.arange(0, C)
    read_scale, write_scale = tl.where(back, 1.0, scale), tl.where(back, scale, 1.0)
    w_read = tl.exp(g * tl.where(back, C - 1 - o_i, o_i + 1)) * read_scale
    w_write = tl.exp(g * tl.where(back, o_i + 1, C - 1 - o_i)) * write_scale
    decay = tl.exp(g * C)
    distance = o_i[None, :] - o_i[:, None]
    distance = tl.where(back, -distance, distance)
    b_mask = tl.where(distance >= 0, tl.exp(g * tl.maximum(distance, 0)), 0.0) * scale

    # States lie as [K, V] in memory: b holds keys in the scans of o and dv, c in those of dq and dk.
    SIZE: tl.constexpr = DB * DC
    s_b, s_c = tl.where(i_scan < NUM_KEY_SCANS, 1, DC), tl.where(i_scan < NUM_KEY_SCANS, DB, 1)
    o_b, o_c = tl.arange(0, BB)[None, :], i_c + tl.arange(0, BC)[:, None]
    m_state = (o_c < DC) & (o_b < DB)
    r_workspace, r_initial = tl.load(p_unit + 7), tl.load(p_unit + 6)
    r_initial = tl.where(r_initial < 0, -1, r_initial + i_head)
    if back:
        b_s = _load_state(p_initial_back, r_initial, SIZE, o_c * s_c, o_b * s_b, m_state)
        b_s += _load_state(p_workspace_back, r_workspace, SIZE, o_c * s_c, o_b * s_b, m_state)
    else:
        b_s = _load_state(p_initial, r_initial, SIZE, o_c * s_c, o_b * s_b, m_state)
        b_s += _load_state(p_workspace, r_workspace, SIZE, o_c * s_c, o_b * s_b, m_state)

    APART: tl.constexpr = SPLIT or p_out_0.dtype.element_ty == tl.float32
    first, step = tl.where(back, end - C, begin), tl.where(back, -C, C)
    if OUTPUT:
        for n in tl.range(0, num_warm, num_stages=NUM_STAGES):
            i_t = first + n * step
            b_b = _load(b, i_b, i_h, i_t, 0, C, C, BB, DB, TMA, True)
            b_c = _load(c, i_b, i_h, i_t, i_c, C, C, BC, DC, TMA, True)
            b_s = _write(b_s, b_b, b_c, w_write, decay, 1.0, PRECISION, SPLIT, APART)
        first += num_warm * step
    for n in tl.range(0, num_tokens // C, num_stages=NUM_STAGES):
        i_t = first + n * step
        b_b = _load(b, i_b, i_h, i_t, 0, C, C, BB, DB, TMA, True)
        b_c = _load(c, i_b, i_h, i_t, i_c, C, C, BC, DC, TMA, True)
        if OUTPUT:
            b_a = _load(a, i_b, i_h, i_t, 0, C, C, BB, DB, TMA, True)
            b_o = _read(b_s, b_a, b_b, b_c, b_mask, w_read, PRECISION, SPLIT)
            b_o = tl.trans(b_o)
            _store(out, p_out, b_o, i_b, i_h, i_t, i_c, C, r_b, r_h, r_t, C, BC, DC, TMA, True)
        b_s = _write(b_s, b_b, b_c, w_write, decay, 1.0, PRECISION, SPLIT, APART)

    rest = num_tokens % C
    if rest > 0:  # the last chunk in the scan's order is shorter
        first += num_tokens // C * step
        i_t = tl.where(back, first + C - rest, first)
        since = tl.maximum(tl.where(back, rest - 1 - o_i, o_i + 1), 0)
        until = tl.maximum(tl.where(back, o_i, rest - 1 - o_i), 0)
        w_read, w_write = tl.exp(g * since) * read_scale, tl.exp(g * until)
        # A factor of all weights is applied after the product: a single token isn't rounded then.
        factor = tl.where(back, tl.exp(g), 1.0) * write_scale
        b_b = _load(b, i_b, i_h, i_t, 0, rest, C, BB, DB, TMA, False)
        b_c = _load(c, i_b, i_h, i_t, i_c, rest, C, BC, DC, TMA, False)
        if OUTPUT:
            b_a = _load(a, i_b, i_h, i_t, 0, rest, C, BB, DB, TMA, False)
            b_o = _read(b_s, b_a, b_b, b_c, b_mask, w_read, PRECISION, SPLIT)
            b_o = tl.trans(b_o)
            _store(out, p_out, b_o, i_b, i_h, i_t, i_c, rest, r_b, r_h, r_t, C, BC, DC, TMA, False)
        decay = tl.exp(g * rest)
        b_s = _write(b_s, b_b, b_c, w_write, decay, factor, PRECISION, SPLIT, True)

    if p_final is not None:
        r_final = tl.load(p_unit + 8)
        kept = (r_final >= 0) & (i_scan >= FIRST_KEPT)
        # 0 where it matters, but not known before: offsets aren't kept in registers all the while.
        late = tl.minimum(r_final, 0)
        o_b, o_c = late + tl.arange(0, BB)[None, :], late + i_c + tl.arange(0, BC)[:, None]
        p_s = p_final + (r_final + i_head).to(tl.int64) * SIZE + o_c * s_c + o_b * s_b
        tl.store(p_s, b_s, mask=kept & (o_c < DC) & (o_b < DB))


@triton.jit
def prefix_kernel(
    p_states, p_chains, p_log_decay, p_initial,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Turn what each segment adds to a state into the state that enters it, in place.

    A program follows BLOCK elements of the states of one chain of segments.
    """
    p_chain = p_chains + tl.program_id(0) * 5
    i_h, r_initial = tl.load(p_chain), tl.load(p_chain + 1)
    row, num_rows, num_chunks = tl.load(p_chain + 2), tl.load(p_chain + 3), tl.load(p_chain + 4)
    decay = tl.exp(tl.load(p_log_decay + i_h) * C * num_chunks)
    o_s = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < SIZE
    b_s = _load_state(p_initial, r_initial, SIZE, o_s, 0, m_s)
    p_row = p_states + row.to(tl.int64) * SIZE + o_s
    for _ in tl.range(0, num_rows - 1, num_stages=4):  # a row is loaded before it is overwritten
        b_added = tl.load(p_row, mask=m_s)
        tl.store(p_row, b_s, mask=m_s)
        b_s = b_s * decay + b_added
        p_row += SIZE
    tl.store(p_row, b_s, mask=m_s)
