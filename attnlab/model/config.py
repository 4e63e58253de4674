"""Configuration of the hybrid model: what its layers are, and the sizes that the lab uses.

Field names are those of transformers' `MiniMaxConfig`; `attnlab.model.config_json` reads and writes
them in a `config.json` of either spelling. MiniMax-01 is arXiv 2501.08313, its sizes are those of
the released config.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from attnlab.checks import expect
from attnlab.model import config_json, costs
from attnlab.model.config_json import FULL, LINEAR

_AUX_LOSSES = ("transformers", "paper")
_SIZE_STEP = 8  # widths of experts are multiples of it, which grouped products of 16 bits ask for


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """A stack of lightning and softmax attention layers, each followed by a mixture of experts.

    Widths are in channels. `rotary_dim` of each head's channels are rotated (0: none).
    `linear_norm_eps` belongs to the norm of the lightning layers' outputs. The options below are
    off in MiniMax-01:

    - `conv_width`: taps of a causal depthwise convolution of each mixer's input, 0 for none;
    - `qk_norm`: an RMSNorm of each query and key head of the softmax layers;
    - `log_length_scale`: a learned factor of ln(number of visible keys) on each softmax head's
      queries, from `log_length_scale_init` (Scalable-Softmax, arXiv 2501.19399);
    - `rotary_float64`: rotary angles in float64, where float32 is off by 0.07 rad at 4M tokens;
    - `capacity_factor`: in training an expert takes at most this multiple of its even share of
      tokens and drops the rest, None to drop none;
    - `router_aux_loss`: normalisation of the load-balancing loss, "transformers" or "paper".

    Raises:
        ValueError: for fields that are out of range or don't fit each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    num_local_experts: int
    num_experts_per_tok: int
    rotary_dim: int
    rope_theta: float = 1e6
    max_position_embeddings: int = 131_072
    rms_norm_eps: float = 1e-5
    linear_norm_eps: float = 1e-6
    full_attn_alpha_factor: float = 1.0
    full_attn_beta_factor: float = 1.0
    linear_attn_alpha_factor: float = 1.0
    linear_attn_beta_factor: float = 1.0
    mlp_alpha_factor: float = 1.0
    mlp_beta_factor: float = 1.0
    router_aux_loss_coef: float = 0.001
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    conv_width: int = 0
    qk_norm: bool = False
    log_length_scale: bool = False
    log_length_scale_init: float = 0.43
    rotary_float64: bool = False
    capacity_factor: float | None = None
    router_aux_loss: str = "transformers"

    def __post_init__(self) -> None:
        """Turn lists into tuples, then check every field."""
        for name in ("layer_types", "eos_token_id"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_numbers(self)
        _check_layers(self)
        _check_fit(self)

    @classmethod
    def minimax_01(cls) -> "HybridConfig":
        """MiniMax-Text-01: 456B parameters, 46B of them active."""
        return cls(
            vocab_size=200_064,
            hidden_size=6144,
            intermediate_size=9216,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=128,
            num_local_experts=32,
            num_experts_per_tok=2,
            rotary_dim=64,
            rope_theta=1e7,
            max_position_embeddings=10_240_000,
            eos_token_id=200_020,
            **_stack(80),
        )

    @classmethod
    def tiny(cls) -> "HybridConfig":
        """0.7M parameters for tests: grouped queries, half a head rotated, inner width 2 x hidden."""
        return cls(
            hidden_size=64,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_local_experts=4,
            rotary_dim=16,
            **_lab_fields(8),
        )

    @classmethod
    def lab_3m(cls) -> "HybridConfig":
        """3.2M parameters."""
        return cls(
            hidden_size=96,
            intermediate_size=288,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=32,
            num_local_experts=4,
            rotary_dim=16,
            **_lab_fields(8),
        )

    @classmethod
    def lab_15m(cls) -> "HybridConfig":
        """15M parameters."""
        return cls(
            hidden_size=256,
            intermediate_size=512,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            num_local_experts=4,
            rotary_dim=32,
            **_lab_fields(8),
        )

    @classmethod
    def lab_100m(cls) -> "HybridConfig":
        """102M parameters."""
        return cls(
            hidden_size=512,
            intermediate_size=416,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            num_local_experts=8,
            rotary_dim=32,
            **_lab_fields(16),
        )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "HybridConfig":
        """Read the released spelling, transformers', or a mixture.

        Raises:
            ValueError: for unknown, missing or contradicting keys, and for options that the model
                doesn't have.
        """
        names = {f.name for f in fields(cls)}
        return cls(**config_json.read(raw, names))

    @classmethod
    def from_json_file(cls, path: str | Path) -> "HybridConfig":
        """`from_dict` of a `config.json`."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"expected JSON in {path}, got {error}") from error
        expect(isinstance(raw, dict), f"a JSON object in {path}", type(raw).__name__)
        return cls.from_dict(raw)

    def to_dict(self, layout: str = "released") -> dict[str, Any]:
        """What `from_dict` reads back, in the spelling "released" or "transformers"."""
        defaults = {f.name: f.default for f in fields(self)}
        return config_json.write(asdict(self), defaults, layout)

    def all_softmax(self) -> "HybridConfig":
        """The same number of parameters, softmax attention in all layers."""
        return self._with_layers((FULL,) * self.num_hidden_layers)

    def all_lightning(self) -> "HybridConfig":
        """The same number of parameters, lightning attention in all layers."""
        return self._with_layers((LINEAR,) * self.num_hidden_layers)

    def hybrid(self, ratio: int = 7, position: int | None = None) -> "HybridConfig":
        """The same number of parameters, one softmax layer to `ratio` lightning layers.

        `position` is the softmax layer's place in its group, 0 to ratio; None is the last.
        """
        expect(ratio >= 1, "ratio >= 1", ratio)
        position = ratio if position is None else position
        expect(0 <= position <= ratio, f"position in [0, {ratio}]", position)
        layers = _groups(self.num_hidden_layers, ratio, position)
        expect(FULL in layers, f"more than {position} layers", self.num_hidden_layers)
        return self._with_layers(layers)

    def _with_layers(self, layer_types: tuple[str, ...]) -> "HybridConfig":
        """Exchange layers; the experts' width makes up for the difference, in steps of 8."""
        changed = replace(self, layer_types=layer_types)
        per_channel = 3 * self.hidden_size * self.num_local_experts * self.num_hidden_layers
        missing = (self.num_parameters() - changed.num_parameters()) / per_channel
        if not missing:
            return changed
        steps = max(round((self.intermediate_size + missing) / _SIZE_STEP), 1)
        return replace(changed, intermediate_size=steps * _SIZE_STEP)

    @property
    def inner_size(self) -> int:
        """Channels of all query heads together."""
        return self.num_attention_heads * self.head_dim

    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        return costs.num_parameters(self)

    def num_active_parameters(self) -> int:
        """Parameters that a token meets, embedding and output matrix not counted."""
        return costs.num_active_parameters(self)


def _groups(num_layers: int, ratio: int, position: int) -> tuple[str, ...]:
    return tuple(FULL if i % (ratio + 1) == position else LINEAR for i in range(num_layers))


def _stack(num_layers: int) -> dict[str, Any]:
    """MiniMax-01's stack: one softmax layer to seven lightning ones, alpha (2 x layers)^(1/4)."""
    alphas = ("full_attn_alpha_factor", "linear_attn_alpha_factor", "mlp_alpha_factor")
    return {
        "num_hidden_layers": num_layers,
        "layer_types": _groups(num_layers, 7, 7),
        **dict.fromkeys(alphas, (2 * num_layers) ** 0.25),
    }


def _lab_fields(num_layers: int) -> dict[str, Any]:
    """What the lab's sizes share: bytes and a few special tokens, two experts a token."""
    tokens = {"vocab_size": 320, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    return {**tokens, "num_experts_per_tok": 2, "rope_theta": 1e4, **_stack(num_layers)}


def _check_numbers(config: HybridConfig) -> None:
    """Each field alone: its type, and the range that it must lie in."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is int:
            expect(type(value) is int, f"an integer {field.name}", repr(value))
            lowest = 0 if field.name in ("rotary_dim", "conv_width") else 1
            expect(value >= lowest, f"{field.name} >= {lowest}", value)
        elif field.type is float:
            expect(type(value) in (int, float), f"a number {field.name}", repr(value))
            signed = "_factor" in field.name or field.name == "log_length_scale_init"
            ok = math.isfinite(value) and (signed or value >= 0)
            expect(ok, f"a finite {field.name}" + ("" if signed else " >= 0"), value)
        elif field.type is bool:
            expect(type(value) is bool, f"{field.name} true or false", repr(value))
    expect(config.rope_theta > 0, "rope_theta > 0", config.rope_theta)
    capacity = config.capacity_factor
    expect(capacity is None or capacity > 0, "capacity_factor > 0 or None", capacity)
    known = config.router_aux_loss in _AUX_LOSSES
    expect(known, f"router_aux_loss among {', '.join(_AUX_LOSSES)}", repr(config.router_aux_loss))


def _check_layers(config: HybridConfig) -> None:
    layers = config.layer_types
    expect(isinstance(layers, tuple), "layer_types as a tuple", repr(layers))
    unknown = sorted({str(x) for x in layers if x not in (LINEAR, FULL)})
    expect(not unknown, f"layer_types among {LINEAR}, {FULL}", ", ".join(unknown))
    count = config.num_hidden_layers
    expect(len(layers) == count, f"{count} layer_types, one a hidden layer", len(layers))


def _check_fit(config: HybridConfig) -> None:
    """Fields that must fit each other."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    expect(heads % kv_heads == 0, f"num_key_value_heads that divide the {heads} heads", kv_heads)
    rotary, head_dim = config.rotary_dim, config.head_dim
    ok = rotary <= head_dim and rotary % 2 == 0
    expect(ok, f"an even rotary_dim of at most head_dim {head_dim}", rotary)
    chosen, experts = config.num_experts_per_tok, config.num_local_experts
    expect(chosen <= experts, f"num_experts_per_tok of at most the {experts} experts", chosen)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        ids = value if isinstance(value, tuple) else () if value is None else (value,)
        ok = all(type(i) is int and 0 <= i < config.vocab_size for i in ids)
        expect(ok, f"{name} in the vocabulary of {config.vocab_size}", repr(value))


SIZES: dict[str, HybridConfig] = {
    "tiny": HybridConfig.tiny(),
    "3m": HybridConfig.lab_3m(),
    "15m": HybridConfig.lab_15m(),
    "100m": HybridConfig.lab_100m(),
}
"""The lab's sizes by the names that the command line gives them."""
