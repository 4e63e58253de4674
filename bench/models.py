"""The models that are measured: three stacks of a size, and transformers' MiniMax of the same weights.

A name is "hybrid-3m", "softmax-3m", "lightning-3m" or "transformers-hybrid-3m". All of them rotate
whole heads, because that is all transformers can do.
"""

import importlib
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from attnlab.model import HybridConfig, HybridLM
from attnlab.model.config import SIZES as LAB_SIZES
from attnlab.model.config_json import FULL, LINEAR

_NUM_LAYERS = 8
SIZES = LAB_SIZES | {
    # 1.09B parameters, of which a token meets 0.4B: enough to fill a GPU, small enough for one.
    "1b": HybridConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=2048,
        num_hidden_layers=_NUM_LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        layer_types=(LINEAR,) * (_NUM_LAYERS - 1) + (FULL,),
        num_local_experts=8,
        num_experts_per_tok=2,
        rotary_dim=128,
        rope_theta=1e7,
        full_attn_alpha_factor=2.0,
        linear_attn_alpha_factor=2.0,
        mlp_alpha_factor=2.0,
    )
}
STACKS: dict[str, Callable[[HybridConfig], HybridConfig]] = {
    "softmax": HybridConfig.all_softmax,
    "lightning": HybridConfig.all_lightning,
    "hybrid": lambda config: config,
}
PEER = "transformers"


def config_of(name: str) -> HybridConfig:
    """Configuration of a model by its name; `ValueError` if there is none."""
    stack, _, size = name.removeprefix(f"{PEER}-").partition("-")
    if stack not in STACKS or size not in SIZES:
        known = f"one of {', '.join(STACKS)} and one of {', '.join(SIZES)}"
        raise ValueError(f"expected {known}, as in hybrid-3m, got {name!r}")
    config = STACKS[stack](SIZES[size])
    return replace(config, rotary_dim=config.head_dim)


@lru_cache(maxsize=1)
def build(name: str, dtype: torch.dtype, device: str) -> HybridLM:
    """Our model in eval mode, its weights drawn so that every part matters; kept for the next call.

    Matrices keep sizes around 1. With the usual deviation of 0.02 a small model's mixers would
    vanish beside its residuals, and no check of the logits could see them.
    """
    model = HybridLM(config_of(name), device=device, dtype=dtype).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
            if weight.ndim == 1:
                weight.mul_(0.2 * weight.shape[-1] ** 0.5).add_(1.0)
    return model


@lru_cache(maxsize=1)
def build_peer(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """transformers' model "transformers-hybrid-3m" with the weights of "hybrid-3m"."""
    return to_peer(build(name.removeprefix(f"{PEER}-"), dtype, device))


def to_peer(model: HybridLM) -> nn.Module:
    """transformers' model with the weights and the dtype of ours, through a checkpoint's files."""
    transformers: Any = importlib.import_module(PEER)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    weight = model.lm_head.weight
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, layout="transformers")
        peer = transformers.MiniMaxForCausalLM.from_pretrained(folder, dtype=weight.dtype)
    return peer.to(weight.device).eval()
