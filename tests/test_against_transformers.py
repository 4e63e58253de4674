"""The model against transformers' MiniMax class, and against its definition where that class errs.

Where the class is right (float32, whole heads rotated, a power of two of heads, no cache or its own
`generate`), it is the oracle. Where it isn't, the oracle is `definition`: the model in float64,
token by token, from the equations of arXiv 2501.08313 and the published modelling code, with the
weights of a checkpoint in the released layout. What transformers makes of such a case is recorded
as a property of the test, which `pytest -o junit_family=xunit1 --junitxml=FILE` writes out, and not
asserted, so that the test stands when they repair it.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import MiniMaxForCausalLM
from transformers.utils import logging

from attnlab.model import HybridConfig, HybridLM

logging.set_verbosity_error()
logging.disable_progress_bar()

LINEAR, FULL = "linear_attention", "full_attention"
STACKS = {
    "full-first": (FULL, LINEAR, FULL, LINEAR, FULL),
    "released-order": (LINEAR,) * 7 + (FULL,),
    "all-full": (FULL,) * 2,
    "linear-between": (LINEAR, LINEAR, FULL, LINEAR, LINEAR, LINEAR, FULL),
}
# Of the largest value. Both sides compute in float32 (6e-8) and add up to a few hundred terms in
# another order, layer after layer; their slopes differ from the published ones by up to
# 1e-5 / (L - 1) of the layer factor besides. Measured: 3e-7 to 1.5e-6, of gradients to 3e-6.
TOLERANCE = 1e-5


pytestmark = pytest.mark.usefixtures("one_thread")


def make_config(layer_types, **changes):
    fields = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": len(layer_types),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "layer_types": layer_types,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "rotary_dim": 16,
        "rope_theta": 1e4,
        "full_attn_alpha_factor": 1.7,
        "full_attn_beta_factor": 0.6,
        "linear_attn_alpha_factor": 1.3,
        "linear_attn_beta_factor": 0.8,
        "mlp_alpha_factor": 1.9,
        "mlp_beta_factor": 0.7,
    }
    return HybridConfig(**fields | changes)


def make_ours(config, seed=0):
    """A model whose parts all matter: norm weights around 1, matrices that keep sizes around 1."""
    model = HybridLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            scale = weight.shape[-1] ** -0.5
            weight.copy_(1.0 + 0.2 * noise if weight.ndim == 1 else scale * noise)
    return model


def to_theirs(model, folder, **changes):
    """transformers' model, loaded from a checkpoint that ours writes in transformers' layout."""
    model.save_pretrained(folder, layout="transformers")
    # Blocks shorter than the inputs, so that its carried state is used too.
    return MiniMaxForCausalLM.from_pretrained(folder, **{"block_size": 16} | changes).eval()


def make_pair(folder, layer_types, **changes):
    ours = make_ours(make_config(layer_types, **changes))
    return ours, to_theirs(ours, folder)


def make_ids(batch=2, num_tokens=40, seed=1):
    return torch.randint(61, (batch, num_tokens), generator=torch.Generator().manual_seed(seed))


def deviation(actual, expected):
    """Largest difference as a share of the largest expected value."""
    difference = (actual.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max()).item()


def greedy(model, ids, num_new, attention_mask=None):
    """Greedy continuation through the cache."""
    cache = model.new_cache(ids.shape[0], ids.shape[1] + num_new)
    logits = model(ids, cache=cache, attention_mask=attention_mask, logits_to_keep=1).logits
    tokens = [logits[:, -1].argmax(-1)]
    while len(tokens) < num_new:
        tokens.append(model(tokens[-1][:, None], cache=cache).logits[:, -1].argmax(-1))
    return torch.stack(tokens, 1)


def slopes(num_heads):
    """ALiBi's slopes (arXiv 2108.12409) in Python floats."""
    if math.log2(num_heads).is_integer():
        return [2.0 ** (-8.0 * (h + 1) / num_heads) for h in range(num_heads)]
    power = 2 ** math.floor(math.log2(num_heads))
    return slopes(power) + slopes(2 * power)[0::2][: num_heads - power]


def log_decays(config, layer):
    """Log decays of a layer, `[H]` float64; the layer factor is 1 + 1e-5 where L = 1."""
    last = config.num_hidden_layers - 1
    factor = 1.0 - layer / max(last, 1) + 1e-5
    return -torch.tensor(slopes(config.num_attention_heads), dtype=torch.float64) * factor


def definition(weights, config, ids):
    """Logits `[T, vocabulary]` in float64 of one sequence, with released names of the weights."""
    w = {name.removeprefix("model."): x.double() for name, x in weights.items()}

    def norm(x, weight, eps):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight

    x = w["embed_tokens.weight"][ids]  # [T, D]
    for i, kind in enumerate(config.layer_types):
        part = {n.split(".", 2)[2]: x for n, x in w.items() if n.startswith(f"layers.{i}.")}
        h = norm(x, part["input_layernorm.weight"], config.rms_norm_eps)
        mixer = lightning_layer if kind == LINEAR else softmax_layer
        name = "linear_attn" if kind == LINEAR else "full_attn"
        alpha, beta = (getattr(config, f"{name}_{greek}_factor") for greek in ("alpha", "beta"))
        y = alpha * h + beta * mixer(part, config, h, i, norm)
        g = norm(y, part["post_attention_layernorm.weight"], config.rms_norm_eps)
        x = config.mlp_alpha_factor * g + config.mlp_beta_factor * experts(part, config, g)
    return norm(x, w["norm.weight"], config.rms_norm_eps) @ w["lm_head.weight"].T


def lightning_layer(w, config, h, layer, norm):
    heads, dim = config.num_attention_heads, config.head_dim
    qkv = F.silu(h @ w["self_attn.qkv_proj.weight"].T).view(len(h), heads, 3 * dim)
    decay = log_decays(config, layer).exp()[:, None, None]
    state, outputs = torch.zeros(heads, dim, dim, dtype=torch.float64), []
    for token in qkv:
        q, k, v = token.split(dim, dim=-1)  # [H, K] each
        state = decay * state + k[:, :, None] * v[:, None, :]
        outputs.append((q[:, None, :] @ state).flatten())
    mixed = norm(torch.stack(outputs), w["self_attn.norm.weight"], 1e-6)
    gate = torch.sigmoid(h @ w["self_attn.output_gate.weight"].T)
    return (gate * mixed) @ w["self_attn.out_proj.weight"].T


def softmax_layer(w, config, h, layer, norm):
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = (
        (h @ w[f"self_attn.{name}_proj.weight"].T).view(len(h), -1, dim) for name in ("q", "k", "v")
    )
    outputs = torch.zeros(len(h), heads, dim, dtype=torch.float64)
    for head in range(heads):
        group = head * kv_heads // heads
        rotated_q, rotated_k = (rotate(x, config) for x in (q[:, head], k[:, group]))
        for t in range(len(h)):
            scores = rotated_k[: t + 1] @ rotated_q[t] / math.sqrt(dim)
            outputs[t, head] = scores.softmax(0) @ v[: t + 1, group]
    return outputs.flatten(1) @ w["self_attn.o_proj.weight"].T


def rotate(x, config):
    """Turn channels (i, i + n/2) of the first n = rotary_dim by t * theta^(-2i/n); rows are t."""
    half = config.rotary_dim // 2
    frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * frequency
    first, second, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag, rest), 1)


def experts(w, config, g):
    outputs = torch.zeros_like(g)
    for t, x in enumerate(g):
        logits = w["block_sparse_moe.gate.weight"] @ x
        chosen = logits.topk(config.num_experts_per_tok).indices
        for weight, e in zip(logits[chosen].softmax(0), chosen.tolist(), strict=True):
            w1, w2, w3 = (w[f"block_sparse_moe.experts.{e}.w{n}.weight"] for n in (1, 2, 3))
            outputs[t] += weight * (w2 @ (F.silu(w1 @ x) * (w3 @ x)))
    return outputs


def defined_logits(model, ids, folder):
    """`definition` of each row of `ids`, with the weights that the model saves."""
    model.save_pretrained(folder / "released")
    weights = load_file(folder / "released" / "model.safetensors")
    return torch.stack([definition(weights, model.config, row) for row in ids])


@pytest.mark.parametrize("stack", STACKS)
def test_logits_are_those_of_transformers(tmp_path, stack):
    ours, theirs = make_pair(tmp_path, STACKS[stack])
    with torch.no_grad():
        expected, actual = theirs(make_ids()).logits, ours(make_ids()).logits
    assert expected.std() > 0.3  # a model that says something
    assert deviation(actual, expected) < TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "num_attention_heads": 8, "head_dim": 8, "rotary_dim": 8},
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 5},
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 1e-2, "rope_theta": 1e6},
    ],
    ids=["all-kv-heads", "one-kv-head", "one-expert", "all-experts", "tied", "norm-and-theta"],
)
def test_logits_of_other_shapes_are_those_of_transformers(tmp_path, changes):
    ours, theirs = make_pair(tmp_path, (LINEAR, FULL, LINEAR, FULL), **changes)
    with torch.no_grad():
        assert deviation(ours(make_ids()).logits, theirs(make_ids()).logits) < TOLERANCE


def test_logits_over_blocks_of_the_default_size_are_those_of_transformers(tmp_path):
    ours = make_ours(make_config(STACKS["released-order"]))
    theirs = to_theirs(ours, tmp_path, block_size=256)
    ids = make_ids(batch=1, num_tokens=600)
    with torch.no_grad():
        assert deviation(ours(ids).logits, theirs(ids).logits) < TOLERANCE


def test_small_lightning_outputs_are_normed_with_an_epsilon_of_their_own(tmp_path):
    """Where values are small the epsilon decides: 1e-6 for these, whatever rms_norm_eps is."""
    ours = make_ours(make_config((LINEAR, LINEAR, FULL), rms_norm_eps=1e-3))
    with torch.no_grad():
        for layer in ours.model.layers[:2]:
            layer.self_attn.qkv_proj.weight *= 0.1
        ids = make_ids()
        theirs = to_theirs(ours, tmp_path)
        expected = defined_logits(ours, ids, tmp_path)
        assert deviation(ours(ids).logits, expected) < TOLERANCE
        assert deviation(ours(ids).logits, theirs(ids).logits) < TOLERANCE


@pytest.mark.parametrize("stack", ["full-first", "released-order"])
def test_gradients_of_all_parameters_are_those_of_transformers(tmp_path, stack):
    ours, theirs = make_pair(tmp_path, STACKS[stack])
    ids = make_ids()
    for model in (ours, theirs):
        logits = model(ids).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = {name: weight.grad for name, weight in theirs.named_parameters()}
    actual = {name: weight.grad for name, weight in ours.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert deviation(actual[name], gradient) < TOLERANCE, name


def test_the_router_loss_is_that_of_transformers(tmp_path):
    ours, theirs = make_pair(tmp_path, STACKS["full-first"])
    expected = theirs(make_ids(), output_router_logits=True).aux_loss
    loss = ours.train()(make_ids()).aux_loss
    assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE)


@pytest.mark.parametrize("stack", STACKS)
def test_greedy_generation_is_that_of_transformers_token_for_token(tmp_path, stack):
    ours, theirs = make_pair(tmp_path, STACKS[stack])
    ids = make_ids(batch=3, num_tokens=21)
    expected = theirs.generate(ids, max_new_tokens=40, do_sample=False)[:, 21:]
    assert expected.unique().numel() > 5  # not one token over and over
    assert torch.equal(greedy(ours, ids, 40), expected)


@pytest.mark.parametrize("stack", STACKS)
def test_padded_prompts_are_continued_as_transformers_continues_each_alone(
    tmp_path, stack, record_property
):
    """transformers' own padded batch goes astray where layer 0 is a lightning one."""
    ours, theirs = make_pair(tmp_path, STACKS[stack])
    ids, lengths = make_ids(batch=3, num_tokens=21), (21, 12, 1)
    mask = (torch.arange(21) >= 21 - torch.tensor(lengths)[:, None]).long()
    flags = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    alone = [
        theirs.generate(row[None, -n:], **flags)[0, n:] for row, n in zip(ids, lengths, strict=True)
    ]
    expected = torch.stack(alone)
    assert torch.equal(greedy(ours, ids, 20, attention_mask=mask), expected)
    together = theirs.generate(ids, attention_mask=mask, **flags)[:, 21:]
    record_property("transformers_tokens_astray", (together != expected).sum().item())


@pytest.mark.parametrize("original", [True, False], ids=["split-experts", "fused-experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_a_checkpoint_that_transformers_writes_is_loaded(tmp_path, original, dtype, shard):
    ours, theirs = make_pair(tmp_path / "a", STACKS["linear-between"])
    theirs = theirs.to(dtype)
    theirs.save_pretrained(tmp_path / "b", save_original_format=original, max_shard_size=shard)
    assert (len(list((tmp_path / "b").glob("*.safetensors"))) > 1) == (shard == "20KB")
    loaded = HybridLM.from_pretrained(tmp_path / "b")
    assert loaded.config == ours.config  # it names no rotary_dim: whole heads are rotated
    parameters = dict(theirs.named_parameters())
    for name, weight in loaded.named_parameters():
        assert weight.dtype == dtype and torch.equal(weight, parameters[name]), name
    if dtype == torch.float32:
        with torch.no_grad():
            assert torch.equal(loaded(make_ids()).logits, ours(make_ids()).logits)


@pytest.mark.parametrize("layout", ["released", "transformers"])
def test_transformers_loads_either_layout_of_ours(tmp_path, layout, record_property):
    """Decays are its persistent buffers and in no released file: it may report them missing."""
    ours = make_ours(make_config(STACKS["linear-between"]))
    ours.save_pretrained(tmp_path, layout="transformers")
    config = (tmp_path / "config.json").read_text()
    ours.save_pretrained(tmp_path, layout=layout)
    (tmp_path / "config.json").write_text(config)  # it reads its own spelling alone
    theirs, info = MiniMaxForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    decays = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    assert all(name.endswith(decays) for name in info["missing_keys"])
    record_property("transformers_reports_missing", len(info["missing_keys"]))
    parameters = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, parameters[name]), name
    loaded = HybridLM.from_pretrained(tmp_path)  # ours misses nothing in the same files
    assert {name for name, _ in loaded.named_parameters()} == set(parameters)
    assert not {name for name in loaded.state_dict() if name.endswith((*decays, "log_decay"))}


@pytest.mark.parametrize("stack", STACKS)
def test_the_definition_is_that_of_transformers_where_transformers_is_right(tmp_path, stack):
    ours, theirs = make_pair(tmp_path, STACKS[stack])
    ids = make_ids()
    with torch.no_grad():
        assert deviation(theirs(ids).logits, defined_logits(ours, ids, tmp_path)) < TOLERANCE


@pytest.mark.parametrize("rotary_dim", [8, 4, 0])
def test_part_of_a_head_is_rotated(tmp_path, rotary_dim, record_property):
    """transformers rotates whole heads, whatever the config says."""
    ours, theirs = make_pair(tmp_path, STACKS["full-first"], rotary_dim=rotary_dim)
    ids = make_ids()
    expected = defined_logits(ours, ids, tmp_path)
    with torch.no_grad():
        assert deviation(ours(ids).logits, expected) < TOLERANCE
        record_property("transformers_deviates_by", deviation(theirs(ids).logits, expected))


@pytest.mark.parametrize("stack", STACKS)
def test_several_tokens_continue_from_the_cache_in_any_order_of_layers(
    tmp_path, stack, record_property
):
    """transformers takes its cache's length from layer 0, which has none if it is a lightning one."""
    ours, theirs = make_pair(tmp_path, STACKS[stack])
    ids = make_ids(num_tokens=30)
    expected = defined_logits(ours, ids, tmp_path)
    cache, parts = ours.new_cache(2, 30), []
    with torch.no_grad():
        for part in ids.split([11, 7, 1, 9, 2], dim=1):
            parts.append(ours(part, cache=cache).logits)
        assert deviation(torch.cat(parts, 1), expected) < TOLERANCE
        past = theirs(ids[:, :21], use_cache=True).past_key_values
        rest = theirs(ids[:, 21:], past_key_values=past, use_cache=True).logits
    record_property("transformers_deviates_by", deviation(rest, expected[:, 21:]))


@pytest.mark.parametrize("heads", [3, 6, 12])
def test_slopes_of_heads_that_are_no_power_of_two_are_interpolated(
    tmp_path, heads, record_property
):
    """transformers spaces the slopes evenly there."""
    changes = {"num_attention_heads": heads, "num_key_value_heads": 3}
    ours, theirs = make_pair(tmp_path, (LINEAR, LINEAR, FULL), **changes)
    for layer in (0, 1):
        decay = ours.model.layers[layer].self_attn.log_decay
        torch.testing.assert_close(  # one float32 rounding of slope, factor and product each
            decay.double(), log_decays(ours.config, layer), rtol=2**-22, atol=0
        )
    ids = make_ids()
    expected = defined_logits(ours, ids, tmp_path)
    with torch.no_grad():
        assert deviation(ours(ids).logits, expected) < TOLERANCE
        record_property("transformers_deviates_by", deviation(theirs(ids).logits, expected))


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_layer_factors_fall_to_1e_5_in_the_last_layer(tmp_path, num_layers, record_property):
    """transformers divides by L - 1 + 1e-5, which leaves its last layer with more than 1e-5."""
    ours, theirs = make_pair(tmp_path, (LINEAR,) * num_layers)
    last, head = num_layers - 1, 0
    decay = ours.model.layers[last].self_attn.log_decay
    factor = 1e-5 if num_layers > 1 else 1.0 + 1e-5
    assert decay[head].item() == pytest.approx(-(2.0**-2) * factor, rel=1e-6)
    slope = theirs.model.layers[last].self_attn.slope_rate.flatten()[head].item()
    record_property("transformers_slope", slope)
    ids = make_ids(num_tokens=100)
    with torch.no_grad():
        assert deviation(ours(ids).logits, defined_logits(ours, ids, tmp_path)) < TOLERANCE


def test_decays_of_a_bf16_model_are_those_of_float32(tmp_path, record_property):
    """bf16 rounds exp(-s) to 1 for most heads of the late layers: they would never forget."""
    small = {"hidden_size": 8, "head_dim": 2, "rotary_dim": 2, "intermediate_size": 4}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8}
    config = make_config(((LINEAR,) * 7 + (FULL,)) * 10, **small, **heads)
    HybridLM(config, dtype=torch.bfloat16).save_pretrained(tmp_path, layout="transformers")
    loaded = HybridLM.from_pretrained(tmp_path)
    models = (loaded, HybridLM.from_pretrained(tmp_path, dtype=torch.float32).bfloat16())
    for model in models:
        for i, layer in enumerate(model.model.layers):
            if config.layer_types[i] == LINEAR:
                decay = layer.self_attn.log_decay
                assert layer.self_attn.qkv_proj.weight.dtype == torch.bfloat16
                assert decay.dtype == torch.float32 and (decay.exp() < 1).all()
                torch.testing.assert_close(
                    decay.double(), log_decays(config, i), rtol=2**-22, atol=1e-10
                )
    theirs = MiniMaxForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    slope = theirs.model.layers[78].self_attn.slope_rate
    forgetful = (torch.exp(-slope) < 1).float().mean().item()
    record_property("transformers_decaying_heads_of_layer_78", forgetful)


def test_the_state_of_a_bf16_model_is_that_of_a_float64_recurrence(tmp_path, record_property):
    """A prefill, then single tokens, with the keys and values that the bf16 projections give."""
    ours = make_ours(make_config((FULL, LINEAR, LINEAR, FULL))).bfloat16()
    layer = 2  # exp(-s) of its heads: 0.920 to 0.9987, of which bf16 would round the last to 1
    mixer, projected = ours.model.layers[layer].self_attn, []
    mixer.qkv_proj.register_forward_hook(lambda module, inputs, output: projected.append(output))
    ids = make_ids(batch=1, num_tokens=320)
    cache = ours.new_cache(1, 320)
    with torch.no_grad():
        ours(ids[:, :300], cache=cache)
        for t in range(300, 320):
            ours(ids[:, t : t + 1], cache=cache)
    assert projected[0].dtype == torch.bfloat16
    qkv = F.silu(torch.cat(projected, 1))[0].double().view(320, 4, 48)
    decay = log_decays(ours.config, layer).exp()[:, None, None]
    state = torch.zeros(4, 16, 16, dtype=torch.float64)
    for token in qkv:
        _, k, v = token.split(16, dim=-1)
        state = decay * state + k[:, :, None] * v[:, None, :]
    actual = cache.layers[layer].state
    assert actual.dtype == torch.float32
    # A backend may round the operands of its products to bf16, 2^-9 each, which averages out over
    # the tokens (measured without: 2e-7). A state in bf16 is off by 2e-2, decays by 2e-1.
    assert deviation(actual[0], state) < 1e-3
    theirs = to_theirs(ours, tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        past = theirs(ids[:, :32], use_cache=True).past_key_values
    record_property("transformers_state_dtype", str(past.get_linear_cache(layer).dtype))


def test_a_config_that_leaves_out_the_order_of_layers_is_refused():
    """transformers would guess: full and lightning attention in turn, which no release has."""
    raw = make_config(STACKS["released-order"]).to_dict("transformers")
    del raw["layer_types"]
    with pytest.raises(ValueError, match="layer_types"):
        HybridConfig.from_dict(raw)
    assert dataclasses.replace(make_config(STACKS["all-full"]), rope_theta=5.0).rope_theta == 5.0
