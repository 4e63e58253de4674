"""The stack of the hybrid model: layers of one mixer and one mixture of experts each.

Legend: B batch (1 if packed), T tokens, D hidden size.

A layer normalises first and takes its residual after the norm (arXiv 2501.08313, section 2):
    h = N_in(x)      g = N_post(alpha h + beta Attn(h))      x' = alpha' g + beta' MoE(g)
with alphas and betas by the kind of mixer.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnlab.cache import LayerCache, ModelCache
from attnlab.model.attention import Angles, LightningMixer, SoftmaxMixer
from attnlab.model.config import LINEAR, HybridConfig
from attnlab.model.moe import MixtureOfExperts, RouterLoad
from attnlab.model.norm import RMSNorm, weighted_sum
from attnlab.model.placement import Placement
from attnlab.model.rotary import rotary_angles


class DecoderLayer(nn.Module):
    """One mixer and one mixture of experts, each behind a norm."""

    def __init__(self, config: HybridConfig, layer: int, **factory: Any) -> None:
        """Build layer number `layer` of `config.layer_types`."""
        super().__init__()
        self.is_linear = config.layer_types[layer] == LINEAR
        kind = "linear" if self.is_linear else "full"
        self.alpha: float = getattr(config, f"{kind}_attn_alpha_factor")
        self.beta: float = getattr(config, f"{kind}_attn_beta_factor")
        self.mlp_alpha, self.mlp_beta = config.mlp_alpha_factor, config.mlp_beta_factor
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps=eps, **factory)
        self.self_attn = (LightningMixer if self.is_linear else SoftmaxMixer)(
            config, layer, **factory
        )
        self.post_attention_layernorm = RMSNorm(size, eps=eps, **factory)
        self.mlp = MixtureOfExperts(config, **factory)

    def forward(
        self,
        x: Tensor,
        place: Placement,
        angles: Angles | None,
        cache: LayerCache | None,
        multiplier: float,
    ) -> tuple[Tensor, RouterLoad | None]:
        """`[B, T, D]`, and in training the router's load; `multiplier` is of a linear mixer."""
        h = self.input_layernorm(x)
        beta = self.beta * multiplier if self.is_linear else self.beta
        mixed = self.self_attn(h, place, angles, cache)
        g = self.post_attention_layernorm(h, plus=mixed, alpha=self.alpha, beta=beta)
        output, load = self.mlp(g)
        return weighted_sum(g, output, self.mlp_alpha, self.mlp_beta), load


class Decoder(nn.Module):
    """Embedding, layers, and the norm that stands before the output matrix.

    `gradient_checkpointing` and `linear_multiplier` are described at `HybridLM`.
    """

    def __init__(self, config: HybridConfig, **factory: Any) -> None:
        """Build all layers, uninitialised."""
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.linear_multiplier = 1.0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, **factory)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, i, **factory) for i in layers)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **factory)

    def forward(
        self, input_ids: Tensor, place: Placement, cache: ModelCache | None
    ) -> tuple[Tensor, list[RouterLoad]]:
        """States `[B, T, D]` behind the last layer, not normalised, and the routers' loads."""
        angles = self._angles(place.positions)
        multiplier = self.linear_multiplier if self.training else 1.0
        x, loads = self.embed_tokens(input_ids), []
        for i, layer in enumerate(self.layers):
            arguments = x, place, angles, None if cache is None else cache.layers[i], multiplier
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, load = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x, load = layer(*arguments)
            loads += [load] if load is not None else []
        return x, loads

    def _angles(self, positions: Tensor) -> Angles | None:
        """Rotary angles that all softmax layers share, None where nothing is rotated."""
        config = self.config
        if config.rotary_dim == 0 or all(kind == LINEAR for kind in config.layer_types):
            return None
        float64 = config.rotary_float64
        return rotary_angles(positions, config.rotary_dim, config.rope_theta, float64=float64)
