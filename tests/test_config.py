"""Configs: presets, variants of equal size, both spellings of config.json, and what is refused."""

import json
from dataclasses import fields, replace

import pytest
import torch
from transformers import MiniMaxConfig

from attnlab.model import SIZES, HybridConfig, HybridLM

LINEAR, FULL = "linear_attention", "full_attention"
OPTIONS = {
    "conv_width": 4,
    "qk_norm": True,
    "log_length_scale": True,
    "log_length_scale_init": 0.5,
    "rotary_dim": 0,
    "rotary_float64": True,
    "capacity_factor": 1.25,
    "router_aux_loss": "paper",
    "linear_norm_eps": 1e-5,
}
# Keys and values of the config that MiniMaxAI publishes with MiniMax-M1, the same architecture.
RELEASED = {
    "architectures": ["MiniMaxText01ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10,
    "auto_map": {"AutoConfig": "configuration_minimax_text_01.MiniMaxText01Config"},
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "layernorm_full_attention_alpha": 3.5565588200778455,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": 3.5565588200778455,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": 3.5565588200778455,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 10240000,
    "model_type": "MiniMaxText01",
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.45.2",
    "use_cache": True,
    "vocab_size": 200064,
}


def test_the_released_config_is_minimax_01():
    config = HybridConfig.from_dict(RELEASED)
    assert config == replace(HybridConfig.minimax_01(), eos_token_id=None)
    written = config.to_dict("released")
    same = set(RELEASED) - {
        "auto_map",
        "model_type",
        "transformers_version",
        "output_router_logits",
    }
    assert {key: written[key] for key in same} == {key: RELEASED[key] for key in same}


def test_minimax_01_has_a_softmax_layer_after_seven_lightning_layers():
    layers = HybridConfig.minimax_01().layer_types
    assert layers == ((LINEAR,) * 7 + (FULL,)) * 10


@pytest.mark.parametrize("layout", ["released", "transformers"])
@pytest.mark.parametrize("options", [{}, OPTIONS, {"tie_word_embeddings": True}], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_either_spelling_is_read_back(tmp_path, size, options, layout):
    config = replace(SIZES[size], eos_token_id=(1, 2), **options)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict(layout)))
    assert HybridConfig.from_json_file(path) == config


def test_options_that_are_off_are_not_written():
    """A file of a plain model holds the keys that others know, and no more."""
    known = {*MiniMaxConfig().to_dict(), "architectures"}
    assert set(HybridConfig.tiny().to_dict("transformers")) <= known
    known = {*RELEASED, "pad_token_id"}
    assert set(HybridConfig.tiny().to_dict("released")) <= known


def test_transformers_reads_its_own_spelling_as_we_mean_it():
    config = HybridConfig.minimax_01()
    theirs = MiniMaxConfig.from_dict(config.to_dict("transformers"))
    for field in fields(config):
        if hasattr(theirs, field.name) and field.name != "layer_types":
            assert getattr(theirs, field.name) == getattr(config, field.name), field.name
    assert tuple(theirs.layer_types) == config.layer_types
    assert theirs.rope_parameters["rope_theta"] == 1e7
    assert theirs.rope_parameters["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize("full", [True, False], ids=["to_dict", "to_diff_dict"])
def test_what_transformers_writes_is_read(full):
    theirs = MiniMaxConfig(
        vocab_size=99, hidden_size=64, num_attention_heads=4, num_key_value_heads=2
    )
    config = HybridConfig.from_dict(theirs.to_dict() if full else theirs.to_diff_dict())
    assert config.vocab_size == 99
    assert config.num_key_value_heads == 2
    assert config.head_dim == config.rotary_dim == 16  # hidden_size / heads, all of it rotated
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.layer_types == tuple(theirs.layer_types)
    assert config.full_attn_alpha_factor == 1.0


def test_without_key_heads_every_head_has_its_own():
    raw = HybridConfig.tiny().to_dict() | {"num_key_value_heads": None}
    assert HybridConfig.from_dict(raw).num_key_value_heads == 4


@pytest.mark.parametrize(
    ("keys", "rotary_dim"),
    [
        ({}, 32),
        ({"rotary_dim": 12}, 12),
        ({"rotary_dim": 0}, 0),
        ({"partial_rotary_factor": 0.5}, 16),
        ({"partial_rotary_factor": None}, 32),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, 32),
        ({"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.25}}, 8),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}, "rotary_dim": 16}, 16),
        ({"rope_scaling": None, "rope_theta": 5.0}, 32),
    ],
    ids=str,
)
def test_what_is_rotated_follows_from_either_key_and_is_the_whole_head_without(keys, rotary_dim):
    raw = HybridConfig.tiny().to_dict()
    del raw["rotary_dim"], raw["rope_theta"]
    config = HybridConfig.from_dict(raw | keys)
    assert config.rotary_dim == rotary_dim
    assert config.rope_theta == (5.0 if "5.0" in str(keys) else 1e6)


@pytest.mark.parametrize("rotary_dim", range(0, 98, 2))
def test_a_factor_gives_back_every_rotary_dim(rotary_dim):
    config = replace(HybridConfig.tiny(), head_dim=96, rotary_dim=rotary_dim)
    assert HybridConfig.from_dict(config.to_dict("transformers")).rotary_dim == rotary_dim


@pytest.mark.parametrize("value", [0, None, [0]], ids=str)
def test_no_shared_expert_has_three_spellings(value):
    raw = HybridConfig.tiny().to_dict() | {"shared_intermediate_size": value}
    assert HybridConfig.from_dict(raw) == HybridConfig.tiny()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_sise": 64}, "known config keys, got hidden_sise"),
        (
            {"shared_intermediate_size": 512},
            "shared_intermediate_size = 0, got 512: not implemented",
        ),
        ({"postnorm": False}, "postnorm = True, got False: not implemented"),
        ({"sliding_window": 4096}, "sliding_window = None, got 4096: not implemented"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0, got 0.1"),
        ({"router_jitter_noise": 0.01}, "router_jitter_noise = 0"),
        ({"hidden_act": "gelu"}, "hidden_act = 'silu', got 'gelu'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling = None"),
        ({"quantization_config": {"bits": 8}}, "quantization_config = None"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4}},
            "rope_parameters of type default",
        ),
        ({"rope_parameters": {"rope_theta": 7.0}}, "one rope_theta, got"),
        ({"rope_parameters": "yarn"}, "rope_parameters as an object"),
        ({"partial_rotary_factor": 1.0}, "one rotary_dim, got"),
        ({"partial_rotary_factor": 1.5}, r"partial_rotary_factor in \[0, 1\]"),
        ({"layer_types": [LINEAR] * 8}, "one layer_types, got"),
        ({"full_attn_alpha_factor": 9.0}, "one full_attn_alpha_factor, got"),
        ({"attn_type_list": [0, 2]}, r"attn_type_list of 0 \(lightning\) and 1 \(softmax\)"),
        ({"attn_type_list": 7}, "attn_type_list of 0"),
        ({"model_type": "llama"}, "the config of a MiniMax model, got model_type 'llama'"),
        ({"hidden_size": None}, "a config with hidden_size"),
        ({"hidden_size": "64"}, "an integer hidden_size, got '64'"),
    ],
    ids=str,
)
def test_configs_that_the_model_would_not_follow_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        HybridConfig.from_dict(HybridConfig.tiny().to_dict() | keys)


def test_a_config_must_say_which_layers_it_has():
    raw = HybridConfig.tiny().to_dict()
    del raw["attn_type_list"], raw["vocab_size"]
    with pytest.raises(ValueError, match="a config with vocab_size, layer_types"):
        HybridConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "expected JSON in"), ("[]", "a JSON object in .*, got list")]
)
def test_a_file_that_is_no_json_object_is_named(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        HybridConfig.from_json_file(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": (LINEAR, "softmax")}, f"layer_types among {LINEAR}, {FULL}, got softmax"),
        ({"layer_types": (LINEAR,) * 7}, "8 layer_types, one a hidden layer, got 7"),
        ({"layer_types": LINEAR}, "layer_types as a tuple"),
        ({"num_key_value_heads": 3}, "num_key_value_heads that divide the 4 heads, got 3"),
        ({"rotary_dim": 34}, "an even rotary_dim of at most head_dim 32, got 34"),
        ({"rotary_dim": 7}, "an even rotary_dim"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok of at most the 4 experts, got 5"),
        ({"num_attention_heads": 0}, "num_attention_heads >= 1, got 0"),
        ({"hidden_size": 64.0}, "an integer hidden_size, got 64.0"),
        ({"vocab_size": True}, "an integer vocab_size"),
        ({"conv_width": -1}, "conv_width >= 0"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps >= 0"),
        ({"mlp_alpha_factor": float("nan")}, "a finite mlp_alpha_factor"),
        ({"rope_theta": 0.0}, "rope_theta > 0"),
        ({"qk_norm": 1}, "qk_norm true or false"),
        ({"capacity_factor": 0.0}, "capacity_factor > 0 or None"),
        ({"router_aux_loss": "switch"}, "router_aux_loss among transformers, paper"),
        ({"eos_token_id": 320}, "eos_token_id in the vocabulary of 320, got 320"),
        ({"eos_token_id": [257, 400]}, "eos_token_id in the vocabulary"),
    ],
    ids=str,
)
def test_fields_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(HybridConfig.tiny(), **changes)


def test_unknown_layouts_are_refused():
    with pytest.raises(ValueError, match="layout among released, transformers, got 'hf'"):
        HybridConfig.tiny().to_dict("hf")


@pytest.mark.parametrize(("size", "millions"), [("3m", 3), ("15m", 15), ("100m", 100)])
def test_the_three_variants_of_a_lab_size_have_equal_parameters(size, millions):
    config = SIZES[size]
    variants = [config.all_softmax(), config.all_lightning(), config.hybrid()]
    assert variants[2] == config
    assert set(variants[0].layer_types) == {FULL}
    assert set(variants[1].layer_types) == {LINEAR}
    counts = [HybridLM(c, device="meta").num_parameters() for c in variants]
    assert max(counts) <= 1.01 * min(counts)
    assert counts[2] == pytest.approx(1e6 * millions, rel=0.1)
    # bf16 grouped products on a GPU ask for sides of 16 bytes.
    assert all(c.intermediate_size % 8 == 0 for c in variants)


@pytest.mark.parametrize(
    ("ratio", "position", "expected"),
    [(7, None, [7]), (3, None, [3, 7]), (3, 0, [0, 4]), (1, 0, [0, 2, 4, 6]), (7, 3, [3])],
)
def test_hybrids_place_a_softmax_layer_in_each_group(ratio, position, expected):
    config = HybridConfig.tiny().hybrid(ratio, position=position)
    assert [i for i, kind in enumerate(config.layer_types) if kind == FULL] == expected


@pytest.mark.parametrize(
    ("ratio", "position", "message"),
    [(0, None, "ratio >= 1"), (3, 4, r"position in \[0, 3\]"), (8, None, "more than 8 layers")],
)
def test_groups_that_do_not_fit_are_refused(ratio, position, message):
    with pytest.raises(ValueError, match=message):
        HybridConfig.tiny().hybrid(ratio, position)


def test_a_config_read_from_json_builds_a_model_with_the_same_function():
    torch.manual_seed(0)
    config = replace(HybridConfig.tiny(), **OPTIONS)
    model = HybridLM(config).eval()
    twin = HybridLM(HybridConfig.from_dict(config.to_dict("transformers"))).eval()
    twin.load_state_dict(model.state_dict())
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, twin(ids).logits)
