"""Queries, keys and values of the lightning mixer out of its projection, through SiLU.

Legend: B batch, T tokens, H heads, K head dim.

On a GPU it is the kernels of `kernels_triton.heads`, whose backward writes the interleaved gradient
in one pass; autograd's would stack three tensors first. Elsewhere it is a few ops of torch.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from attnlab.custom_op import CustomOp
from attnlab.model.fused import has_kernels


def silu_heads(x: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `[B, H, T, K]`: SiLU of `[B, T, H 3 K]`, tokens before heads in memory.

    `x` is interleaved: query, key and value of head 0, then of head 1. Differentiable.
    """
    if has_kernels(x):
        return _silu_heads(x, head_dim)
    heads = F.silu(x).unflatten(-1, (-1, 3, head_dim))  # [B, T, H, 3, K]
    query, key, value = (part.transpose(1, 2) for part in heads.unbind(3))
    return query, key, value


def _split(x: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    from kernels_triton import heads

    query, key, value = heads.silu_heads(x.contiguous(), head_dim)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _fake_split(x: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = *x.shape[:2], x.shape[2] // (3 * head_dim), head_dim
    query, key, value = (x.new_empty(shape).transpose(1, 2) for _ in range(3))
    return query, key, value


def _differentiate(dq: Tensor, dk: Tensor, dv: Tensor, x: Tensor) -> Tensor:
    from kernels_triton import heads

    grads = dq, dk, dv
    heads_first = all(grad.is_contiguous() for grad in grads)
    if not heads_first:
        dq, dk, dv = (grad.transpose(1, 2).contiguous() for grad in grads)
    return heads.silu_heads_backward((dq, dk, dv), x.contiguous(), heads_first=heads_first)


def _fake_differentiate(dq: Tensor, dk: Tensor, dv: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_gradient = CustomOp("silu_heads_backward", _differentiate, _fake_differentiate)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(inputs[0])


def _autograd_backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None]:
    return _gradient(dq, dk, dv, *ctx.saved_tensors), None


_silu_heads = CustomOp(
    "silu_heads", _split, _fake_split, setup_context=_save, backward=_autograd_backward
)
