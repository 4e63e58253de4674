"""attnlab: linear versus softmax attention; the ops, their backends, and MiniMax-01's decays."""

from attnlab import backends as _backends  # noqa: F401  (fills the registry)
from attnlab.decay import decay_horizon, minimax_log_decay
from attnlab.functional import (
    LightningOutput,
    lightning_attention,
    lightning_attention_varlen,
    lightning_decode_,
    lightning_state,
    softmax_attention,
    softmax_attention_varlen,
    softmax_attention_with_lse,
    softmax_decode,
)
from attnlab.problem import Problem
from attnlab.registry import BackendUnavailable, list_backends, use_backend, why_not

__all__ = [
    "BackendUnavailable",
    "LightningOutput",
    "Problem",
    "decay_horizon",
    "lightning_attention",
    "lightning_attention_varlen",
    "lightning_decode_",
    "lightning_state",
    "list_backends",
    "minimax_log_decay",
    "softmax_attention",
    "softmax_attention_varlen",
    "softmax_attention_with_lse",
    "softmax_decode",
    "use_backend",
    "why_not",
]
