"""The two mixers of the hybrid model: lightning attention with an output gate, softmax attention.

Legend: B batch (1 if packed), T tokens, D hidden size, H query heads, G key heads, K head dim,
C slots of the cache.

MiniMax-01, arXiv 2501.08313, section 2.2. A mixer is called with the tokens' `Placement` and, for
inference, its layer's cache, which it reads and updates. `backend` is a backend of `attnlab`'s ops
or None for the first that can run a call.
"""

from typing import Any

import torch
from torch import Tensor, nn

from attnlab.cache import KVCache, StateCache
from attnlab.decay import minimax_log_decay
from attnlab.functional import (
    lightning_attention,
    lightning_attention_varlen,
    lightning_decode_,
    softmax_attention,
    softmax_attention_varlen,
    softmax_decode,
)
from attnlab.model.config import HybridConfig
from attnlab.model.convolution import ShortConvolution
from attnlab.model.heads import silu_heads
from attnlab.model.norm import RMSNorm, times_scale
from attnlab.model.placement import Placement
from attnlab.model.rotary import rotate
from attnlab.registry import list_backends

Angles = tuple[Tensor, Tensor]


class LightningMixer(nn.Module):
    """Linear attention with a decay a head: W_o (sigmoid(W_g u) * RMSNorm(lightning(SiLU(W u)))).

    The rows of `qkv_proj` are interleaved: query, key and value of head 0, then of head 1. There is
    no scale and no rotation; one norm spans the channels of all heads.
    """

    log_decay: Tensor

    def __init__(self, config: HybridConfig, layer: int, **factory: Any) -> None:
        """Build layer number `layer`, counted over all layers: its decay depends on it."""
        super().__init__()
        hidden, inner = config.hidden_size, config.inner_size
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.layer, self.num_layers = layer, config.num_hidden_layers
        self.backend: str | None = None
        self.conv = _convolution(config, **factory)
        self.qkv_proj = nn.Linear(hidden, 3 * inner, bias=False, **factory)
        self.output_gate = nn.Linear(hidden, inner, bias=False, **factory)
        self.norm = RMSNorm(inner, eps=config.linear_norm_eps, **factory)
        self.out_proj = nn.Linear(inner, hidden, bias=False, **factory)
        self._set_decay(self.qkv_proj.weight.device)

    def forward(
        self, hidden: Tensor, place: Placement, angles: Angles | None, cache: StateCache | None
    ) -> Tensor:
        """Mix `[B, T, D]` along the tokens of each sequence; `angles` are not used."""
        if self.conv is not None:
            hidden = self.conv(hidden, place, cache)
        query, key, value = silu_heads(self.qkv_proj(hidden), self.head_dim)  # [B, H, T, K]
        mixed = self._attend(query, key, value, place, cache)
        mixed = mixed.transpose(1, 2).flatten(2)  # [B, T, H K]
        return self.out_proj(self.norm(mixed, gate=self.output_gate(hidden)))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, place: Placement, cache: StateCache | None
    ) -> Tensor:
        qkv = query, key, value, self.log_decay
        if place.is_step and cache is not None:
            return lightning_decode_(*qkv, cache.state, backend=self._decode_backend())
        initial = cache.state if cache is not None and place.has_past else None
        flags: dict[str, Any] = {
            "initial_state": initial,
            "return_final_state": cache is not None,
            "backend": self.backend,
        }
        if place.cu_seqlens is None:
            output, state = lightning_attention(*qkv, **flags)
        else:
            output, state = lightning_attention_varlen(*qkv, place.cu_seqlens, **flags)
        if cache is not None and state is not None:
            cache.state.copy_(state)
        return output

    def _decode_backend(self) -> str | None:
        """The chosen backend where it has a decoding step, else the first that has one."""
        return self.backend if self.backend in list_backends("lightning_decode_") else None

    def _set_decay(self, device: torch.device) -> None:
        """Compute the decay anew, on the CPU for a module on the meta device."""
        decay = minimax_log_decay(self.num_heads, self.layer, self.num_layers)
        place = "cpu" if device.type == "meta" else device
        self.register_buffer("log_decay", decay.to(place), persistent=False)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Move the module; the decay stays float32 and gets its values also from empty memory."""
        super()._apply(fn, recurse)
        self._set_decay(self.log_decay.device)
        return self


class SoftmaxMixer(nn.Module):
    """Causal softmax attention; groups of query heads share a key head, some channels are rotated.

    With `qk_norm` each query and key head passes an RMSNorm first. With `log_length_scale` queries
    are multiplied by length_scale_h * ln(number of keys that they see).
    """

    def __init__(self, config: HybridConfig, layer: int, **factory: Any) -> None:
        """Build the layer; its number makes no difference."""
        super().__init__()
        hidden, inner, head_dim = config.hidden_size, config.inner_size, config.head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = head_dim
        self.backend: str | None = None
        self.conv = _convolution(config, **factory)
        self.q_proj = nn.Linear(hidden, inner, bias=False, **factory)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * head_dim, bias=False, **factory)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * head_dim, bias=False, **factory)
        self.o_proj = nn.Linear(inner, hidden, bias=False, **factory)
        normed, eps = config.qk_norm, config.rms_norm_eps
        self.q_norm = RMSNorm(head_dim, eps=eps, **factory) if normed else None
        self.k_norm = RMSNorm(head_dim, eps=eps, **factory) if normed else None
        scaled = config.log_length_scale
        self.length_scale = (
            nn.Parameter(torch.empty(inner // head_dim, **factory)) if scaled else None
        )

    def forward(
        self, hidden: Tensor, place: Placement, angles: Angles | None, cache: KVCache | None
    ) -> Tensor:
        """Mix `[B, T, D]` along the tokens of each sequence, rotated by `angles` if given."""
        if self.conv is not None:
            hidden = self.conv(hidden, place, cache)
        scale = None
        if self.length_scale is not None:
            scale = _length_scale(place.positions, self.length_scale)  # [B or 1, T, H]
        query = self._heads(self.q_proj(hidden), self.q_norm, angles, scale)  # [B, H, T, K]
        key = self._heads(self.k_proj(hidden), self.k_norm, angles)  # [B, G, T, K]
        value = self._heads(self.v_proj(hidden), None, None)
        mixed = self._attend(query, key, value, place, cache)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(
        self, x: Tensor, norm: RMSNorm | None, angles: Angles | None, scale: Tensor | None = None
    ) -> Tensor:
        heads = x.unflatten(-1, (-1, self.head_dim))  # [B, T, H, K]
        if norm is not None:
            heads = norm(heads, scale=scale)
        elif scale is not None:
            heads = times_scale(heads, scale)
        heads = heads.transpose(1, 2)
        return heads if angles is None else rotate(heads, *angles)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, place: Placement, cache: KVCache | None
    ) -> Tensor:
        flags: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "backend": self.backend}
        if cache is not None:
            start = place.start
            _store(cache, key, value, place)
            if place.is_step:
                return self._step(query, cache, place)
            if place.has_past and start is None:
                return self._pieces(query, cache, place)
            if start:
                stop = start + query.shape[2]
                key, value = cache.keys[:, :, :stop], cache.values[:, :, :stop]
        if place.cu_seqlens is None:
            return softmax_attention(query, key, value, **flags)
        bounds = place.cu_seqlens, place.cu_seqlens
        return softmax_attention_varlen(query, key, value, *bounds, **flags)

    def _step(self, query: Tensor, cache: KVCache, place: Placement) -> Tensor:
        """One query a row over the cache; a backend that has no such step leaves it to others."""
        assert place.lengths is not None
        backend = self.backend if self.backend in list_backends("softmax_decode") else None
        return softmax_decode(
            query, cache.keys, cache.values, place.lengths, span=place.span, backend=backend
        )

    def _pieces(self, query: Tensor, cache: KVCache, place: Placement) -> Tensor:
        """Sequence after sequence, each over its own slots of the cache."""
        outputs = [
            softmax_attention(
                query[batch, :, tokens],
                cache.keys[row : row + 1, :, :length],
                cache.values[row : row + 1, :, :length],
                is_causal=True,
                enable_gqa=True,
                backend=self.backend,
            )
            for row, batch, tokens, length in place.pieces()
        ]
        return torch.cat(outputs, 0 if place.cu_seqlens is None else 2)


def _convolution(config: HybridConfig, **factory: Any) -> ShortConvolution | None:
    if config.conv_width == 0:
        return None
    return ShortConvolution(config.hidden_size, config.conv_width, **factory)


def _length_scale(positions: Tensor, length_scale: Tensor) -> Tensor:
    """length_scale_h ln(position + 1), the number of visible keys: `[B or 1, T, H]`, float32."""
    dtype = torch.promote_types(length_scale.dtype, torch.float32)
    return (positions + 1).to(dtype).log()[..., None] * length_scale.to(dtype)


def _store(cache: KVCache, key: Tensor, value: Tensor, place: Placement) -> None:
    start = place.start
    if start is None or place.is_step:
        assert place.rows is not None
        cache.store_at(key, value, place.rows, place.positions)
    else:
        cache.store(key, value, start)
