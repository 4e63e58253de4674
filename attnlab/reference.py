"""The definition of every op: the oracle of all tests, in any precision, float64 included.

Legend: B batch, H heads, T query tokens, S key tokens, C slots of a cache, K key dim, V value dim,
N documents.

Lightning attention (arXiv 2501.08313, section 2.2) is a linear recurrence with one decay a head:
    S_t = exp(g) S_{t-1} + k_t v_t^T          o_t = scale * q_t^T S_t
`lightning_recurrence` is that sentence. Unrolled, it says o_t = scale * sum over j <= t of
exp(g (t - j)) (q_t . k_j) v_j: causal attention whose mask decays, which `lightning_attention`
below writes out with all T x T scores. Its sums run over T at once, so it works in float64 for
inputs of any precision; everything else here works in float32, or in float64 for float64 inputs.
"""

from typing import Any

import torch
from torch import Tensor


def lightning_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `[B, H, T, V]` and final state `[B, H, K, V]`, one token after the other."""
    dtype = _compute_dtype(query.dtype)
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    decay = log_decay.to(q).exp()[:, None, None]  # [H, 1, 1]
    state = _initial_state(initial_state, q, v)
    outputs = []
    for t in range(q.shape[2]):
        state = decay * state + k[:, :, t, :, None] * v[:, :, t, None, :]  # [B, H, K, V]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, :, t], state))
    return torch.stack(outputs, dim=2).to(query.dtype), state


def lightning_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    precision: str = "default",
) -> tuple[Tensor, Tensor | None]:
    """Mask form of the recurrence: output `[B, H, T, V]`, final state `[B, H, K, V]` or None."""
    dtype = torch.float64
    q, k, v, g = query.to(dtype), key.to(dtype), value.to(dtype), log_decay.to(query.device)
    t = torch.arange(q.shape[2], device=q.device)
    scores = (q @ k.mT) * decay_mask(g, t[:, None] - t[None, :], dtype)  # [B, H, T, T]
    state = _initial_state(initial_state, q, v)
    past = decay_mask(g, t + 1, dtype)[:, :, None] * (q @ state)  # [B, H, T, V]
    output = (scale * (scores @ v + past)).to(query.dtype)
    if not return_final_state:
        return output, None
    state = lightning_state(k, v, g, initial_state=initial_state)
    return output, state.to(_compute_dtype(query.dtype))


def lightning_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    precision: str = "default",
) -> tuple[Tensor, Tensor | None]:
    """Mask form over packed documents: `[1, H, T, V]`, final states `[N, H, K, V]` or None."""
    dtype = torch.float64
    q, k, v, g = query.to(dtype), key.to(dtype), value.to(dtype), log_decay.to(query.device)
    starts, stops = cu_seqlens[:-1].to(q.device), cu_seqlens[1:].to(q.device)
    t = torch.arange(q.shape[2], device=q.device)
    inside = (t >= starts[:, None]) & (t < stops[:, None])  # [N, T]
    same = (inside[:, :, None] & inside[:, None, :]).any(0)  # [T, T]
    scores = (q @ k.mT) * decay_mask(g, t[:, None] - t[None, :], dtype) * same
    output = scores @ v
    if initial_state is not None:
        since = t - starts[:, None] + 1
        weight = decay_mask(g, since, dtype).transpose(0, 1) * inside[:, None, :]  # [N, H, T]
        past = weight[..., None] * (q @ initial_state.to(dtype))  # [N, H, T, V]
        output = output + past.sum(0, keepdim=True)
    output = (scale * output).to(query.dtype)
    if not return_final_state:
        return output, None
    until = stops[:, None] - 1 - t
    weight = decay_mask(g, until, dtype).transpose(0, 1) * inside[:, None, :]  # [N, H, T]
    states = (k * weight[..., None]).mT @ v  # [N, H, K, V]
    if initial_state is not None:
        whole = decay_mask(g, stops - starts, dtype).mT[..., None, None]  # [N, H, 1, 1]
        states = states + whole * initial_state.to(dtype)
    return output, states.to(_compute_dtype(query.dtype))


def lightning_state(
    key: Tensor, value: Tensor, log_decay: Tensor, *, initial_state: Tensor | None = None
) -> Tensor:
    """State after the last token, `[B, H, K, V]`: S_T = exp(g T) S_0 + sum_t exp(g (T-1-t)) k v^T."""
    dtype = _compute_dtype(key.dtype)
    k, v, g = key.to(dtype), value.to(dtype), log_decay.to(key.device)
    num_tokens = k.shape[2]
    until = torch.arange(num_tokens - 1, -1, -1, device=k.device)
    state = (k * decay_mask(g, until, dtype)[:, :, None]).mT @ v
    if initial_state is not None:
        whole = torch.exp(g.double() * num_tokens).to(dtype)[:, None, None]
        state = state + whole * initial_state.to(dtype)
    return state


def lightning_decode_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    scale: float = 1.0,
    precision: str = "default",
) -> Tensor:
    """One step of the recurrence, `[B, H, 1, V]`; the rows `slots` of `state` are overwritten."""
    dtype = state.dtype
    before = state if slots is None else state[slots]
    decay = log_decay.to(state.device, dtype).exp()[:, None, None]
    after = decay * before + key.to(dtype).mT * value.to(dtype)  # [B, H, K, V]
    if slots is None:
        state.copy_(after)
    else:
        state[slots] = after
    return (scale * (query.to(dtype) @ after)).to(query.dtype)


def softmax_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Materialised softmax attention: output `[B, H, T, V]` and logsumexp `[B, H, T]`.

    Query heads share the key heads in equal groups. A causal mask is aligned bottom right: the
    last query sees the last key. A query that sees no key gives 0, and a logsumexp of -inf.
    """
    dtype = _compute_dtype(query.dtype)
    groups = query.shape[1] // max(key.shape[1], 1)
    q = query.to(dtype)
    k = key.to(dtype).repeat_interleave(groups, dim=1)
    v = value.to(dtype).repeat_interleave(groups, dim=1)
    scores = (q @ k.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)  # [B, H, T, S]
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(dtype)
    elif attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    if is_causal:
        hidden = causal_mask(q.shape[2], k.shape[2], q.device).logical_not()
        scores = scores.masked_fill(hidden, -torch.inf)
    # A row that sees nothing would be -inf throughout and its gradient NaN: it is set aside first.
    blind = (scores == -torch.inf).all(dim=-1, keepdim=True)  # [B, H, T, 1]
    scores = scores.masked_fill(blind, 0.0)
    lse = scores.logsumexp(dim=-1, keepdim=True)
    weights = torch.exp(scores - lse).masked_fill(blind, 0.0)
    return (weights @ v).to(query.dtype), lse.masked_fill(blind, -torch.inf).squeeze(-1)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, **flags: Any) -> Tensor:
    """Output of `softmax_attention_with_lse` alone."""
    return softmax_attention_with_lse(query, key, value, **flags)[0]


def softmax_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    span: int | None = None,
) -> Tensor:
    """One query a row over slots [0, lengths[b]) of a cache, `[B, H, 1, V]`; 0 without any."""
    keys, values = keys[:, :, :span], values[:, :, :span]
    seen = torch.arange(keys.shape[2], device=keys.device) < lengths[:, None]  # [B, C]
    # A weight of 0 does not undo what may lie behind a row's end: 0 x NaN is NaN.
    values = values.masked_fill(~seen[:, None, :, None], 0.0)
    return softmax_attention(query, keys, values, attn_mask=seen[:, None, None], scale=scale)


def softmax_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Materialised attention inside each packed document, `[1, H, T, V]`."""
    q_index = torch.arange(query.shape[2], device=query.device)
    k_index = torch.arange(key.shape[2], device=query.device)
    q_bounds, k_bounds = cu_seqlens_q.to(query.device), cu_seqlens_k.to(query.device)
    q_inside = (q_index >= q_bounds[:-1, None]) & (q_index < q_bounds[1:, None])  # [N, T]
    k_inside = (k_index >= k_bounds[:-1, None]) & (k_index < k_bounds[1:, None])  # [N, S]
    visible = q_inside[:, :, None] & k_inside[:, None, :]  # [N, T, S]
    if is_causal:
        q_left = q_bounds[1:, None] - q_index  # tokens from here to the document's end
        k_left = k_bounds[1:, None] - k_index
        visible = visible & (k_left[:, None, :] >= q_left[:, :, None])
    mask = visible.any(0)
    return softmax_attention(query, key, value, attn_mask=mask, scale=scale)


def decay_mask(log_decay: Tensor, distance: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(g * distance) where distance >= 0, else 0: `[H, *distance.shape]` in `dtype`.

    Only non-positive exponents are taken, so that no slope and no length overflows; they are
    float64, since a float32 product g * distance would round away what a long distance needs.
    """
    shape = (-1,) + (1,) * distance.ndim
    decay = torch.exp(log_decay.double().view(shape) * distance.clamp(min=0))
    return torch.where(distance >= 0, decay, 0.0).to(dtype)


def causal_mask(q_len: int, kv_len: int, device: torch.device) -> Tensor:
    """True where a query sees a key, `[q_len, kv_len]`, the last query seeing the last key."""
    query_position = torch.arange(q_len, device=device) + (kv_len - q_len)
    return torch.arange(kv_len, device=device) <= query_position[:, None]


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _initial_state(state: Tensor | None, q: Tensor, v: Tensor) -> Tensor:
    if state is not None:
        return state.to(q.dtype)
    return q.new_zeros(q.shape[0], q.shape[1], q.shape[3], v.shape[3])
