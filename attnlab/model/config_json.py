"""`config.json` in its two spellings: that of the released files, and transformers' `MiniMaxConfig`.

`read` takes either, or a mixture, and refuses what the model doesn't do; `write` makes one of them.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from attnlab.checks import expect

LAYOUTS = ("released", "transformers")
LINEAR, FULL = "linear_attention", "full_attention"
KINDS = (LINEAR, FULL)
"""Values of `layer_types`, in the order in which `attn_type_list` numbers them."""

_RELEASED_NAMES = {
    f"layernorm_{ours}_{greek}": f"{theirs}_{greek}_factor"
    for ours, theirs in (
        ("full_attention", "full_attn"),
        ("linear_attention", "linear_attn"),
        ("mlp", "mlp"),
    )
    for greek in ("alpha", "beta")
}

# Options that the model has in one setting only, and the values that mean this setting.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "postnorm": (True,),
    "shared_intermediate_size": (0, None, [0]),
    "sliding_window": (None,),
    "attention_dropout": (0,),
    "router_jitter_noise": (0,),
    "rope_scaling": (None,),
    "attention_bias": (False,),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
}
_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "layer_types"),
    *("num_attention_heads", "num_local_experts", "num_experts_per_tok"),
)
# Keys that say nothing about the model's function.
_IGNORED = {
    *("_name_or_path", "architectures", "auto_map", "block_size", "chunk_size_feed_forward"),
    *("dtype", "id2label", "label2id", "output_attentions", "output_hidden_states"),
    *("output_router_logits", "problem_type", "return_dict", "shared_moe_mode", "torch_dtype"),
    *("transformers_version", "use_cache"),
}


def read(raw: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Fields of `HybridConfig`, which are called `names`.

    A file that names neither `rotary_dim` nor `partial_rotary_factor` rotates whole heads, and one
    without `head_dim` or `num_key_value_heads` has them as transformers does.

    Raises:
        ValueError: for unknown or missing keys, two that contradict each other, or an option that
            the model doesn't have.
    """
    raw = dict(raw)
    _check_model_type(raw.pop("model_type", None))
    _check_fixed(raw)
    found: dict[str, Any] = {}
    _read_rotary(raw, found)
    for key, value in raw.items():
        if key == "attn_type_list":
            _put(found, "layer_types", _kinds(value))
        elif key in _RELEASED_NAMES or key in names:
            _put(found, _RELEASED_NAMES.get(key, key), value)
    known = {*names, *_RELEASED_NAMES, *_FIXED, *_IGNORED, "attn_type_list"}
    unknown = sorted(set(raw) - known)
    expect(not unknown, "known config keys", ", ".join(unknown))
    _derive(found)
    return found


def write(fields: Mapping[str, Any], defaults: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """A config's fields in one spelling; options are left out where they have their default."""
    expect(layout in LAYOUTS, f"layout among {', '.join(LAYOUTS)}", repr(layout))
    kept = {k: v for k, v in fields.items() if k not in _OPTIONS or v != defaults[k]}
    kept = {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}
    kept |= {"hidden_act": "silu", "attention_dropout": 0.0, "sliding_window": None}
    kept |= {"router_jitter_noise": 0.0, "use_cache": True}
    return _WRITERS[layout](kept)


_OPTIONS = {
    *("linear_norm_eps", "conv_width", "qk_norm", "log_length_scale", "log_length_scale_init"),
    *("rotary_float64", "capacity_factor", "router_aux_loss"),
}


def _released(kept: dict[str, Any]) -> dict[str, Any]:
    names = {new: old for old, new in _RELEASED_NAMES.items()}
    written = {names.get(k, k): v for k, v in kept.items() if k != "layer_types"}
    return {
        "architectures": ["MiniMaxText01ForCausalLM"],
        "model_type": "minimax_text_01",
        "attn_type_list": [KINDS.index(kind) for kind in kept["layer_types"]],
        "postnorm": True,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        **written,
    }


def _transformers(kept: dict[str, Any]) -> dict[str, Any]:
    rotary_dim, theta = kept.pop("rotary_dim"), kept.pop("rope_theta")
    rope = {"rope_type": "default", "rope_theta": theta}
    if rotary_dim != kept["head_dim"]:
        rope["partial_rotary_factor"] = rotary_dim / kept["head_dim"]
    return {
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        **kept,
        "block_size": 256,
        "rope_parameters": rope,
    }


_WRITERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "released": _released,
    "transformers": _transformers,
}


def _put(found: dict[str, Any], name: str, value: Any) -> None:
    """Note a field; a second spelling of it must say the same."""
    value = tuple(value) if isinstance(value, list) else value
    same = name not in found or found[name] == value
    expect(same, f"one {name}", f"{found.get(name)!r} and {value!r}")
    found[name] = value


def _check_model_type(model_type: Any) -> None:
    ok = model_type is None or "minimax" in str(model_type).lower()
    expect(ok, "the config of a MiniMax model", f"model_type {model_type!r}")


def _check_fixed(raw: Mapping[str, Any]) -> None:
    for key, allowed in _FIXED.items():
        if key in raw and raw[key] not in allowed:
            raise ValueError(f"expected {key} = {allowed[0]!r}, got {raw[key]!r}: not implemented")


def _kinds(numbers: Any) -> tuple[str, ...]:
    ok = isinstance(numbers, list | tuple) and all(n in (0, 1) for n in numbers)
    expect(ok, "attn_type_list of 0 (lightning) and 1 (softmax)", repr(numbers))
    return tuple(KINDS[n] for n in numbers)


def _read_rotary(raw: dict[str, Any], found: dict[str, Any]) -> None:
    """Take `rope_parameters` and `partial_rotary_factor` out of `raw`."""
    rope = raw.pop("rope_parameters", None) or {}
    expect(isinstance(rope, Mapping), "rope_parameters as an object", repr(rope))
    unknown = sorted(set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
    kind = rope.get("rope_type", rope.get("type", "default"))
    expect(kind == "default" and not unknown, "rope_parameters of type default", dict(rope))
    if "rope_theta" in rope:
        _put(found, "rope_theta", rope["rope_theta"])
    for source in (raw, rope):
        factor = source.get("partial_rotary_factor")
        if factor is not None:
            _put(found, "partial_rotary_factor", factor)
    raw.pop("partial_rotary_factor", None)


def _derive(found: dict[str, Any]) -> None:
    """Fields that follow from others where a file leaves them out."""
    missing = [name for name in _REQUIRED if found.get(name) is None]
    expect(not missing, f"a config with {', '.join(missing)}", "none")
    if found.get("num_key_value_heads") is None:
        found["num_key_value_heads"] = found["num_attention_heads"]
    if found.get("head_dim") is None:
        heads, hidden = found["num_attention_heads"], found["hidden_size"]
        ok = type(heads) is type(hidden) is int and heads > 0 and hidden % heads == 0
        expect(ok, "a head_dim, or heads that divide hidden_size", f"{heads!r} and {hidden!r}")
        found["head_dim"] = hidden // heads
    factor = found.pop("partial_rotary_factor", None)
    if factor is not None:
        ok = type(factor) in (int, float) and 0 <= factor <= 1
        expect(ok, "partial_rotary_factor in [0, 1]", repr(factor))
        # Cut off as transformers does, once the factor's own rounding is made up for.
        _put(found, "rotary_dim", int(found["head_dim"] * factor + 1e-6))
    found.setdefault("rotary_dim", found["head_dim"])
