"""Softmax attention of one query a sequence over a cache of keys and values, cut along the keys.

    o = sum_j exp(s_j - m) v_j / sum_j exp(s_j - m),   s_j = scale q . k_j,   m = max_j s_j,   j < length

The cache is read once: that is all that counts, so all multiprocessors have to read it, with many
bytes on their way. `split_kernel` gives each key head of each row to several programs, which share
the blocks of keys that the row has; each leaves both sums over its own keys, and their own m.
`merge_kernel` adds the sums up (FlashDecoding, pytorch.org/blog/flash-decoding). The query heads of a
key head are rows of one product, 16 of them at a time.

How many programs there are depends on the cache's capacity alone. Lengths are read on the device,
so a captured graph stays right while they grow; programs that a short row has no blocks for end at
once. Sums are float32; the weights are rounded to the values' dtype once, as the operand of a
product, and added up rounded. Offsets are 64-bit. Not differentiable; head dims above 256 and
float64 are not supported.

Legend: B sequences, H query heads, G key heads, C slots of the cache, K key dim, V value dim, M query
heads of a program, N slots a block, P splits of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_triton.launcher import Launcher, kind_of
from kernels_triton.lightning.scan import dot, round_to
from kernels_triton.tiles import padded

ROWS = 16  # query heads of a program: the least that a product takes
BLOCK_BYTES = 16384  # of keys, and as many of values
NUM_STAGES = 3  # two blocks of each are in shared memory or on their way there
PROGRAMS_PER_SM = 3  # by that memory, on Hopper: up to 192 KiB on their way
MIN_SLOTS = 128  # that a split is worth
ROUNDS = 4  # of programs after each other, so that rows of different lengths even out
MAX_SPLITS = 256  # of a row, which are merged at once; more only where they occupy the device
MERGE_VALUES = 8192  # of all splits, that a merging program takes: 64 registers a thread
LOG2_E = 1.4426950408889634


@triton.jit
def _row_length(p_lengths, i_b, C):
    """Slots that row i_b sees, int32."""
    return tl.maximum(tl.minimum(tl.load(p_lengths + i_b).to(tl.int64), C), 0).to(tl.int32)


@triton.jit
def _splits_in_use(num_blocks, num_splits, MIN_BLOCKS: tl.constexpr):
    """Splits that a row's blocks are shared by: no more than give each of them MIN_BLOCKS."""
    return tl.minimum(tl.cdiv(num_blocks, MIN_BLOCKS), num_splits)


@triton.jit(do_not_specialize=["H", "G", "C", "num_splits"])
def split_kernel(
    p_q, p_k, p_v, p_lengths, p_o, p_max, p_sum,
    s_qb, s_qh, s_kb, s_kg, s_kc, s_vb, s_vg, s_vc,
    scale, H, G, C, num_splits,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MIN_BLOCKS: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of weighted values and of weights, and the largest score, over one split of a row's keys.

    For BM query heads; the scores are in base 2.
    """
    heads = H // G
    num_tiles = tl.cdiv(heads, BM)
    i = tl.program_id(0)
    i_p = i % num_splits
    i_m = i // num_splits % num_tiles
    i_g = (i // num_splits // num_tiles % G).to(tl.int64)
    i_b = (i // num_splits // num_tiles // G).to(tl.int64)
    length = _row_length(p_lengths, i_b, C)
    num_blocks = tl.cdiv(length, BN)
    in_use = _splits_in_use(num_blocks, num_splits, MIN_BLOCKS)
    if i_p >= in_use:
        return
    share, rest = num_blocks // in_use, num_blocks % in_use
    first = (share * i_p + tl.minimum(i_p, rest)) * BN
    stop = tl.minimum(first + (share + (i_p < rest).to(tl.int32)) * BN, length)

    o_m = i_m * BM + tl.arange(0, BM)
    o_n, o_k, o_v = tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, BV)
    m_m, m_k, m_v = o_m < heads, o_k < K, o_v < V
    o_h = i_g * heads + o_m  # [BM] int64
    p_q += i_b * s_qb + o_h[:, None] * s_qh + o_k[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_k[None, :], other=0.0)  # [BM, BK]
    p_k += i_b * s_kb + i_g * s_kg
    p_v += i_b * s_vb + i_g * s_vg

    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BV], tl.float32)
    for start in tl.range(first, stop, BN, num_stages=NUM_STAGES):
        m_n = start + o_n < stop
        o_c = (start + o_n).to(tl.int64)
        p_kc = p_k + o_c[:, None] * s_kc + o_k[None, :]
        b_k = tl.load(p_kc, mask=m_n[:, None] & m_k[None, :], other=0.0)  # [BN, BK]
        p_vc = p_v + o_c[:, None] * s_vc + o_v[None, :]
        b_v = tl.load(p_vc, mask=m_n[:, None] & m_v[None, :], other=0.0)  # [BN, BV]
        # [BM, BK] @ [BK, BN] -> [BM, BN]
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BM, BN], tl.float32), "ieee") * scale
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))  # a block has a key, so this is finite
        b_w = round_to(tl.exp2(b_s - b_new[:, None]), b_v.dtype)
        b_keep = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_keep + tl.sum(b_w.to(tl.float32), 1)
        # [BM, BN] @ [BN, BV] -> [BM, BV]
        b_o = dot(b_w, b_v, b_o * b_keep[:, None], "ieee")
        b_max = b_new

    row = (i_b * H + o_h) * num_splits + i_p  # [BM] int64
    tl.store(p_max + row, b_max, mask=m_m)
    tl.store(p_sum + row, b_sum, mask=m_m)
    tl.store(p_o + row[:, None] * V + o_v[None, :], b_o, mask=m_m[:, None] & m_v[None, :])


@triton.jit(do_not_specialize=["H", "C", "num_splits"])
def merge_kernel(
    p_parts, p_max, p_sum, p_lengths, p_o,
    H, C, num_splits,
    V: tl.constexpr, BP: tl.constexpr, BV: tl.constexpr,
    BN: tl.constexpr, MIN_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Output of BV values of one head of one sequence; zeros for a row without keys."""
    i = tl.program_id(0)
    i_bh = (i // (V // BV)).to(tl.int64)
    o_v = i % (V // BV) * BV + tl.arange(0, BV)
    num_blocks = tl.cdiv(_row_length(p_lengths, i_bh // H, C), BN)
    in_use = _splits_in_use(num_blocks, num_splits, MIN_BLOCKS)
    high = float("-inf")
    total = 0.0
    b_o = tl.zeros([BV], tl.float32)
    for start in range(0, in_use, BP):
        o_p = start + tl.arange(0, BP)
        m_p = o_p < in_use
        row = i_bh * num_splits + o_p
        b_max = tl.load(p_max + row, mask=m_p, other=float("-inf"))  # [BP]
        b_sum = tl.load(p_sum + row, mask=m_p, other=0.0)  # [BP]
        b_part = tl.load(p_parts + row[:, None] * V + o_v[None, :], mask=m_p[:, None], other=0.0)
        new = tl.maximum(high, tl.max(b_max, 0))
        b_w = tl.exp2(b_max - new)
        keep = tl.exp2(high - new)
        total = total * keep + tl.sum(b_w * b_sum, 0)
        b_o = b_o * keep + tl.sum(b_w[:, None] * b_part, 0)
        high = new
    b_o = b_o / tl.where(in_use > 0, total, 1.0)
    tl.store(p_o + i_bh * V + o_v, round_to(b_o, p_o.dtype.element_ty))


_launch_split, _launch_merge = Launcher(split_kernel), Launcher(merge_kernel)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    num_multiprocessors: int,
) -> Tensor:
    """Output `[B, H, 1, V]` of row b's query over its slots below lengths[b]; no slot gives zeros.

    Args:
        query: `[B, H, 1, K]` with a contiguous last dimension.
        keys, values: `[B, G, C, K]` and `[B, G, C, V]`, G a divisor of H, last dimension contiguous.
        lengths: `[B]` int32 or int64 on the same device; what exceeds C counts as C.
        scale: of the scores.
        num_multiprocessors: of the device, to be occupied.
    """
    batch, heads, _, k_dim = query.shape
    _, groups, capacity, v_dim = values.shape
    block_k, block_v = padded(k_dim), padded(v_dim)
    block = key_block(max(block_k, block_v) * values.itemsize)
    tiles = batch * groups * -(-heads // groups // ROWS)
    splits = num_splits(capacity, tiles, num_multiprocessors)
    output = torch.empty(batch, heads, 1, v_dim, dtype=query.dtype, device=query.device)
    parts = torch.empty(batch, heads, splits, v_dim, dtype=torch.float32, device=query.device)
    highest, weights = torch.empty(
        2, batch, heads, splits, dtype=torch.float32, device=query.device
    )
    sizes = *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3]
    pointers = query, keys, values, lengths, parts, highest, weights
    shared = {"BN": block, "MIN_BLOCKS": MIN_SLOTS // block}
    constants = {"K": k_dim, "V": v_dim, "BK": block_k, "BV": block_v, "BM": ROWS, **shared}
    counts = heads, groups, capacity, splits
    _launch_split(
        (tiles * splits, 1, 1),
        (*pointers, *sizes, scale * LOG2_E, *counts),
        constants | {"NUM_STAGES": NUM_STAGES},
        (*kind_of(query.device, *pointers), *sizes),
        num_warps=8 if values.dtype == torch.float32 else 4,  # operands lie in registers then
    )
    pointers = parts, highest, weights, lengths, output
    block_p = min(triton.next_power_of_2(splits), MAX_SPLITS)
    width = min(v_dim & -v_dim, MERGE_VALUES // block_p)  # powers of 2, which divide the head dim
    _launch_merge(
        (batch * heads * (v_dim // width), 1, 1),
        (*pointers, heads, capacity, splits),
        {"V": v_dim, "BP": block_p, "BV": width, **shared},
        kind_of(query.device, *pointers),
    )
    return output


def num_splits(capacity: int, tiles: int, num_multiprocessors: int) -> int:
    """Splits of a row of `capacity` slots, where `tiles` programs have a split of their own each."""
    places = PROGRAMS_PER_SM * num_multiprocessors
    rounds = max(1, min(ROUNDS, MAX_SPLITS * tiles // places))
    return max(1, min(rounds * places // tiles, -(-capacity // MIN_SLOTS)))


def key_block(row_bytes: int) -> int:
    """Slots a block, of which a key or a value takes `row_bytes`."""
    return min(max(BLOCK_BYTES // row_bytes, 16), MIN_SLOTS)
