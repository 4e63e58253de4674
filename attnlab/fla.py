"""Adapter of flash-linear-attention's `chunk_simple_gla`, a peer to measure against.

fla's own `chunk_lightning_attn` decays by another law (TransNormerLLM's) and scales by K^-0.5; with
`g_gamma=log_decay, scale=1` its simple gated linear attention is MiniMax-01's recurrence.
"""

from typing import Any

import torch
from torch import Tensor


def lightning_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    precision: str = "default",
) -> tuple[Tensor, Tensor | None]:
    """Output `[B, H, T, V]` and final state `[B or documents, H, K, V]` or None."""
    from fla.ops.simple_gla import chunk_simple_gla

    output, state = chunk_simple_gla(
        *(x.transpose(1, 2) for x in (query, key, value)),  # fla's layout is [B, T, H, D]
        g_gamma=log_decay.to(query.device),
        scale=scale,
        initial_state=initial_state,
        output_final_state=return_final_state,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(query.device, torch.long),
    )
    return output.transpose(1, 2), state


def lightning_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, cu_seqlens: Tensor, **flags: Any
) -> tuple[Tensor, Tensor | None]:
    """`lightning_attention` over packed documents."""
    return lightning_attention(query, key, value, log_decay, cu_seqlens=cu_seqlens, **flags)
