"""The definitions: their forms agree with each other, with their gradients, and with MiniMax's code."""

import itertools

import pytest
import torch

from attnlab import chunked, minimax_log_decay, reference


def qkvgs(B=2, H=3, T=150, K=16, V=24, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (B, H, T, K), (B, H, T, K), (B, H, T, V)
    q, k, v = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    state = torch.randn(B, H, K, V, generator=generator, dtype=dtype)
    return q, k, v, -torch.linspace(0, 0.4, H, dtype=dtype), state


@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
def test_recurrence_mask_form_and_chunks_are_one_function(T):
    q, k, v, g, state = qkvgs(T=T)
    flags = {"scale": 0.3, "initial_state": state}
    results = [
        reference.lightning_recurrence(q, k, v, g, **flags),
        reference.lightning_attention(q, k, v, g, return_final_state=True, **flags),
        chunked.lightning_attention(q, k, v, g, return_final_state=True, **flags),
    ]
    for output, last in results[1:]:
        torch.testing.assert_close(output, results[0][0], rtol=1e-12, atol=1e-11)
        torch.testing.assert_close(last, results[0][1], rtol=1e-12, atol=1e-11)


def test_packed_mask_form_is_the_dense_one_document_by_document():
    q, k, v, g, _ = qkvgs(B=1)
    bounds = [0, 40, 40, 41, 150]
    states = torch.randn(4, 3, 16, 24, dtype=torch.float64)
    flags = {"scale": 0.3, "return_final_state": True}
    packed = reference.lightning_attention_varlen(
        q, k, v, g, torch.tensor(bounds), initial_state=states, **flags
    )
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        part = (x[:, :, a:b] for x in (q, k, v))
        output, last = reference.lightning_attention(
            *part, g, initial_state=states[n : n + 1], **flags
        )
        torch.testing.assert_close(packed[0][:, :, a:b], output)
        torch.testing.assert_close(packed[1][n : n + 1], last)


def leaves(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


def test_lightning_passes_gradcheck_in_every_argument():
    q, k, v, g, state = leaves(*qkvgs(B=1, H=2, T=9, K=3, V=4))

    def both(q, k, v, g, state):
        return reference.lightning_attention(
            q, k, v, g, scale=0.5, initial_state=state, return_final_state=True
        )

    assert torch.autograd.gradcheck(both, (q, k, v, g, state))


def test_softmax_passes_gradcheck_and_so_does_its_logsumexp():
    q, k, v, _, _ = qkvgs(B=1, H=2, T=7, K=3, V=4)
    arguments = leaves(q[:, :, -4:], k, v)

    def both(q, k, v):
        return reference.softmax_attention_with_lse(q, k, v, is_causal=True)

    assert torch.autograd.gradcheck(both, arguments)


def test_chunked_form_passes_gradcheck_across_chunk_edges():
    q, k, v, g, state = leaves(*qkvgs(B=1, H=2, T=67, K=2, V=2))

    def both(q, k, v, g, state):
        return chunked.lightning_attention(
            q, k, v, g, scale=0.5, initial_state=state, return_final_state=True
        )

    assert torch.autograd.gradcheck(both, (q, k, v, g, state), fast_mode=True)


def test_causal_mask_is_aligned_bottom_right():
    seen = reference.causal_mask(2, 4, torch.device("cpu"))
    assert seen.tolist() == [[True, True, True, False], [True, True, True, True]]
    unseen = reference.causal_mask(4, 2, torch.device("cpu"))
    assert unseen.tolist() == [[False, False], [False, False], [True, False], [True, True]]


def test_a_query_that_sees_no_key_gives_zero_and_no_gradient():
    q, k, v, _, _ = qkvgs(T=5)
    q, k, v = leaves(q, k[:, :, :3], v[:, :, :3])
    output, lse = reference.softmax_attention_with_lse(q, k, v, is_causal=True)
    assert (output[:, :, :2] == 0).all() and (lse[:, :, :2] == -torch.inf).all()
    grads = torch.autograd.grad(output.sum(), (q, k, v))
    assert all(torch.isfinite(x).all() for x in grads)


@pytest.mark.parametrize("layer", [0, 3, 6])
def test_the_recurrence_is_the_lightning_layer_of_transformers(layer):
    """Weights are set so that the layer's projections and gate pass our tensors through."""
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    heads, dim, tokens, layers = 4, 8, 50, 8
    config = minimax.MiniMaxConfig(
        hidden_size=heads * dim,
        num_attention_heads=heads,
        head_dim=dim,
        num_hidden_layers=layers,
        block_size=16,
        layer_types=["linear_attention"] * layers,
    )
    torch.manual_seed(0)
    module = minimax.MiniMaxLightningAttention(config, layer_idx=layer)
    hidden = torch.randn(2, tokens, heads * dim)
    mixed = torch.nn.functional.silu(module.qkv_proj(hidden)).view(2, tokens, heads, 3 * dim)
    q, k, v = mixed.transpose(1, 2).split(dim, dim=-1)
    log_decay = minimax_log_decay(heads, layer, layers)
    output, _ = reference.lightning_recurrence(q, k, v, log_decay)
    joined = output.transpose(1, 2).flatten(2)
    ours = module.out_proj(torch.sigmoid(module.output_gate(hidden)) * module.norm(joined))
    theirs = module(hidden, position_embeddings=None, attention_mask=None, past_key_values=None)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
