"""One decoding step of lightning attention for a batch of sequences, their states updated in place.

    S <- exp(g) S + k v^T        o = scale q^T S

The state `[K, V]` float32 of each head is read and written once: 8 K V bytes are all that counts.
A program takes all keys and a tile of the values of one head; the states are rows of a pool, of
which `slots` names each sequence's own. Offsets are 64-bit. Not differentiable.

Legend: B sequences, H heads, P rows of the state pool, K key dim, V value dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_triton.launcher import Launcher, kind_of
from kernels_triton.lightning.scan import round_to
from kernels_triton.tiles import decode_width, padded


@triton.jit
def decode_kernel(
    p_q, p_k, p_v, p_log_decay, p_state, p_slots, p_o,
    s_qb, s_qh, s_kb, s_kh, s_vb, s_vh, s_sp, s_sh, s_sk,
    scale, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """State and output of one head of one sequence, BV values."""
    NUM_TILES: tl.constexpr = (V + BV - 1) // BV
    i = tl.program_id(0)
    i_h = (i // NUM_TILES % H).to(tl.int64)
    i_b = (i // NUM_TILES // H).to(tl.int64)
    row = i_b if p_slots is None else tl.load(p_slots + i_b).to(tl.int64)
    o_k = tl.arange(0, BK)
    o_v = i % NUM_TILES * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    p_s = p_state + row * s_sp + i_h * s_sh + o_k.to(tl.int64)[:, None] * s_sk + o_v[None, :]
    b_s = tl.load(p_s, mask=m_s, other=0.0)  # [BK, BV]
    b_q = tl.load(p_q + i_b * s_qb + i_h * s_qh + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + i_b * s_kb + i_h * s_kh + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_v = tl.load(p_v + i_b * s_vb + i_h * s_vh + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_s = b_s * tl.exp(tl.load(p_log_decay + i_h)) + b_k[:, None] * b_v[None, :]
    tl.store(p_s, b_s, mask=m_s)
    b_o = tl.sum(b_q[:, None] * b_s, 0) * scale  # [BV]
    tl.store(p_o + (i_b * H + i_h) * V + o_v, round_to(b_o, p_o.dtype.element_ty), mask=m_v)


_launch = Launcher(decode_kernel)


def decode_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Output `[B, H, 1, V]`; the rows `slots` (default: the first B) of `state` are overwritten.

    Args:
        query, key, value: `[B, H, 1, D]` with a contiguous last dimension.
        log_decay: `[H]` float32 on the same device.
        state: `[P, H, K, V]` float32 with a contiguous last dimension.
        slots: `[B]` int32 or int64, each row once.
    """
    batch, heads, _, k_dim = query.shape
    v_dim = value.shape[3]
    output = torch.empty(batch, heads, 1, v_dim, dtype=query.dtype, device=query.device)
    block_k = padded(k_dim)
    block_v = min(padded(v_dim), decode_width(block_k))
    (s_qb, s_qh, _, _), (s_kb, s_kh, _, _) = query.stride(), key.stride()
    (s_vb, s_vh, _, _), (s_sp, s_sh, s_sk, _) = value.stride(), state.stride()
    sizes = s_qb, s_qh, s_kb, s_kh, s_vb, s_vh, s_sp, s_sh, s_sk
    pointers = query, key, value, log_decay, state, slots, output
    constants = {"K": k_dim, "V": v_dim, "BK": block_k, "BV": block_v}
    kind = *kind_of(query.device, *pointers), heads, *sizes
    grid = batch * heads * -(-v_dim // block_v), 1, 1
    _launch(grid, (*pointers, *sizes, scale, heads), constants, kind)
    return output
