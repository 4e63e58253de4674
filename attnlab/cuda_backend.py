"""Backend "cuda": the kernels of `kernels_cuda` as custom ops with gradients."""

from typing import Any

from torch import Tensor

from attnlab.lightning_ops import LightningOps
from kernels_cuda import lightning, lightning_decode

_ops = LightningOps("cuda", lightning, lightning_decode.decode_)


def lightning_attention(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, **flags: Any
) -> tuple[Tensor, Tensor | None]:
    """Output `[B, H, T, V]` and final states (float32, `[B or documents, H, K, V]`) or None."""
    return _ops.lightning_attention(query, key, value, log_decay, **flags)


def lightning_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, cu_seqlens: Tensor, **flags: Any
) -> tuple[Tensor, Tensor | None]:
    """`lightning_attention` over packed documents."""
    return _ops.lightning_attention(query, key, value, log_decay, cu_seqlens=cu_seqlens, **flags)


def lightning_state(key: Tensor, value: Tensor, log_decay: Tensor, **flags: Any) -> Tensor:
    """State `[B, H, K, V]` float32 after all tokens."""
    return _ops.lightning_state(key, value, log_decay, **flags)


def lightning_decode_(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor, **flags: Any
) -> Tensor:
    """Output `[B, H, 1, V]` of one token; `state` (any strides, values contiguous) is updated."""
    return _ops.lightning_decode_(query, key, value, log_decay, state, **flags)
