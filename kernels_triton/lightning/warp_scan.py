"""The scan of `scan.py` for Hopper, warp-specialised: copies, products and stores overlap.

Legend: B batch, H heads, T tokens, D head dim; C tokens a chunk, BB columns of a and b. Equation,
work units and parameters are those of `scan.scan_kernel`, which is this kernel's plain twin: it runs
where this one can't (interpreter, other GPUs, "high" precision) and is what the tests compare it to.

A program runs one scan of one unit. A producer warp keeps a ring of chunks filled by the copy
engine (TMA); one or two warpgroups consume it, each with its own 64 columns of c and, in
registers, its own 64 rows of the transposed state `[BC, BB]`. Per stage of the ring a barrier `full`
says that the copies have landed, and a barrier `empty` that every consumer is done with it.

In a chunk a consumer issues the products that the state waits for, then the next chunk's scores,
which wait for nothing but the copies, so that the tensor cores work while scores are weighted:
    P = B A^T (of the chunk before)    O^T = S A^T    O^T += C^T P    S += (C weighted)^T B
S and weighted C are left operands from registers; A, B, C are read as TMA wrote them.

16-bit inputs with K and V from 33 to 128; the other limits are those of the plain kernel.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

UNIT_COLUMNS = gl.constexpr(9)
ELEMENT_BYTES = gl.constexpr(2)
BC = gl.constexpr(64)  # columns of c, and rows of the state, of a consumer


@gluon.jit
def _advance(stage, phase, STAGES: gl.constexpr):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _fetch(
    ring, bars, operands, where, i_t, stage, phase, HALVES: gl.constexpr, READ: gl.constexpr
):
    """Order the copies of a chunk at token i_t, without a where nothing reads the state there."""
    b_a, b_b, b_c0, b_c1 = ring
    full, empty = bars
    a, b, c = operands
    i_b, i_h, i_c = where
    COLUMNS: gl.constexpr = b_b.shape[2] * (1 + READ) + BC * HALVES
    NUM_BYTES: gl.constexpr = b_b.shape[1] * COLUMNS * ELEMENT_BYTES
    mbarrier.wait(empty.index(stage), phase)  # protects the stage: its last readers are done
    bar = full.index(stage)
    mbarrier.expect(bar, NUM_BYTES)
    tma.async_copy_global_to_shared(b, [i_b, i_h, i_t, 0], bar, b_b.index(stage))
    if READ:
        tma.async_copy_global_to_shared(a, [i_b, i_h, i_t, 0], bar, b_a.index(stage))
    tma.async_copy_global_to_shared(c, [i_b, i_h, i_t, i_c], bar, b_c0.index(stage))
    if HALVES == 2:
        tma.async_copy_global_to_shared(c, [i_b, i_h, i_t, i_c + BC], bar, b_c1.index(stage))


@gluon.jit
def _produce(
    ring, bars, operands, where, order, counts,
    STAGES: gl.constexpr, HALVES: gl.constexpr, OUTPUT: gl.constexpr,
):  # fmt: skip
    """Keep the ring filled with the chunks of a unit, in the order of the scan."""
    first, step, i_rest = order
    num_warm, num_whole, rest = counts
    stage, phase = gl.to_tensor(0), gl.to_tensor(1)
    for n in range(num_warm):
        _fetch(ring, bars, operands, where, first + n * step, stage, phase, HALVES, False)
        stage, phase = _advance(stage, phase, STAGES)
    first += num_warm * step
    for n in range(num_whole):
        _fetch(ring, bars, operands, where, first + n * step, stage, phase, HALVES, OUTPUT)
        stage, phase = _advance(stage, phase, STAGES)
    if rest > 0:
        _fetch(ring, bars, operands, where, i_rest, stage, phase, HALVES, OUTPUT)


@gluon.jit
def _decayed(g, num_steps, factor):
    """Factor of what decays over a number of tokens."""
    return gl.exp(g * num_steps.to(gl.float32)) * factor


@gluon.jit
def _weighted(b_c, w_write, LAYOUT: gl.constexpr):
    """Columns of c as rows `[BC, C]` in registers, weighted and rounded once."""
    b_w = b_c.permute((1, 0)).load(LAYOUT).to(gl.float32) * w_write[None, :]
    return b_w.to(b_c.dtype)


@gluon.jit
def _clear(b_x, rest, LAYOUT: gl.constexpr):
    """Zero the rows of a chunk from `rest` on: they are another document's, or nobody's."""
    m_x = (gl.arange(0, b_x.shape[0], gl.SliceLayout(1, LAYOUT)) < rest)[:, None]
    b_x.store(gl.where(m_x, b_x.load(LAYOUT), 0.0).to(b_x.dtype))


@gluon.jit
def _load_state(p_states, row, o_s, m_s, SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """State `row` at offsets o_s `[BC, BB]`; zeros if row is -1 or none exist."""
    if p_states is None:
        b_s = gl.zeros(o_s.shape, gl.float32, LAYOUT)
    else:
        b_s = gl.load(p_states + row.to(gl.int64) * SIZE + o_s, mask=m_s & (row >= 0), other=0.0)
    return b_s


@gluon.jit
def _consume(
    HALF: gl.constexpr, ring, bars, scratch, outputs, where, order, counts, params, states, rows,
    DB: gl.constexpr, DC: gl.constexpr, STAGES: gl.constexpr, OUTPUT: gl.constexpr,
):  # fmt: skip
    """Carry the state over the chunks of a unit and store outputs, for half HALF of c's columns."""
    a_ring, b_ring, c_ring_0, c_ring_1 = ring
    c_ring = c_ring_0 if HALF == 0 else c_ring_1
    full, empty = bars
    p_scratch_0, p_scratch_1, o_scratch_0, o_scratch_1 = scratch
    b_ps = p_scratch_0 if HALF == 0 else p_scratch_1
    b_os = o_scratch_0 if HALF == 0 else o_scratch_1
    out, p_out = outputs
    i_b, i_h, i_c = where
    i_c += HALF * BC
    first, step, i_rest = order
    num_warm, num_whole, rest = counts
    g, scale, back, s_b, s_c, r_b, r_h, r_t = params
    p_initial, p_workspace, p_initial_back, p_workspace_back, p_final = states
    r_initial, r_workspace, r_final = rows
    C: gl.constexpr = b_ring.shape[1]
    BB: gl.constexpr = b_ring.shape[2]
    DTYPE: gl.constexpr = b_ring.dtype
    L_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BB, 16])  # [BC, BB]
    L_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])  # [BC, C], [C, C]
    L_W: gl.constexpr = gl.DotOperandLayout(0, L_S, 2)  # left operand of a product in L_S
    L_A: gl.constexpr = gl.DotOperandLayout(0, L_O, 2)
    L_T: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])  # rows of a chunk

    o_r = gl.arange(0, C, gl.SliceLayout(0, L_O))  # tokens as readers
    o_w = gl.arange(0, C, gl.SliceLayout(0, L_W))  # tokens as writers
    o_j = gl.arange(0, C, gl.SliceLayout(1, L_O))
    # From the chunk's edge to a reader, from a writer to the edge, as in the plain kernel.
    read_scale, write_scale = gl.where(back, 1.0, scale), gl.where(back, scale, 1.0)
    w_read = _decayed(g, gl.where(back, C - 1 - o_r, o_r + 1), read_scale)
    w_write = _decayed(g, gl.where(back, o_w + 1, C - 1 - o_w), write_scale)
    decay = gl.exp(g * C)
    distance = o_r[None, :] - o_j[:, None]
    distance = gl.where(back, -distance, distance)
    b_mask = gl.where(distance >= 0, _decayed(g, gl.maximum(distance, 0), scale), 0.0)

    SIZE: gl.constexpr = DB * DC
    o_c = i_c + gl.arange(0, BC, gl.SliceLayout(1, L_S))[:, None]
    o_b = gl.arange(0, BB, gl.SliceLayout(0, L_S))[None, :]
    o_s, m_s = o_c * s_c + o_b * s_b, (o_c < DC) & (o_b < DB)
    if back:
        b_s = _load_state(p_initial_back, r_initial, o_s, m_s, SIZE, L_S)
        b_s += _load_state(p_workspace_back, r_workspace, o_s, m_s, SIZE, L_S)
    else:
        b_s = _load_state(p_initial, r_initial, o_s, m_s, SIZE, L_S)
        b_s += _load_state(p_workspace, r_workspace, o_s, m_s, SIZE, L_S)

    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    num_silent = num_warm if OUTPUT else num_warm + num_whole
    for _ in range(num_silent):
        mbarrier.wait(full.index(stage), phase)
        b_w = _weighted(c_ring.index(stage), w_write, L_W)
        # [BC, C] @ [C, BB] -> [BC, BB]
        b_s = warpgroup_mma(b_w, b_ring.index(stage), b_s * decay, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = _advance(stage, phase, STAGES)

    no_scores = gl.zeros([C, C], gl.float32, L_O)
    no_output = gl.zeros([BC, C], gl.float32, L_O)
    if OUTPUT and num_whole > 0:
        i_t = first + num_warm * step
        mbarrier.wait(full.index(stage), phase)
        b_a = a_ring.index(stage).permute((1, 0))
        # [C, BB] @ [BB, C] -> [C, C], a row for each written token, a column for each reading one
        b_p = warpgroup_mma(b_ring.index(stage), b_a, no_scores, use_acc=False, is_async=True)
        b_p = warpgroup_mma_wait(0, deps=(b_p,))
        for n in range(num_whole):
            b_b, b_c = b_ring.index(stage), c_ring.index(stage)
            b_a = a_ring.index(stage).permute((1, 0))
            b_sa = gl.convert_layout(b_s.to(DTYPE), L_A)
            # [BC, BB] @ [BB, C] -> [BC, C]
            b_o = warpgroup_mma(b_sa, b_a, no_output, use_acc=False, is_async=True)
            b_ps.store((b_p * b_mask).to(DTYPE))
            fence_async_shared()
            b_o = warpgroup_mma_wait(0, deps=(b_o,))
            # [BC, C] @ [C, C] -> [BC, C]
            b_o = warpgroup_mma(b_c.permute((1, 0)), b_ps, b_o * w_read[None, :], is_async=True)
            # [BC, C] @ [C, BB] -> [BC, BB]
            b_w = _weighted(b_c, w_write, L_W)
            b_s = warpgroup_mma(b_w, b_b, b_s * decay, is_async=True)
            # The next chunk's scores; after the last chunk its own again, so as not to branch.
            more = n + 1 < num_whole
            next_stage, next_phase = _advance(stage, phase, STAGES)
            ahead, ahead_phase = (
                gl.where(more, next_stage, stage),
                gl.where(more, next_phase, phase),
            )
            mbarrier.wait(full.index(ahead), ahead_phase)
            b_a = a_ring.index(ahead).permute((1, 0))
            b_p = warpgroup_mma(b_ring.index(ahead), b_a, no_scores, use_acc=False, is_async=True)
            b_o = warpgroup_mma_wait(2, deps=(b_o,))
            tma.store_wait(0)  # protects the scratch: the output before has left it
            b_os.permute((1, 0)).store(b_o.to(DTYPE))
            fence_async_shared()
            tma.async_copy_shared_to_global(out, [i_b, i_h, i_t, i_c], b_os)
            b_s = warpgroup_mma_wait(1, deps=(b_s,))
            mbarrier.arrive(empty.index(stage), count=1)
            b_p = warpgroup_mma_wait(0, deps=(b_p,))
            stage, phase = next_stage, next_phase
            i_t += step

    if rest > 0:  # the last chunk in the scan's order is shorter
        mbarrier.wait(full.index(stage), phase)
        b_b, b_c = b_ring.index(stage), c_ring.index(stage)
        _clear(b_b, rest, L_T)  # both consumers write the same zeros
        _clear(b_c, rest, L_T)
        fence_async_shared()
        if OUTPUT:
            since = gl.maximum(gl.where(back, rest - 1 - o_r, o_r + 1), 0)
            w_read = _decayed(g, since, read_scale)
            b_a = a_ring.index(stage).permute((1, 0))
            b_p = warpgroup_mma(b_b, b_a, no_scores, use_acc=False)
            b_sa = gl.convert_layout(b_s.to(DTYPE), L_A)
            b_o = warpgroup_mma(b_sa, b_a, no_output, use_acc=False)
            b_ps.store((b_p * b_mask).to(DTYPE))
            fence_async_shared()
            b_o = warpgroup_mma(b_c.permute((1, 0)), b_ps, b_o * w_read[None, :])
            o_o = i_c + gl.arange(0, BC, gl.SliceLayout(1, L_O))[:, None]
            o_row = i_b.to(gl.int64) * r_b + i_h * r_h + (i_rest + o_r) * r_t
            p_o = p_out + o_row[None, :] * DC + o_o
            gl.store(p_o, b_o.to(DTYPE), mask=(o_r < rest)[None, :] & (o_o < DC))
        # A factor of all weights is applied after the product: a single token isn't rounded then.
        until = gl.maximum(gl.where(back, o_w, rest - 1 - o_w), 0)
        b_w = _weighted(b_c, _decayed(g, until, 1.0), L_W)
        added = warpgroup_mma(b_w, b_b, gl.zeros([BC, BB], gl.float32, L_S), use_acc=False)
        factor = gl.where(back, gl.exp(g), 1.0) * write_scale
        b_s = gl.fma(b_s, gl.exp(g * rest.to(gl.float32)), added * factor)

    if p_final is not None:
        # 0 where it matters, but not known before: offsets aren't kept in registers all the while.
        late = gl.minimum(r_final, 0)
        o_c = late + i_c + gl.arange(0, BC, gl.SliceLayout(1, L_S))[:, None]
        o_b = late + gl.arange(0, BB, gl.SliceLayout(0, L_S))[None, :]
        p_s = p_final + r_final.to(gl.int64) * SIZE + o_c * s_c + o_b * s_b
        gl.store(p_s, b_s, mask=(r_final >= 0) & (o_c < DC) & (o_b < DB))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads_per_row", "r_b", "r_h", "r_t"])
def warp_scan_kernel(
    a_0, b_0, c_0, out_0, p_out_0,
    a_1, b_1, c_1, out_1, p_out_1,
    a_2, b_2, c_2, out_2, p_out_2,
    p_units, p_log_decay, p_initial, p_workspace, p_initial_back, p_workspace_back, p_final,
    scale, heads_per_row, r_b, r_h, r_t,
    NUM_SCANS: gl.constexpr, FIRST_BACK: gl.constexpr, NUM_KEY_SCANS: gl.constexpr,
    FIRST_KEPT: gl.constexpr,
    DB: gl.constexpr, DC: gl.constexpr, BB: gl.constexpr, HALVES: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, OUTPUT: gl.constexpr,
):  # fmt: skip
    """One scan of one unit, 64 x HALVES columns of c; see `launch_scans` for the parameters."""
    i = gl.program_id(0)
    NUM_TILES: gl.constexpr = (DC + BC * HALVES - 1) // (BC * HALVES)
    i_c = (i % NUM_TILES) * (BC * HALVES)
    i_scan = i // NUM_TILES % NUM_SCANS
    i_head = i // (NUM_TILES * NUM_SCANS) % heads_per_row
    p_unit = p_units + i // (NUM_TILES * NUM_SCANS) // heads_per_row * UNIT_COLUMNS
    i_b, i_h = gl.load(p_unit), gl.load(p_unit + 1) + i_head
    begin, end = gl.load(p_unit + 2), gl.load(p_unit + 3)
    num_warm, num_tokens = gl.load(p_unit + 4), gl.load(p_unit + 5)
    r_initial, r_workspace, r_final = gl.load(p_unit + 6), gl.load(p_unit + 7), gl.load(p_unit + 8)
    r_initial = gl.where(r_initial < 0, -1, r_initial + i_head)
    r_final = gl.where((r_final < 0) | (i_scan < FIRST_KEPT), -1, r_final + i_head)
    a, b, c, out, p_out = a_0, b_0, c_0, out_0, p_out_0
    if NUM_SCANS > 1:  # noqa: SIM102  (a condition at compile time, then one at run time)
        if i_scan == 1:
            a, b, c, out, p_out = a_1, b_1, c_1, out_1, p_out_1
    if NUM_SCANS > 2:  # noqa: SIM102
        if i_scan == 2:
            a, b, c, out, p_out = a_2, b_2, c_2, out_2, p_out_2

    back = i_scan >= FIRST_BACK
    s_b = gl.where(i_scan < NUM_KEY_SCANS, 1, DC)
    s_c = gl.where(i_scan < NUM_KEY_SCANS, DB, 1)
    num_whole, rest = num_tokens // C, num_tokens % C
    first, step = gl.where(back, end - C, begin), gl.where(back, -C, C)
    i_rest = first + (num_warm + num_whole) * step + gl.where(back, C - rest, 0)

    DTYPE: gl.constexpr = b_0.dtype
    WIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BB], DTYPE)
    NARROW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BC], DTYPE)
    SCORES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], DTYPE)
    a_ring = gl.allocate_shared_memory(DTYPE, [STAGES, C, BB], WIDE)
    b_ring = gl.allocate_shared_memory(DTYPE, [STAGES, C, BB], WIDE)
    c_ring_0 = gl.allocate_shared_memory(DTYPE, [STAGES, C, BC], NARROW)
    b_p0 = gl.allocate_shared_memory(DTYPE, [C, C], SCORES)
    b_o0 = gl.allocate_shared_memory(DTYPE, [C, BC], NARROW)
    c_ring_1, b_p1, b_o1 = c_ring_0, b_p0, b_o0
    if HALVES == 2:
        c_ring_1 = gl.allocate_shared_memory(DTYPE, [STAGES, C, BC], NARROW)
        b_p1 = gl.allocate_shared_memory(DTYPE, [C, C], SCORES)
        b_o1 = gl.allocate_shared_memory(DTYPE, [C, BC], NARROW)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(empty.index(n), count=HALVES)

    ring, bars = (a_ring, b_ring, c_ring_0, c_ring_1), (full, empty)
    scratch, outputs = (b_p0, b_p1, b_o0, b_o1), (out, p_out)
    where, order, counts = (i_b, i_h, i_c), (first, step, i_rest), (num_warm, num_whole, rest)
    params = (gl.load(p_log_decay + i_h), scale, back, s_b, s_c, r_b, r_h, r_t)
    states = (p_initial, p_workspace, p_initial_back, p_workspace_back, p_final)
    rows = (r_initial, r_workspace, r_final)
    # Constants stay such only where the arguments stand in the call.
    if HALVES == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    0, ring, bars, scratch, outputs, where, order, counts, params, states, rows,
                    DB, DC, STAGES, OUTPUT,
                )),
                (_consume, (
                    1, ring, bars, scratch, outputs, where, order, counts, params, states, rows,
                    DB, DC, STAGES, OUTPUT,
                )),
                (_produce, (ring, bars, (a, b, c), where, order, counts, STAGES, HALVES, OUTPUT)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    0, ring, bars, scratch, outputs, where, order, counts, params, states, rows,
                    DB, DC, STAGES, OUTPUT,
                )),
                (_produce, (ring, bars, (a, b, c), where, order, counts, STAGES, HALVES, OUTPUT)),
            ],
            [1],
            [24],
        )  # fmt: skip
