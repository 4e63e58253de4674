"""The public ops: each checks its arguments, resolves the backend and calls it.

Legend: B batch, H heads, T query tokens, S key tokens, C slots of a cache, K key dim, V value dim,
N documents. One layout everywhere, `[B, H, T, D]`, any strides with a contiguous last dimension;
states are `[B, H, K, V]` float32. `backend=` names a backend or, as None, takes the one of
`use_backend`, else the first that can run the call; see `attnlab.registry`.

All ops but the two decoding steps are differentiable in query, key, value and initial_state (and
through the final state); log_decay has a gradient in the "reference" and "torch" backends.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from attnlab import checks
from attnlab.problem import Problem
from attnlab.registry import resolve


class LightningOutput(NamedTuple):
    """Output `[B, H, T, V]` in query's dtype; final state `[B, H, K, V]` float32, if asked for."""

    output: Tensor
    final_state: Tensor | None


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
    backend: str | None = None,
) -> LightningOutput:
    """Causal linear attention with one decay a head: S_t = exp(g) S_{t-1} + k_t v_t^T, o_t = q_t S_t.

    Args:
        query, key: `[B, H, T, K]`, one floating dtype.
        value: `[B, H, T, V]`.
        log_decay: `[H]` float32, natural log, <= 0 (0 is no decay); may live on the CPU.
        scale: factor of the output; MiniMax-01 has none.
        initial_state: `[B, H, K, V]` float32, None for zeros.
        return_final_state: whether to return the state after the last token.
        precision: "default" rounds products' operands to the inputs' dtype, "high" keeps
            16-bit inputs near float32, "tf32" allows TF32 for float32 inputs.
        backend: "reference", "torch", "triton", "cuda", or "fla" for measurement.

    Raises:
        ValueError: for arguments that don't fit each other, naming what was expected.
        BackendUnavailable: if the named backend can't run the call, with the reason.

    Source: MiniMax-01, arXiv 2501.08313, section 2.2.
    """
    problem = _check_lightning("lightning_attention", query, key, value, log_decay, precision)
    shape = (query.shape[0], query.shape[1], query.shape[3], value.shape[3])
    checks.check_state(initial_state, "initial_state", shape, query)
    if problem.batch * problem.heads * problem.q_len == 0:
        return _nothing_to_do(query, key, value, initial_state, return_final_state, shape)
    implementation = resolve("lightning_attention", backend, problem)
    output, state = implementation(
        query,
        key,
        value,
        _checked_decay(log_decay),
        scale=scale,
        initial_state=initial_state,
        return_final_state=return_final_state,
        precision=precision,
    )
    return LightningOutput(output, state)


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
    backend: str | None = None,
) -> LightningOutput:
    """`lightning_attention` over documents packed end to end: B is 1, states are `[N, H, K, V]`.

    `cu_seqlens` `[N+1]` int32 or int64 holds the bounds, from 0 to T; a document may be empty. The
    state starts anew, or from its row of `initial_state`, at each document.
    """
    num_documents = cu_seqlens.shape[0] - 1 if cu_seqlens.ndim == 1 else 0
    name = "lightning_attention_varlen"
    problem = _check_lightning(name, query, key, value, log_decay, precision, num_documents)
    checks.expect(query.shape[0] == 1, "packed tensors of batch 1", query.shape[0])
    checks.check_cu_seqlens(cu_seqlens, "cu_seqlens", query.device)
    shape = (num_documents, query.shape[1], query.shape[3], value.shape[3])
    checks.check_state(initial_state, "initial_state", shape, query)
    bounds = _checked_bounds(cu_seqlens, "cu_seqlens", query.shape[2])
    if problem.heads * problem.q_len == 0:
        return _nothing_to_do(query, key, value, initial_state, return_final_state, shape)
    implementation = resolve(name, backend, problem)
    output, state = implementation(
        query,
        key,
        value,
        _checked_decay(log_decay),
        bounds,
        scale=scale,
        initial_state=initial_state,
        return_final_state=return_final_state,
        precision=precision,
    )
    return LightningOutput(output, state)


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
    backend: str | None = None,
) -> Tensor:
    """Output `[B, H, 1, V]` of one token a sequence; `state` is updated in place.

    `state` is `[B, H, K, V]`, or with `slots` `[B]` a pool `[P, H, K, V]` of which sequence b owns
    row slots[b]. Not differentiable.
    """
    problem = _check_lightning("lightning_decode_", query, key, value, log_decay, precision)
    checks.expect(query.shape[2] == 1, "one query token a sequence", query.shape[2])
    checks.check_slots(slots, query.shape[0], query.device)
    pool = query.shape[0] if slots is None or state.ndim != 4 else state.shape[0]
    shape = (pool, query.shape[1], query.shape[3], value.shape[3])
    checks.check_state(state, "state", shape, query)
    if slots is not None and _values_can_be_read(slots):
        checks.check_slot_values(slots, pool)
    if problem.batch * problem.heads == 0:
        return query.new_empty(*query.shape[:3], value.shape[3])
    implementation = resolve("lightning_decode_", backend, problem)
    with torch.no_grad():
        return implementation(
            query,
            key,
            value,
            _checked_decay(log_decay),
            state,
            slots=slots,
            scale=scale,
            precision=precision,
        )


def lightning_state(
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """State `[B, H, K, V]` float32 after all tokens, without the outputs."""
    problem = _check_lightning("lightning_state", key, key, value, log_decay, "default")
    shape = (key.shape[0], key.shape[1], key.shape[3], value.shape[3])
    checks.check_state(initial_state, "initial_state", shape, key)
    if problem.batch * problem.heads * problem.q_len == 0:
        return _empty_state(initial_state, key, shape)
    implementation = resolve("lightning_state", backend, problem)
    return implementation(key, value, _checked_decay(log_decay), initial_state=initial_state)


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention `[B, H, T, V]`, a causal mask aligned bottom right where T and S differ.

    The last query sees the last key, as in FlashAttention; a query before the first key gives 0.

    Args:
        query: `[B, H, T, K]`.
        key, value: `[B, H or, with enable_gqa, a divisor of H, S, K or V]`.
        attn_mask: broadcastable to `[B, H, T, S]`; bool (True is seen) or added to the scores.
        is_causal: combines with attn_mask.
        scale: of the scores; None is K ** -0.5.
        enable_gqa: let groups of query heads share a key head.
        backend: "reference", "sdpa", "flash" or "cudnn".

    Raises:
        ValueError, BackendUnavailable: as in `lightning_attention`.
    """
    problem = _check_softmax(
        "softmax_attention", query, key, value, attn_mask, is_causal, enable_gqa
    )
    implementation = resolve("softmax_attention", backend, problem)
    return implementation(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)


def softmax_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`softmax_attention` and the logsumexp `[B, H, T]` of its scores (float32, -inf: saw no key).

    Parts of the keys can be attended to apart and merged, as ring attention does; both results
    carry gradients.
    """
    name = "softmax_attention_with_lse"
    problem = _check_softmax(name, query, key, value, attn_mask, is_causal, enable_gqa)
    implementation = resolve(name, backend, problem)
    return implementation(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)


def softmax_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`softmax_attention` inside each of the packed documents, `[1, H, T, V]`.

    `cu_seqlens_q` and `cu_seqlens_k` `[N+1]` int32 or int64 bound the queries and the keys of each
    document; the causal mask is aligned bottom right in each.
    """
    name = "softmax_attention_varlen"
    num_documents = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q.ndim == 1 else 0
    problem = _check_softmax(
        name, query, key, value, None, is_causal, enable_gqa, num_documents=num_documents
    )
    checks.expect(query.shape[0] == 1, "packed tensors of batch 1", query.shape[0])
    checks.check_cu_seqlens(cu_seqlens_q, "cu_seqlens_q", query.device)
    checks.check_cu_seqlens(cu_seqlens_k, "cu_seqlens_k", query.device)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        expected = f"cu_seqlens_k of shape {list(cu_seqlens_q.shape)} as cu_seqlens_q"
        raise checks.mismatch(expected, list(cu_seqlens_k.shape))
    implementation = resolve(name, backend, problem)
    return implementation(
        query,
        key,
        value,
        _checked_bounds(cu_seqlens_q, "cu_seqlens_q", query.shape[2]),
        _checked_bounds(cu_seqlens_k, "cu_seqlens_k", key.shape[2]),
        is_causal=is_causal,
        scale=scale,
    )


def softmax_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    span: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention `[B, H, 1, V]` of one token a sequence over a cache of keys and values.

    Row b sees slots [0, lengths[b]); a row without any gives 0. A call never waits for the device,
    so it can be captured in a CUDA graph and replayed while lengths grow. Not differentiable.

    Args:
        query: `[B, H, 1, K]`.
        keys, values: `[B, a divisor of H, C, K or V]`; groups of query heads share a key head. What
            lies behind a row's length is of no account, but must be finite for "sdpa".
        lengths: `[B]` int32 or int64 on the same device.
        scale: of the scores; None is K ** -0.5.
        span: a promise that no length is greater; "sdpa" and "reference" look at no slots beyond.
        backend: "triton", "sdpa" or "reference".

    Raises:
        ValueError: as in `lightning_attention`; lengths are compared with `span` on the CPU alone.
        BackendUnavailable: as in `lightning_attention`.
    """
    problem = _check_softmax("softmax_decode", query, keys, values, None, False, True)
    checks.expect(query.shape[2] == 1, "one query token a sequence", query.shape[2])
    checks.check_lengths(lengths, query.shape[0], query.device)
    capacity = keys.shape[2]
    if span is not None and not 0 <= span <= capacity:
        raise checks.mismatch(f"a span in [0, {capacity}]", span)
    if _values_can_be_read(lengths):
        checks.check_length_values(lengths, capacity if span is None else span)
    if problem.batch * problem.heads * capacity == 0:
        return query.new_zeros(*query.shape[:3], values.shape[3])
    implementation = resolve("softmax_decode", backend, problem)
    with torch.no_grad():
        return implementation(query, keys, values, lengths, scale=scale, span=span)


def _check_lightning(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    precision: str,
    num_documents: int = 1,
) -> Problem:
    checks.check_qkv(query, key, value)
    if key.shape[1:3] != query.shape[1:3]:
        expected = f"key with query's heads and tokens {list(query.shape[1:3])}"
        raise checks.mismatch(expected, list(key.shape[1:3]))
    checks.check_log_decay(log_decay, key)
    checks.check_precision(precision, query.dtype)
    decay_grad = torch.is_grad_enabled() and log_decay.requires_grad
    return Problem.of(
        op,
        query,
        key,
        value,
        decay_requires_grad=decay_grad,
        precision=precision,
        num_documents=num_documents,
    )


def _check_softmax(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
    num_documents: int = 1,
) -> Problem:
    checks.check_qkv(query, key, value)
    heads, kv_heads = query.shape[1], key.shape[1]
    if enable_gqa and (kv_heads == 0 or heads % kv_heads):
        raise checks.mismatch(f"key heads that divide the {heads} query heads", kv_heads)
    if not enable_gqa and kv_heads != heads:
        raise checks.mismatch(f"{heads} key heads (or enable_gqa=True)", kv_heads)
    if attn_mask is not None:
        shape = (query.shape[0], heads, query.shape[2], key.shape[2])
        pairs = zip(reversed(attn_mask.shape), reversed(shape), strict=False)
        ok = attn_mask.ndim <= 4 and all(m in (1, n) for m, n in pairs)
        got = list(attn_mask.shape)
        checks.expect(ok, f"attn_mask broadcastable to {list(shape)}", got)
        ok = attn_mask.dtype in (torch.bool, query.dtype) and attn_mask.device == query.device
        expected = f"attn_mask of bool or {query.dtype} on {query.device}"
        checks.expect(ok, expected, f"{attn_mask.dtype} on {attn_mask.device}")
    has_mask = attn_mask is not None
    return Problem.of(
        op,
        query,
        key,
        value,
        is_causal=is_causal,
        has_mask=has_mask,
        num_documents=num_documents,
    )


def _values_can_be_read(x: Tensor) -> bool:
    """Whether values may be looked at: not while code is traced or a graph is captured."""
    if torch.compiler.is_compiling():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


@torch.library.custom_op("attnlab::checked_decay", mutates_args=())
def _checked_decay_op(log_decay: Tensor) -> Tensor:
    """Copy of log_decay once its values are checked: the form that torch.compile can't drop."""
    if _values_can_be_read(log_decay):
        checks.check_log_decay_values(log_decay)
    return log_decay.clone()


@_checked_decay_op.register_fake
def _(log_decay: Tensor) -> Tensor:
    return torch.empty_like(log_decay)


_checked_decay_op.register_autograd(lambda ctx, grad: grad)


def _checked_decay(log_decay: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.attnlab.checked_decay(log_decay)
    if _values_can_be_read(log_decay):
        checks.check_log_decay_values(log_decay)
    return log_decay


@torch.library.custom_op("attnlab::checked_bounds", mutates_args=())
def _checked_bounds_op(cu_seqlens: Tensor, name: str, num_tokens: int) -> Tensor:
    if _values_can_be_read(cu_seqlens):
        checks.check_cu_seqlens_values(cu_seqlens, name, num_tokens)
    return cu_seqlens.clone()


@_checked_bounds_op.register_fake
def _(cu_seqlens: Tensor, name: str, num_tokens: int) -> Tensor:
    return torch.empty_like(cu_seqlens)


def _checked_bounds(cu_seqlens: Tensor, name: str, num_tokens: int) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.attnlab.checked_bounds(cu_seqlens, name, num_tokens)
    if _values_can_be_read(cu_seqlens):
        checks.check_cu_seqlens_values(cu_seqlens, name, num_tokens)
    return cu_seqlens


def _empty_state(initial_state: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    if initial_state is not None:
        return initial_state.clone()
    return like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32))


def _nothing_to_do(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    initial_state: Tensor | None,
    return_final_state: bool,
    shape: tuple[int, ...],
) -> LightningOutput:
    """Result of a call without tokens: an empty output, and the state as it came."""
    # A sum of empty tensors is 0 and keeps the results attached to the inputs' graph.
    zero = query.sum() + key.sum() + value.sum()
    output = query.new_empty(*query.shape[:3], value.shape[3]) + zero
    state = _empty_state(initial_state, query, shape) + zero if return_final_state else None
    return LightningOutput(output, state)
