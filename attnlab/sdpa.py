"""Softmax backends "sdpa", "flash" and "cudnn": torch's kernels behind our signatures.

Legend: B batch, H heads, T query tokens, S key tokens, D head dim.

torch's own entry point serves the plain calls. What it lacks (a logsumexp with gradients, a causal
mask aligned bottom right, packed documents on any device) is put together here from the kernels
beneath it. A causal call with more keys than queries is one call of FlashAttention, which aligns so
itself; elsewhere it is a non-causal part over the past and a square causal part, merged by their
logsumexps; the backward hands each part the merged output and
logsumexp, which is all that a flash backward needs to give that part's share of the gradients.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnlab import reference
from attnlab.checks import remembered
from attnlab.custom_op import CustomOp

_WORTH_A_PLAN = 1 << 32  # scores a head: tens of milliseconds, where a plan takes a few
_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    kernel: str = "sdpa",
) -> Tensor:
    """Output `[B, H, T, V]`; `kernel` is "sdpa" for torch's choice, "flash" or "cudnn"."""
    if _is_empty(query, key, value):
        return reference.softmax_attention(
            query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale
        )
    q_len, kv_len = query.shape[2], key.shape[2]
    if is_causal and q_len == 1:
        is_causal = False  # the only query sees every key
    if is_causal and attn_mask is not None:
        attn_mask, is_causal = _with_causal(attn_mask, q_len, kv_len), False
    if is_causal and q_len != kv_len:
        return softmax_attention_with_lse(
            query, key, value, is_causal=True, scale=scale, kernel=kernel
        )[0]
    call = partial(
        F.scaled_dot_product_attention,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    if kernel == "sdpa" and _loses_gradients(query, key, value):
        wide = query.float(), key.float(), value.float()
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.float()
        return call(*wide, attn_mask=attn_mask).to(query.dtype)
    if kernel == "sdpa":
        return call(query, key, value)
    with sdpa_kernel(_BACKENDS[kernel]):
        return call(query, key, value)


def softmax_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    kernel: str = "sdpa",
) -> tuple[Tensor, Tensor]:
    """Output `[B, H, T, V]` and logsumexp `[B, H, T]` float32, both with gradients."""
    if _is_empty(query, key, value):
        return reference.softmax_attention_with_lse(query, key, value, scale=scale)
    return _parts(query, key, value, None, None, is_causal, scale, kernel)


def softmax_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    kernel: str = "sdpa",
) -> Tensor:
    """Output `[1, H, T, V]`: one launch of FlashAttention where it can be, else one a document."""
    if _is_empty(query, key, value):
        return query.new_zeros(*query.shape[:3], value.shape[3])
    dims = query.shape[3], value.shape[3]
    if kernel == "sdpa" and query.is_cuda and query.dtype.itemsize == 2 and dims[0] == dims[1]:
        bounds = cu_seqlens_q, cu_seqlens_k
        return flash_varlen(query, key, value, *bounds, is_causal=is_causal, scale=scale)
    return _parts(query, key, value, cu_seqlens_q, cu_seqlens_k, is_causal, scale, kernel)[0]


def softmax_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    span: int | None = None,
) -> Tensor:
    """Output `[B, H, 1, V]`: the heads of a group are rows of one product, a mask ends each row.

    What lies behind the ends must be finite: it is multiplied by weights of 0. Rows that are known
    to be of equal length, as on a CPU, need no mask, with which torch takes several times as long.

    On a CPU torch's kernel adds the keys of a single query up one by one, whose float32 error grows
    with their number beyond that of two plain products; these take as long.
    """
    equal = _equal_length(lengths)
    keys, values = (x[:, :, : span if equal is None else equal] for x in (keys, values))
    mask = None
    if equal is None:
        seen = torch.arange(keys.shape[2], device=keys.device) < lengths[:, None]  # [B, C]
        mask = seen[:, None, None]
    grouped = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[3])  # [B, G, H/G, K]
    if query.device.type == "cpu" and query.dtype.itemsize > 2:
        output = _by_products(grouped, keys, values, mask, scale)
    else:
        output = softmax_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    # Not every kernel of torch gives zeros where a mask hides all keys.
    output = output.masked_fill((lengths == 0)[:, None, None, None], 0.0)
    return output.reshape(*query.shape[:3], values.shape[3])


def _by_products(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Output of few queries, of which all scores fit in memory; NaN where a mask hides all keys."""
    scores = query * (query.shape[3] ** -0.5 if scale is None else scale) @ keys.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ values


def _equal_length(lengths: Tensor) -> int | None:
    """The length of all rows; None if they differ, or can't be read without waiting."""
    if lengths.is_cuda or torch.compiler.is_compiling():
        return None
    values = set(lengths.tolist())
    return values.pop() if len(values) == 1 else None


def flash_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Output `[1, H, T, D]`: all documents in one launch of FlashAttention-2 (CUDA, 16 bits)."""
    bounds = [x.to(query.device, torch.int32) for x in (cu_seqlens_q, cu_seqlens_k)]
    longest = [x.shape[2] for x in (query, key)]
    if not torch.compiler.is_compiling():
        longest = [remembered(x, _longest) for x in (cu_seqlens_q, cu_seqlens_k)]
    packed = [x[0].transpose(0, 1) for x in (query, key, value)]  # [T, H, D]
    output = torch.ops.aten._flash_attention_forward(
        *packed, *bounds, *longest, 0.0, is_causal, False, scale=scale
    )[0]
    return output.transpose(0, 1)[None]


def _longest(bounds: Tensor) -> int:
    return int(bounds.diff().max())


def _parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    is_causal: bool,
    scale: float | None,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if kernel == "sdpa":
        kernel = _fastest_kernel(query, key, value, tracked or cu_seqlens_q is not None)
    groups = query.shape[1] // key.shape[1]
    if tracked and groups > 1 and kernel != "flash":  # whose backward alone adds up a group's keys
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return _softmax_parts(query, key, value, cu_seqlens_q, cu_seqlens_k, is_causal, scale, kernel)


def _fastest_kernel(query: Tensor, key: Tensor, value: Tensor, only_flash: bool) -> str:
    """The kernel to put parts together from.

    On Hopper cuDNN's is 1.7 times as fast as FlashAttention-2, but its parts round gradients, of
    many documents each would be a launch, and it makes a plan for each new length of the keys.
    """
    if query.device.type == "cpu":
        return "cpu"
    takes = query.dtype.itemsize == 2 and max(query.shape[3], value.shape[3]) <= 128
    takes = takes and query.shape[2] * key.shape[2] >= _WORTH_A_PLAN
    hopper = takes and torch.cuda.get_device_capability(query.device) == (9, 0)
    return "cudnn" if hopper and not only_flash else "flash"


def _is_empty(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return min(query.numel(), key.numel(), value.numel()) == 0


def _loses_gradients(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """torch's CPU backward adds up dk and dv in the inputs' 16 bits: their error grows with T."""
    tracked = query.requires_grad or key.requires_grad or value.requires_grad
    return query.device.type == "cpu" and query.dtype.itemsize == 2 and tracked


def _with_causal(attn_mask: Tensor, q_len: int, kv_len: int) -> Tensor:
    causal = reference.causal_mask(q_len, kv_len, attn_mask.device)
    if attn_mask.dtype == torch.bool:
        return attn_mask & causal
    return attn_mask.masked_fill(~causal, -torch.inf)


Part = tuple[slice, slice, bool]  # queries, keys, whether the part is causal


def _documents(
    query: Tensor,
    key: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    is_causal: bool,
    kernel: str,
) -> Iterator[list[Part]]:
    """Parts of each document; all parts of one document have the same queries."""
    q_bounds = [0, query.shape[2]] if cu_q is None else cu_q.tolist()
    k_bounds = [0, key.shape[2]] if cu_k is None else cu_k.tolist()
    for q0, q1, k0, k1 in zip(q_bounds, q_bounds[1:], k_bounds, k_bounds[1:], strict=False):
        causal = is_causal and q1 - q0 > 1  # a single query sees every key
        past = (k1 - k0) - (q1 - q0) if causal else k1 - k0
        seeing = slice(max(q0, q0 - past), q1)  # queries before the first key see nothing
        parts: list[Part] = []
        if causal and past > 0 and kernel == "flash":  # FlashAttention itself aligns bottom right
            parts.append((seeing, slice(k0, k1), True))
            causal = False
        elif past > 0:
            parts.append((seeing, slice(k0, k0 + past), False))
        if causal:
            parts.append((seeing, slice(max(k0, k0 + past), k1), True))
        yield [p for p in parts if p[0].stop > p[0].start and p[1].stop > p[1].start]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    is_causal: bool,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    output = query.new_zeros(*query.shape[:3], value.shape[3])
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=wide)
    for parts in _documents(query, key, cu_seqlens_q, cu_seqlens_k, is_causal, kernel):
        merged: tuple[Tensor, Tensor] | None = None
        for queries, keys, causal in parts:
            tensors = query[:, :, queries], key[:, :, keys], value[:, :, keys]
            new = part_forward(*tensors, causal, scale, kernel)
            merged = new if merged is None else _merge(*merged, *new)
        if merged is not None:
            output[:, :, parts[0][0]], lse[:, :, parts[0][0]] = merged
    return output, lse


def part_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of a square causal or a non-causal part; groups of heads share a key head.

    A group's queries see the same keys if nothing is causal: they are rows of one head then.
    """
    groups = query.shape[1] // key.shape[1]
    if groups == 1 or kernel == "flash":  # FlashAttention shares keys by itself
        return _kernel_forward(query, key, value, causal, scale, kernel)
    if causal:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        return _kernel_forward(query, key, value, causal, scale, kernel)
    rows = query.unflatten(1, (-1, groups)).flatten(2, 3)  # [B, G, H/G T, D]
    output, lse = _kernel_forward(rows, key, value, False, scale, kernel)
    output, lse = (x.unflatten(2, (groups, -1)).flatten(1, 2) for x in (output, lse))
    return output, lse


def _fake_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    is_causal: bool,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    output = query.new_empty(*query.shape[:3], value.shape[3])
    wide = torch.promote_types(query.dtype, torch.float32)
    return output, query.new_empty(query.shape[:3], dtype=wide)


def _merge(output: Tensor, lse: Tensor, new: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from the attention over each."""
    total = torch.logaddexp(lse, new_lse)
    weights = torch.exp(lse - total)[..., None], torch.exp(new_lse - total)[..., None]
    return (output * weights[0] + new * weights[1]).to(output.dtype), total


def _differentiate(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    is_causal: bool,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    grad_key, grad_value = (torch.zeros_like(x, memory_format=contiguous) for x in (key, value))
    # A query's gradient is a sum over the parts, so it is rounded only at the end.
    grad_query = torch.zeros_like(query, memory_format=contiguous, dtype=lse.dtype)
    for parts in _documents(query, key, cu_seqlens_q, cu_seqlens_k, is_causal, kernel):
        for queries, keys, causal in parts:
            do, q, o, total = (x[:, :, queries] for x in (grad_output, query, output, lse))
            dl = None if grad_lse is None else grad_lse[:, :, queries]
            k, v = key[:, :, keys], value[:, :, keys]
            dq, dk, dv = part_backward(do, dl, q, k, v, o, total, causal, scale, kernel)
            grad_query[:, :, queries] += dq
            grad_key[:, :, keys] = dk
            grad_value[:, :, keys] = dv
    return grad_query.to(query.dtype), grad_key, grad_value


def _fake_differentiate(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    is_causal: bool,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    dq, dk, dv = (torch.empty_like(x, memory_format=contiguous) for x in (query, key, value))
    return dq, dk, dv


_gradients = CustomOp("softmax_parts_backward", _differentiate, _fake_differentiate)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
    ctx.flags = inputs[5:]
    ctx.set_materialize_grads(False)


def _autograd_backward(
    ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    query, key, value, output, lse, cu_q, cu_k = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    grads = _gradients(
        grad_output, grad_lse, query, key, value, output, lse, cu_q, cu_k, *ctx.flags
    )
    return *grads, None, None, None, None, None


_softmax_parts = CustomOp(
    "softmax_parts",
    _attend,
    _fake_attend,
    setup_context=_save_for_backward,
    backward=_autograd_backward,
)


def _widen(x: Tensor, dim: int) -> Tensor:
    return F.pad(x, (0, dim - x.shape[3])) if x.shape[3] < dim else x


def _kernel_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """One call of a torch kernel: output and logsumexp of a square causal or a non-causal part."""
    dim = -(-max(query.shape[3], value.shape[3]) // 8) * 8  # zeros change neither scores nor sums
    q, k, v = (_widen(x, dim) for x in (query, key, value))
    aten = torch.ops.aten
    kernel = _able(kernel, query, key)
    if kernel == "cpu":
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scale
        )
    elif kernel == "flash":
        output, lse = aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )[:2]
    else:
        output, lse = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )[:2]
    return output[..., : value.shape[3]], lse.view(query.shape[:3])


def part_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one part, given the output and logsumexp over all parts.

    A flash backward takes the score's gradient as P (dP - rowsum(dO O)). A gradient of the
    logsumexp adds P dlse, so it travels as one more value channel: 1 in dO, -dlse in O, 0 in V.
    """
    widest = max(query.shape[3], value.shape[3])
    dim = -(-(widest + (grad_lse is not None)) // 8) * 8
    q, k, v, o, do = (_widen(x, dim) for x in (query, key, value, output, grad_output))
    if grad_lse is not None:
        o, do = o.clone(), do.clone()
        o[..., widest], do[..., widest] = -grad_lse.to(o.dtype), 1.0
    call = _BACKWARD[_able(kernel, query, key)]
    dq, dk, dv = call(do.contiguous(), q, k, v, o.contiguous(), lse.contiguous(), causal, scale)
    k_dim, v_dim = query.shape[3], value.shape[3]
    return dq[..., :k_dim], dk[..., :k_dim], dv[..., :v_dim]


def _able(kernel: str, query: Tensor, key: Tensor) -> str:
    """The kernel itself, but FlashAttention for a one-token document, which cuDNN refuses."""
    return "flash" if kernel == "cudnn" and query.shape[2] == key.shape[2] == 1 else kernel


def _cpu_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = (x.float() if x.dtype.itemsize == 2 else x for x in (do, q, k, v, o))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *wide, lse, 0.0, causal, scale=scale
    )
    return grads


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    lengths = None, None, q.shape[2], k.shape[2]
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, o, lse, *lengths, 0.0, causal, unused, unused, scale=scale
    )


def _cudnn_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.empty(0, dtype=torch.int64, device=q.device)
    lengths = None, None, q.shape[2], k.shape[2]
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, o, lse[..., None], unused, unused, None, *lengths, 0.0, causal, scale=scale
    )


_BACKWARD: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "cpu": _cpu_backward,
    "flash": _flash_backward,
    "cudnn": _cudnn_backward,
}
