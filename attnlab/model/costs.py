"""What the hybrid model holds, and what it computes for a context of so many tokens.

Attention is counted as `attnlab.problem.Problem` counts it, a product of matrices [M, K] and [K, N]
as 2 M K N operations; norms, activations and the router's choice are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnlab.model.config_json import FULL, LINEAR
from attnlab.problem import Problem

if TYPE_CHECKING:
    from attnlab.model.config import HybridConfig


def num_parameters(config: HybridConfig) -> int:
    """Parameters of the whole model."""
    embeddings = 1 if config.tie_word_embeddings else 2
    rest = _parameters_behind_embedding(config, config.num_local_experts)
    return rest + embeddings * config.vocab_size * config.hidden_size


def num_active_parameters(config: HybridConfig) -> int:
    """Parameters that a token meets, embedding and output matrix not counted."""
    return _parameters_behind_embedding(config, config.num_experts_per_tok)


def cache_bytes(config: HybridConfig, context: int, batch: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of `context` tokens in `dtype`, and of the float32 states."""
    num_full = config.layer_types.count(FULL)
    num_linear = config.layer_types.count(LINEAR)
    token = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    state_dtype = torch.promote_types(dtype, torch.float32)
    state = config.num_attention_heads * config.head_dim**2 * state_dtype.itemsize
    taps = max(config.conv_width - 1, 0) * config.hidden_size * dtype.itemsize
    per_row = num_full * context * token + num_linear * state + config.num_hidden_layers * taps
    return batch * per_row


def prefill_flops(config: HybridConfig, context: int) -> int:
    """Operations of a forward pass over `context` tokens that gives the last one's logits."""
    return _flops(config, context, context)


def decode_flops(config: HybridConfig, context: int) -> int:
    """Operations of one more token behind `context` others."""
    return _flops(config, 1, context + 1)


def _parameters_behind_embedding(config: HybridConfig, num_experts: int) -> int:
    """Parameters of all layers with so many experts each, and of the last norm."""
    hidden, inner = config.hidden_size, config.inner_size
    kv_size = config.num_key_value_heads * config.head_dim
    full = 2 * hidden * (inner + kv_size) + 2 * config.head_dim * config.qk_norm
    full += config.num_attention_heads * config.log_length_scale
    mixers = {LINEAR: 5 * hidden * inner + inner, FULL: full}
    experts = num_experts * 3 * hidden * config.intermediate_size
    each = (2 + config.num_local_experts + config.conv_width) * hidden + experts
    return sum(mixers[kind] + each for kind in config.layer_types) + hidden


def _flops(config: HybridConfig, num_tokens: int, context: int) -> int:
    """Operations of the last `num_tokens` of `context` tokens, with the head on the last one."""
    head = config.vocab_size * config.hidden_size
    matrices = num_tokens * _matrix_parameters(config)
    attention = sum(_attention_flops(config, kind, num_tokens, context) for kind in (LINEAR, FULL))
    return 2 * (matrices + head) + attention


def _matrix_parameters(config: HybridConfig) -> int:
    """Elements of the matrices that a token is multiplied with, the head left out."""
    hidden, inner = config.hidden_size, config.inner_size
    kv_size = config.num_key_value_heads * config.head_dim
    mixers = {LINEAR: 5 * hidden * inner, FULL: 2 * hidden * (inner + kv_size)}
    experts = config.num_experts_per_tok * 3 * hidden * config.intermediate_size
    each = config.num_local_experts * hidden + experts + config.conv_width * hidden
    return sum(mixers[kind] + each for kind in config.layer_types)


def _attention_flops(config: HybridConfig, kind: str, num_tokens: int, context: int) -> int:
    """Operations of all layers of one kind between their projections."""
    step = num_tokens < context
    ops = {
        LINEAR: "lightning_decode_" if step else "lightning_attention",
        FULL: "softmax_attention",
    }
    problem = Problem(
        op=ops[kind],
        batch=1,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        q_len=num_tokens,
        kv_len=context,
        key_dim=config.head_dim,
        value_dim=config.head_dim,
        dtype=torch.bfloat16,
        device="cpu",
    )
    return config.layer_types.count(kind) * problem.flops("decode" if step else "fwd")
