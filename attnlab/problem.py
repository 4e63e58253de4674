"""Problem: the shapes and flags of one attention call, and the work that such a call must do.

The dispatcher, the tests and the benchmarks all speak of calls through this one record, so that a
backend's limits, a test's shape and a row's share of the limit can't drift apart.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COUNTED_CHUNK = 64
"""Chunk size with which lightning attention's operations are counted, whatever a backend uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One call of an op: what a backend needs to know to accept it, and to be judged.

    Lengths are in tokens, `device` is a device type ("cpu", "cuda"). `num_documents` is the number
    of packed sequences of a varlen call; their lengths aren't known here, so `flops` counts a
    softmax varlen call as one sequence. `kv_len` of `softmax_decode` is the cache's slots, all of
    which `flops` and `min_bytes` count: how many are in use is known on the device.
    """

    op: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: str
    requires_grad: bool = False
    decay_requires_grad: bool = False
    is_causal: bool = True
    has_mask: bool = False
    precision: str = "default"
    num_documents: int = 1

    @classmethod
    def of(cls, op: str, query: Tensor, key: Tensor, value: Tensor, **flags: Any) -> "Problem":
        """Describe the call of `op` on `[B, H, T, D]` tensors."""
        tracked = torch.is_grad_enabled()
        return cls(
            op=op,
            batch=query.shape[0],
            heads=query.shape[1],
            kv_heads=key.shape[1],
            q_len=query.shape[2],
            kv_len=key.shape[2],
            key_dim=query.shape[3],
            value_dim=value.shape[3],
            dtype=query.dtype,
            device=query.device.type,
            requires_grad=tracked
            and (query.requires_grad or key.requires_grad or value.requires_grad),
            **flags,
        )

    @property
    def is_lightning(self) -> bool:
        """Whether the op is linear in the length."""
        return self.op.startswith("lightning")

    @property
    def is_decode(self) -> bool:
        """Whether one new token meets an existing context."""
        return self.op == "lightning_decode_" or (not self.is_lightning and self.q_len == 1)

    def flops(self, pass_: str = "fwd") -> int:
        """Floating-point operations of a pass: "fwd", "bwd", "fwd+bwd" or "decode".

        Lightning, a token and head: 2C(K+V) + 4KV forward and 2C(3K+2V) + 10KV backward with
        C = 64 (chunked form; Lightning Attention-2, arXiv 2401.04658). Softmax, a visible pair:
        2(K+V) forward and 2(3K+2V) backward (FlashAttention-2, arXiv 2307.08691).
        """
        if pass_ == "fwd+bwd":
            return self.flops("fwd") + self.flops("bwd")
        k, v, c = self.key_dim, self.value_dim, COUNTED_CHUNK
        if not self.is_lightning:
            per_pair = 2 * (3 * k + 2 * v) if pass_ == "bwd" else 2 * (k + v)
            return self.batch * self.heads * self.visible_pairs() * per_pair
        if self.is_decode:
            per_token = 5 * k * v  # decay, outer product, read
        elif self.op == "lightning_state":
            per_token = 2 * k * v
        elif pass_ == "bwd":
            per_token = 2 * c * (3 * k + 2 * v) + 10 * k * v
        else:
            per_token = 2 * c * (k + v) + 4 * k * v
        return self.batch * self.heads * self.q_len * per_token

    def min_bytes(self, pass_: str = "fwd") -> int:
        """Bytes that a pass must move: each input read once, each output written once.

        Lightning's backward needs no forward output (the decay is a constant), softmax's does.
        """
        if pass_ == "fwd+bwd":
            return self.min_bytes("fwd") + self.min_bytes("bwd")
        k, v = self.key_dim, self.value_dim
        query_len = self.batch * self.heads * self.q_len
        kv = self.batch * self.kv_heads * self.kv_len * (k + v)
        if pass_ == "bwd":
            outputs_read = 1 if self.is_lightning else 2
            elements = query_len * (2 * k + outputs_read * v) + 2 * kv
        else:
            elements = query_len * (k + v) + kv
        state = 8 * self.batch * self.heads * k * v if self.op == "lightning_decode_" else 0
        return elements * self.dtype.itemsize + state

    def visible_pairs(self) -> int:
        """Query-key pairs of one head that a bottom-right aligned causal mask lets through."""
        if not self.is_causal:
            return self.q_len * self.kv_len
        seeing = min(self.q_len, self.kv_len)  # queries before the first key see nothing
        return seeing * self.kv_len - seeing * (seeing - 1) // 2
