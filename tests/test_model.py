"""The hybrid model against its equations in float64, and its calls against one another.

`definition` is the model written out: a recurrence a token, softmax over the tokens so far, rotation
of complex numbers, every expert for every token. Everything else compares a call of the model
(packed, padded, recomputed, compiled) with the plain call that must give the same.
"""

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attnlab.decay import minimax_log_decay
from attnlab.model import SIZES, HybridConfig, HybridLM
from attnlab.registry import BackendUnavailable, list_backends
from attnlab.testing import assert_as_accurate

LINEAR, FULL = "linear_attention", "full_attention"
FLOAT64 = 1e-11
"""Of the largest value: some hundred float64 roundings (1e-16) a layer, amplified by a few norms."""
FLOAT32 = 2e-5
"""Of the largest value: the same in float32 (6e-8). A wrong token or position moves 1e-2 or more."""

OPTIONS = {
    "conv_width": 4,
    "qk_norm": True,
    "log_length_scale": True,
    "rotary_dim": 0,
}
VARIANTS = {
    "minimax-01": {},
    "options": OPTIONS,
    "half-rotated-options": OPTIONS | {"rotary_dim": 8},
    "six-heads": {"num_attention_heads": 6, "num_key_value_heads": 3, "rotary_dim": 16},
    "softmax-first": {"layer_types": (FULL, LINEAR, LINEAR)},
    "softmax-alone": {"layer_types": (FULL,), "num_hidden_layers": 1},
    "lightning-alone": {"layer_types": (LINEAR,), "num_hidden_layers": 1},
    "tied": {"tie_word_embeddings": True},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def small_config(**changes):
    config = HybridConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=(LINEAR, LINEAR, FULL),
        num_local_experts=4,
        num_experts_per_tok=2,
        rotary_dim=8,
        rope_theta=100.0,
        full_attn_alpha_factor=1.7,
        full_attn_beta_factor=0.8,
        linear_attn_alpha_factor=1.3,
        linear_attn_beta_factor=1.2,
        mlp_alpha_factor=1.5,
        mlp_beta_factor=0.9,
        rotary_float64=True,
        initializer_range=0.3,  # so that scores, gates and routers are far from even
    )
    return replace(config, **changes)


def make_model(dtype=torch.float32, **changes):
    """Weights are the same for each dtype, but for its rounding."""
    torch.manual_seed(1)
    model = HybridLM(small_config(**changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and "length_scale" not in name:
                weight.add_(0.2 * torch.randn_like(weight))
    return model.to(dtype)


def make_ids(batch, num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(50, (batch, num_tokens), generator=generator)


def deviation(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def rms_norm(x, weight, eps):
    return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def convolved(u, weights, prefix):
    """sum over w of c[:, W-1-w] u_{t-w}, token by token."""
    if f"{prefix}.conv.weight" not in weights:
        return u
    taps = weights[f"{prefix}.conv.weight"]
    width = taps.shape[1]
    rows = []
    for t in range(len(u)):
        terms = [taps[:, width - 1 - w] * u[t - w] for w in range(width) if t - w >= 0]
        rows.append(sum(terms))
    return torch.stack(rows)


def lightning(config, weights, prefix, layer, u):
    d, decay = (
        config.head_dim,
        minimax_log_decay(config.num_attention_heads, layer, config.num_hidden_layers).double(),
    )
    outputs = []
    for h in range(config.num_attention_heads):
        z = u @ weights[f"{prefix}.qkv_proj.weight"][3 * d * h : 3 * d * (h + 1)].T
        z = z * sigmoid(z)
        q, k, v = z[:, :d], z[:, d : 2 * d], z[:, 2 * d :]
        state, rows = torch.zeros(d, d, dtype=u.dtype), []
        for t in range(len(u)):
            state = torch.exp(decay[h]) * state + torch.outer(k[t], v[t])
            rows.append(q[t] @ state)
        outputs.append(torch.stack(rows))
    normed = rms_norm(torch.cat(outputs, -1), weights[f"{prefix}.norm.weight"], 1e-6)
    gate = sigmoid(u @ weights[f"{prefix}.output_gate.weight"].T)
    return (gate * normed) @ weights[f"{prefix}.out_proj.weight"].T


def rotated(config, x):
    """Channels i and i + R/2 as one complex number, times exp(i t theta^(-2i/R))."""
    half = config.rotary_dim // 2
    if half == 0:
        return x
    numbers = torch.complex(x[:, :half], x[:, half : 2 * half])
    t = torch.arange(len(x), dtype=torch.float64)[:, None]
    angle = t * config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = numbers * torch.exp(1j * angle)
    return torch.cat([turned.real, turned.imag, x[:, 2 * half :]], -1)


def softmax(config, weights, prefix, u):
    d, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    outputs = []
    for h in range(config.num_attention_heads):
        own, shared = slice(d * h, d * h + d), slice(d * (h // group), d * (h // group) + d)
        q = u @ weights[f"{prefix}.q_proj.weight"][own].T
        k = u @ weights[f"{prefix}.k_proj.weight"][shared].T
        v = u @ weights[f"{prefix}.v_proj.weight"][shared].T
        if config.qk_norm:
            q = rms_norm(q, weights[f"{prefix}.q_norm.weight"], config.rms_norm_eps)
            k = rms_norm(k, weights[f"{prefix}.k_norm.weight"], config.rms_norm_eps)
        q, k = rotated(config, q), rotated(config, k)
        rows = []
        for t in range(len(u)):
            scale = d**-0.5
            if config.log_length_scale:
                scale = scale * weights[f"{prefix}.length_scale"][h] * math.log(t + 1)
            weight = torch.exp(scale * (k[: t + 1] @ q[t]))
            rows.append((weight / weight.sum()) @ v[: t + 1])
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, -1) @ weights[f"{prefix}.o_proj.weight"].T


def experts(config, weights, prefix, g):
    scores = torch.exp(g @ weights[f"{prefix}.gate.weight"].T)
    probabilities = scores / scores.sum(-1, keepdim=True)
    width, rows = config.intermediate_size, []
    for t in range(len(g)):
        chosen = sorted(range(config.num_local_experts), key=lambda e: -probabilities[t, e].item())
        chosen = chosen[: config.num_experts_per_tok]
        total = sum(probabilities[t, e] for e in chosen)
        row = 0
        for e in chosen:
            w1 = weights[f"{prefix}.experts.gate_up_proj"][e, :width]
            w3 = weights[f"{prefix}.experts.gate_up_proj"][e, width:]
            a = w1 @ g[t]
            y = weights[f"{prefix}.experts.down_proj"][e] @ (a * sigmoid(a) * (w3 @ g[t]))
            row = row + probabilities[t, e] / total * y
        rows.append(row)
    return torch.stack(rows)


def definition(config, weights, ids):
    """Logits `[T, V]` of one sequence."""
    x = weights["model.embed_tokens.weight"][ids]
    for i, kind in enumerate(config.layer_types):
        prefix = f"model.layers.{i}"
        h = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], config.rms_norm_eps)
        u = convolved(h, weights, f"{prefix}.self_attn")
        if kind == LINEAR:
            mixed = lightning(config, weights, f"{prefix}.self_attn", i, u)
            alpha, beta = config.linear_attn_alpha_factor, config.linear_attn_beta_factor
        else:
            mixed = softmax(config, weights, f"{prefix}.self_attn", u)
            alpha, beta = config.full_attn_alpha_factor, config.full_attn_beta_factor
        y = alpha * h + beta * mixed
        g = rms_norm(y, weights[f"{prefix}.post_attention_layernorm.weight"], config.rms_norm_eps)
        mixture = experts(config, weights, f"{prefix}.mlp", g)
        x = config.mlp_alpha_factor * g + config.mlp_beta_factor * mixture
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps) @ weights[head].T


def weights_of(model):
    return {
        name: weight.detach().double().requires_grad_() for name, weight in model.named_parameters()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_those_of_the_definition(variant):
    model = make_model(torch.float64, **VARIANTS[variant])
    weights, ids = weights_of(model), make_ids(2, 12)
    expected = torch.stack([definition(model.config, weights, row) for row in ids])
    logits = model(ids).logits
    assert deviation(logits, expected) < FLOAT64
    flowing = torch.randn(logits.shape, dtype=torch.float64)
    (logits * flowing).sum().backward()
    (expected * flowing).sum().backward()
    for name, weight in model.named_parameters():
        assert deviation(weight.grad, weights[name].grad) < 100 * FLOAT64, name


def test_angles_in_float32_are_close_to_those_in_float64():
    """At 19 tokens the angles differ by 1e-6 rad; a head rotated otherwise would differ by 1."""
    exact, rounded = (make_model(torch.float64, rotary_float64=flag) for flag in (True, False))
    ids = make_ids(1, 19)
    assert 0 < deviation(rounded(ids).logits, exact(ids).logits) < 1e-5


@pytest.mark.parametrize("backend", [b for b in list_backends("lightning_attention") if b != "fla"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backends_give_logits_as_accurate_as_one_another(backend, dtype, device):
    """In one pass, packed, and step by step; all experts are chosen, so that no choice tips over."""
    changes = {"num_experts_per_tok": 4, "head_dim": 32}
    model = make_model(dtype, **changes).to(device)
    oracle = make_model(torch.float64, **changes).to(device)
    oracle.load_state_dict(model.state_dict())  # the weights as they were rounded
    ids, bounds = make_ids(1, 150).to(device), torch.tensor([0, 70, 71, 150])

    def logits(model):
        cache = model.new_cache(1, 150)
        with torch.no_grad():
            parts = [model(part, cache=cache).logits for part in ids.split([140] + [1] * 10, 1)]
            return [model(ids).logits, model(ids, cu_seqlens=bounds).logits, torch.cat(parts, 1)]

    other = "torch" if backend == "reference" else "reference"
    expected, baseline = logits(oracle), logits(model.use_backend(other, "reference"))
    try:
        actual = logits(model.use_backend(backend, "reference" if other == "torch" else None))
    except BackendUnavailable as reason:
        pytest.skip(str(reason))
    for triple in zip(actual, expected, baseline, strict=True):
        assert_as_accurate(*triple)


@pytest.mark.skipif(torch.cuda.is_available(), reason="triton runs compiled here")
def test_the_triton_backend_fits_in_interpreted():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        __file__,
        "-k",
        "one_another and triton",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "2 passed" in result.stdout, result.stdout


def test_a_named_backend_runs(monkeypatch):
    model, ids = make_model(), make_ids(1, 9)
    calls = []
    from attnlab import reference

    for name in ("lightning_attention", "softmax_attention"):
        original = getattr(reference, name)

        def spy(*args, _name=name, _original=original, **flags):
            calls.append(_name)
            return _original(*args, **flags)

        monkeypatch.setattr("attnlab.registry._loaded", {})
        monkeypatch.setattr(reference, name, spy)
    model.use_backend("reference", "reference")(ids)
    assert calls == ["lightning_attention", "lightning_attention", "softmax_attention"]


@pytest.mark.parametrize("variant", ["minimax-01", "options", "half-rotated-options"])
def test_packed_documents_are_documents_alone(variant):
    """Logits and gradients; documents of one token, shorter than the convolution, and empty."""
    model = make_model(torch.float64, **VARIANTS[variant])
    lengths = [7, 1, 0, 2, 20]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    ids = make_ids(1, sum(lengths))
    alone = [model(ids[:, a:b]).logits for a, b in itertools.pairwise(bounds) if b > a]
    expected = torch.cat(alone, 1)
    flowing = torch.randn(expected.shape, dtype=torch.float64)
    grads = torch.autograd.grad((expected * flowing).sum(), list(model.parameters()))
    packed = model(ids, cu_seqlens=bounds.int()).logits
    assert deviation(packed, expected) < FLOAT64
    packed_grads = torch.autograd.grad((packed * flowing).sum(), list(model.parameters()))
    for (name, _), actual, grad in zip(model.named_parameters(), packed_grads, grads, strict=True):
        assert deviation(actual, grad) < 100 * FLOAT64, name
    last = model(ids, cu_seqlens=bounds, logits_to_keep=1).logits
    assert last.shape == (1, 5, 50)
    assert deviation(last[0, [0, 1, 3, 4]], expected[0, [6, 7, 9, 29]]) < FLOAT64
    assert (last[0, 2] == 0).all()


@pytest.mark.parametrize("variant", ["minimax-01", "options"])
def test_left_padded_rows_are_rows_alone(variant):
    model = make_model(torch.float64, **VARIANTS[variant])
    ids, lengths = make_ids(3, 12), [12, 5, 1]
    mask = torch.arange(12) >= 12 - torch.tensor(lengths)[:, None]
    padded = model(ids, attention_mask=mask.long(), return_hidden=True)
    loss = 0
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, 12 - length :]).logits
        loss = loss + alone.square().sum()
        assert deviation(padded.logits[row, 12 - length :], alone[0]) < FLOAT64
        assert (padded.logits[row, : 12 - length] == 0).all()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    actual = torch.autograd.grad(padded.logits.square().sum(), list(model.parameters()))
    assert max(map(deviation, actual, expected)) < 100 * FLOAT64
    kept = model(ids, attention_mask=mask, logits_to_keep=2).logits
    assert deviation(kept, padded.logits[:, -2:]) < FLOAT64


def test_kept_logits_are_the_last_ones_and_hidden_states_give_all():
    model, ids = make_model(), make_ids(2, 9)
    whole = model(ids, return_hidden=True)
    assert deviation(model(ids, logits_to_keep=3).logits, whole.logits[:, -3:]) < FLOAT32
    assert whole.hidden.shape == (2, 9, 24)
    assert torch.equal(model.lm_head(whole.hidden), whole.logits)
    assert model(ids).hidden is None
    assert model(ids, logits_to_keep=100).logits.shape == (2, 9, 50)


def test_recomputing_layers_gives_the_same_gradients():
    model, ids = make_model(**OPTIONS, capacity_factor=0.8).train(), make_ids(2, 30)
    grads = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        output = model(ids)
        loss = output.logits.square().mean() + output.aux_loss
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_recomputing_keeps_no_more_than_a_state_a_layer():
    """Bytes that autograd saves: a tenth at most, since a layer keeps dozens of tensors inside."""
    model, ids = make_model().train(), make_ids(2, 64)
    saved = {}
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        found = {}

        def pack(x, found=found):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(ids, return_hidden=True)
        saved[recompute] = sum(n for p, n in found.items() if p not in weights)
    assert saved[True] < saved[False] / 10


def test_the_multiplier_of_lightning_mixers_counts_in_training_alone():
    model, ids = make_model(torch.float64), make_ids(1, 20)
    model.linear_multiplier = 0.25
    plain = make_model(torch.float64)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    weaker = make_model(torch.float64, linear_attn_beta_factor=1.2 * 0.25).train()
    assert deviation(model.train()(ids).logits, weaker(ids).logits) < FLOAT64
    assert deviation(model(ids).logits, plain(ids).logits) > 1e-3


def test_decays_stay_float32_whatever_is_done_to_the_model():
    config = small_config(num_attention_heads=6)
    made = {
        "bf16": HybridLM(config).to(torch.bfloat16),
        "made in bf16": HybridLM(config, dtype=torch.bfloat16),
        "from empty memory": HybridLM(config, device="meta").to_empty(device="cpu"),
        "float64": HybridLM(config).double(),
        "to meta and back": HybridLM(config).to("meta").to_empty(device="cpu"),
    }
    for way, model in made.items():
        for number, kind in enumerate(config.layer_types):
            if kind == LINEAR:
                decay = model.model.layers[number].self_attn.log_decay
                # ALiBi's slopes of six heads: those of four, then every other one of eight.
                slopes = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
                factor = 1 - number / 2 + 1e-5
                expected = torch.tensor([-s * factor for s in slopes])
                assert decay.dtype == torch.float32, way
                torch.testing.assert_close(decay, expected, rtol=1e-6, atol=0)
        assert not any("decay" in name for name in model.state_dict())


def test_tied_embeddings_stay_tied():
    config = small_config(tie_word_embeddings=True)
    for model in (HybridLM(config), HybridLM(config, device="meta").to_empty(device="cpu")):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.num_parameters() == config.num_parameters()


def test_new_weights_are_normal_and_norms_are_ones():
    torch.manual_seed(0)
    model = HybridLM(replace(SIZES["tiny"], **OPTIONS))
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert (weight == 1).all(), name
        elif "length_scale" in name:
            assert (weight == torch.tensor(0.43)).all(), name
        elif "conv" in name:
            assert weight.abs().max() <= 0.5, name  # 4 ** -0.5
            assert weight.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.2), name
        else:
            # The deviation of n draws has a relative error of (2n)^(-1/2): 4 % for 256, thrice.
            assert weight.std().item() == pytest.approx(0.02, rel=0.15), name


def test_minimax_01_has_456_billion_parameters_of_which_46_are_active():
    model = HybridLM(HybridConfig.minimax_01(), device="meta")
    lightning = 3 * 8192 * 6144 + 2 * 8192 * 6144 + 8192
    full = 2 * 8192 * 6144 + 2 * 1024 * 6144
    expert, rest = 3 * 9216 * 6144, 32 * 6144 + 2 * 6144
    behind = 70 * lightning + 10 * full + 80 * rest + 6144
    assert model.num_parameters() == behind + 80 * 32 * expert + 2 * 200_064 * 6144
    assert model.num_parameters() == 456_089_655_296
    assert model.num_active_parameters() == behind + 80 * 2 * expert == 45_944_920_064


@pytest.mark.parametrize("options", [{}, OPTIONS, {"tie_word_embeddings": True}], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_configs_count_the_parameters_that_models_have(size, options):
    for config in (SIZES[size], SIZES[size].all_softmax(), SIZES[size].all_lightning()):
        config = replace(config, **options)
        assert HybridLM(config, device="meta").num_parameters() == config.num_parameters()


def test_cache_bytes_are_those_of_the_cache():
    model = make_model(torch.bfloat16, conv_width=4)
    cache = model.new_cache(3, 100)
    lengths = 3 * 8
    assert model.cache_bytes(100, batch=3) == cache.num_bytes - lengths
    # MiniMax-01: 280 MiB of states, and 40,960 bytes of keys and values a token.
    large = HybridLM(HybridConfig.minimax_01(), device="meta", dtype=torch.bfloat16)
    assert large.cache_bytes(0) == 280 * 2**20
    assert large.cache_bytes(1_000_000) - large.cache_bytes(0) == 40_960 * 1_000_000


def test_flops_are_those_of_the_products():
    """torch counts what it sees, all but the experts and, there, half of a causal square."""
    num_tokens = 64
    model, ids = make_model(), make_ids(1, num_tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.use_backend("reference", "sdpa")(ids, logits_to_keep=1)
    projections = 2 * num_tokens * (2 * 5 * 24 * 64 + 24 * (2 * 64 + 2 * 32) + 3 * 4 * 24)
    head = 2 * 24 * 50
    counted = counter.get_flop_counts()["Global"]
    assert counted[torch.ops.aten.mm] == projections + head
    experts = 3 * 2 * num_tokens * 2 * 3 * 24 * 32
    scores = 4 * num_tokens * (num_tokens + 1) // 2 * 2 * 2 * 16
    lightning = 2 * num_tokens * 4 * (2 * 64 * 2 * 16 + 4 * 16 * 16)
    assert model.prefill_flops(num_tokens) == projections + head + experts + scores + lightning
    one = (projections + experts) // num_tokens + head
    step = 2 * 4 * 5 * 16 * 16 + 4 * (num_tokens + 1) * 2 * 2 * 16
    assert model.decode_flops(num_tokens) == one + step


def test_the_forward_can_be_traced_whole():
    model, ids = make_model(torch.bfloat16).train(), make_ids(2, 17)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual, expected = compiled(ids), model(ids)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.aux_loss, expected.aux_loss)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_autocast_computes_in_bf16_and_routes_in_float32():
    model, ids = make_model().train(), make_ids(2, 33)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids)
    (output.logits.float().square().mean() + output.aux_loss).backward()
    exact = model(ids)
    assert output.logits.dtype == torch.bfloat16
    assert output.aux_loss.dtype == torch.float32
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    # Rounded operands (2^-9) through three layers; a token sent to other experts moves by 10 %.
    error = (output.logits.float() - exact.logits).square().mean().sqrt()
    assert error < 0.1 * exact.logits.square().mean().sqrt()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids \[B, T\]"),
        ({"input_ids": torch.tensor([[1.0]])}, "int32 or int64"),
        ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, "at least one token"),
        ({"input_ids": torch.tensor([[1, 50]])}, r"ids in \[0, 50\), got 1 to 50"),
        ({"input_ids": torch.tensor([[-1, 5]])}, r"ids in \[0, 50\)"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "padding on the left"),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, "at least one token"),
        ({"attention_mask": torch.tensor([[0, 2, 1]])}, "attention_mask of 0 and 1"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask of shape \[1, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 2])}, "end at the 3 tokens"),
        ({"cu_seqlens": torch.tensor([0, 2, 1, 3])}, "sorted"),
        ({"input_ids": torch.ones(2, 3).long(), "cu_seqlens": torch.tensor([0, 3])}, "batch 1"),
        ({"cu_seqlens": torch.tensor([0, 3]), "logits_to_keep": 2}, "logits_to_keep 0 or 1"),
        ({"logits_to_keep": -1}, "logits_to_keep >= 0"),
        (
            {"cu_seqlens": torch.tensor([0, 3]), "attention_mask": torch.ones(1, 3)},
            "a mask or cu_seqlens",
        ),
    ],
    ids=str,
)
def test_calls_that_make_no_sense_are_refused(call, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": torch.tensor([[1, 2, 3]])} | call)


def test_backends_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"a backend among .*torch.*, got tritton"):
        make_model().use_backend(lightning="tritton")
    with pytest.raises(ValueError, match=r"a backend among .*sdpa.*, got torch"):
        make_model().use_backend(softmax="torch")
