"""The small models whose retrieval is compared: equal in size, unlike in their layers and recipe.

The recipe: a short convolution before each mixer, so that a value's key is beside it for any mixer;
queries and keys normalised; no rotation; a learned ln(length) scale on queries, so that attention to
one key does not fade among many (arXiv 2501.19399); and linear mixers that fade in while the model
trains. Without the last, a hybrid that is trained on short sequences solves them with its linear
layers alone, and its softmax layers never learn. Names in VARIANTS leave out one part each.

The convolutions start as shifts: half of the channels pass the token on, half the one before it. From
random taps a stack with a single softmax layer doesn't find out in thousands of steps which value
belongs to which key.
"""

from dataclasses import dataclass, replace

import torch

from attnlab.checks import expect
from attnlab.model.config import HybridConfig
from attnlab.model.hybrid import HybridLM

RAMP = (0.0, 0.2, 0.8)  # multiplier of linear mixers: 0 to a fifth of the steps, 1 from four fifths
KINDS = ("softmax", "lightning", "hybrid-7to1", "hybrid-3to1", "hybrid-1to1")
VARIANTS = {
    "": "the recipe",
    "no-ramp": "linear mixers at full strength from the first step",
    "no-log-length": "no ln(length) scale on queries",
    "half-rotary": "half of each head rotated, no ln(length) scale",
    "softmax-first": "softmax layer first in its group, no ramp",
    "minimax": "MiniMax-01's recipe: half rotary, no convolution, norms of heads, scale or ramp",
}
SIZES = ("3m", "small")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model by name: its config, and the ramp of its linear mixers while it trains."""

    name: str
    config: HybridConfig
    linear_ramp: tuple[float, float, float] | None


def model_of(name: str, *, vocab_size: int, size: str = "3m") -> Model:
    """The model that a name such as "softmax", "hybrid-3to1" or "hybrid-7to1.no-ramp" stands for.

    Raises:
        ValueError: for an unknown name or size.
    """
    kind, _, variant = name.partition(".")
    known = kind in KINDS and variant in VARIANTS and not name.endswith(".")
    words = (
        f"one of {', '.join(KINDS)}, and behind a dot one of {', '.join(filter(None, VARIANTS))}"
    )
    expect(known, words, repr(name))
    config = _layers(_base(size, vocab_size), kind, first=variant == "softmax-first")
    ramp = RAMP if kind.startswith("hybrid") else None
    if variant in ("no-ramp", "softmax-first", "minimax"):
        ramp = None
    if variant in ("no-log-length", "half-rotary", "minimax"):
        config = replace(config, log_length_scale=False)
    if variant in ("half-rotary", "minimax"):
        config = replace(config, rotary_dim=config.head_dim // 2)
    if variant == "minimax":
        config = replace(config, conv_width=0, qk_norm=False)
    return Model(name=name, config=config, linear_ramp=ramp)


@torch.no_grad()
def start_as_shifts(model: HybridLM) -> None:
    """Let even channels of every convolution pass the token on, odd ones the token before it.

    A fifth of the weights that the model drew stays, so that no two channels are alike.
    """
    for name, taps in model.named_parameters():
        if name.endswith("conv.weight"):  # [D, W], the token itself last
            channel = torch.arange(taps.shape[0], device=taps.device)
            taps.mul_(0.2)
            taps[channel, taps.shape[1] - 1 - channel % 2] += 1.0


def _base(size: str, vocab_size: int) -> HybridConfig:
    """All layers but their kinds; feed-forward networks are a single expert each."""
    expect(size in SIZES, f"a size among {', '.join(SIZES)}", repr(size))
    hidden, heads, layers, width = (128, 4, 8, 448) if size == "3m" else (64, 2, 4, 128)
    return HybridConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        layer_types=("linear_attention",) * layers,
        num_local_experts=1,
        num_experts_per_tok=1,
        rotary_dim=0,
        rope_theta=1e4,
        conv_width=4,
        qk_norm=True,
        log_length_scale=True,
        router_aux_loss_coef=0.0,
        initializer_range=0.08,
    )


def _layers(config: HybridConfig, kind: str, *, first: bool) -> HybridConfig:
    if kind == "softmax":
        return config.all_softmax()
    if kind == "lightning":
        return config.all_lightning()
    ratio = int(kind.removeprefix("hybrid-").removesuffix("to1"))
    return config.hybrid(ratio, position=0 if first else None)
