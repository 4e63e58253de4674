"""Caches: however tokens are spread over calls and rows, logits are those of one plain pass."""

from dataclasses import replace

import pytest
import torch
from test_model import FLOAT64, OPTIONS, deviation, make_ids, make_model, small_config

from attnlab import registry
from attnlab.cache import KVCache, StateCache
from attnlab.model import HybridLM
from attnlab.testing import assert_as_accurate

LINEAR, FULL = "linear_attention", "full_attention"
VARIANTS = {
    "minimax-01": {},
    "options": OPTIONS,
    "softmax-first": {"layer_types": (FULL, LINEAR, LINEAR)},
    "rotated-convolution": {"conv_width": 3},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "split",
    [[24], [23, 1], [1, 23], [1] * 24, [2, 1, 1, 9, 1, 10], [12, 12], [3, 2, 1, 2, 3, 13]],
    ids=str,
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_split_of_a_prompt_gives_the_same_logits(variant, split):
    model, ids = make_model(torch.float64, **VARIANTS[variant]), make_ids(2, 24)
    cache = model.new_cache(2, 24)
    parts = [model(part, cache=cache).logits for part in ids.split(split, dim=1)]
    assert deviation(torch.cat(parts, 1), model(ids).logits) < FLOAT64
    assert cache.lengths.tolist() == cache.host_lengths == [24, 24]
    assert cache.max_len == 24


@pytest.mark.parametrize("variant", VARIANTS)
def test_unequal_prompts_are_continued_as_if_alone(variant):
    """A left-padded prompt in three chunks, steps, several tokens at once, and steps again."""
    model, lengths = make_model(torch.float64, **VARIANTS[variant]), [9, 2, 5]
    ids, more = make_ids(3, 9), make_ids(3, 9, seed=1)
    mask = torch.arange(9) >= 9 - torch.tensor(lengths)[:, None]
    cache = model.new_cache(3, 40)
    for chunk, part in zip(ids.split([3, 5, 1], 1), mask.split([3, 5, 1], 1), strict=True):
        output = model(chunk, cache=cache, attention_mask=part, logits_to_keep=1)
    parts = [output.logits]
    for tokens in more.split([1, 1, 4, 1, 2], 1):
        parts.append(model(tokens, cache=cache).logits)
    actual = torch.cat(parts, 1)  # from the prompt's last token on
    assert cache.lengths.tolist() == cache.host_lengths == [18, 11, 14]
    for row, length in enumerate(lengths):
        whole = torch.cat([ids[row, 9 - length :], more[row]])[None]
        expected = model(whole).logits[0, length - 1 :]
        assert deviation(actual[row], expected) < FLOAT64


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_prompts_fill_the_rows_of_a_cache(variant):
    """Twice, the second time behind what is there; a row may have no token in a call."""
    model = make_model(torch.float64, **VARIANTS[variant])
    ids = [make_ids(1, n, seed=n) for n in (7, 1, 4)]
    cache = model.new_cache(3, 12)
    for cuts in ([(0, 5), (0, 0), (0, 2)], [(5, 7), (0, 1), (2, 4)]):
        pieces = [row[:, a:b] for row, (a, b) in zip(ids, cuts, strict=True)]
        bounds = torch.tensor([0, *torch.tensor([b - a for a, b in cuts]).cumsum(0)])
        output = model(torch.cat(pieces, 1), cache=cache, cu_seqlens=bounds, logits_to_keep=1)
    assert cache.host_lengths == [7, 1, 4]
    for row, tokens in enumerate(ids):
        assert deviation(output.logits[0, row], model(tokens).logits[0, -1]) < FLOAT64
    following = model(make_ids(3, 1), cache=cache).logits
    for row, tokens in enumerate(ids):
        whole = torch.cat([tokens, make_ids(3, 1)[row : row + 1]], 1)
        assert deviation(following[row], model(whole).logits[0, -1:]) < FLOAT64


@pytest.mark.parametrize(
    ("backend", "expected"), [(None, "sdpa"), ("flash", "sdpa"), ("reference", "reference")]
)
def test_backends_that_lack_steps_leave_them_to_others(backend, expected, monkeypatch):
    chosen = []

    def resolve(op, name, problem):
        chosen.append((op, registry.choose(op, name, problem)))
        return registry.resolve(op, name, problem)

    model, ids = make_model(torch.float64), make_ids(2, 6)
    model.model.layers[2].self_attn.backend = backend
    cache = model.new_cache(2, 10)
    monkeypatch.setattr("attnlab.functional.resolve", resolve)
    steps = [model(ids[:, t : t + 1], cache=cache).logits for t in range(6)]
    assert [name for op, name in chosen if op == "softmax_decode"] == [expected] * 6
    plain = make_model(torch.float64)(ids).logits
    assert deviation(torch.cat(steps, 1), plain) < FLOAT64


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_that_is_reset_starts_anew_and_others_go_on(variant):
    model, ids = make_model(torch.float64, **VARIANTS[variant]), make_ids(3, 10)
    cache = model.new_cache(3, 20)
    model(ids, cache=cache)
    cache.reset([1])
    assert cache.lengths.tolist() == cache.host_lengths == [10, 0, 10]
    more = make_ids(3, 4, seed=2)
    actual = torch.cat([model(part, cache=cache).logits for part in more.split([3, 1], 1)], 1)
    for row in range(3):
        before = ids[row, :0] if row == 1 else ids[row]
        expected = model(torch.cat([before, more[row]])[None]).logits[0, -4:]
        assert deviation(actual[row], expected) < FLOAT64
    cache.reset()
    assert cache.host_lengths == [0, 0, 0] and cache.max_len == 0
    assert all((x == 0).all() for layer in cache.layers for x in layer.tensors())


@pytest.mark.parametrize("as_tensor", [True, False])
def test_rows_are_reordered_with_what_they_have_seen(as_tensor):
    model, ids = make_model(torch.float64, **OPTIONS), make_ids(3, 8)
    mask = torch.arange(8) >= torch.tensor([0, 3, 6])[:, None]
    cache = model.new_cache(3, 12)
    model(ids, cache=cache, attention_mask=mask)
    places = [x.data_ptr() for layer in cache.layers for x in layer.tensors()]
    index = [2, 0, 2]
    cache.reorder(torch.tensor(index) if as_tensor else index)
    assert cache.lengths.tolist() == cache.host_lengths == [2, 8, 2]
    assert places == [x.data_ptr() for layer in cache.layers for x in layer.tensors()]
    more = make_ids(3, 1, seed=3)
    actual = model(more, cache=cache).logits
    for row, source in enumerate(index):
        whole = torch.cat([ids[source][mask[source]], more[row]])[None]
        assert deviation(actual[row], model(whole).logits[0, -1:]) < FLOAT64


def test_states_are_float32_in_a_bf16_model():
    cache = make_model(torch.bfloat16).new_cache(2, 8)
    assert [layer.state.dtype for layer in cache.layers[:2]] == [torch.float32] * 2
    assert cache.layers[2].keys.dtype == torch.bfloat16
    assert isinstance(cache.layers[0], StateCache) and isinstance(cache.layers[2], KVCache)


def test_ten_thousand_bf16_steps_are_as_accurate_as_one_pass():
    """A layer that forgets within 300 tokens, then one that in 10,000 forgets nothing.

    Errors of a state that isn't float32 would add up. Both experts are always chosen, so that no
    choice tips over; weights are those of the bf16 model also in the float64 oracle.
    """
    config = small_config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        layer_types=(LINEAR, LINEAR),
        num_local_experts=2,
    )
    torch.manual_seed(0)
    model = HybridLM(config, dtype=torch.bfloat16).eval()
    oracle = HybridLM(config, dtype=torch.float64).eval()
    oracle.load_state_dict(model.state_dict())
    ids = make_ids(1, 10_000)
    cache = model.new_cache(1, 10_000)
    with torch.no_grad():
        steps = [model(token, cache=cache).logits for token in ids.split(1, 1)]
        expected, baseline = oracle(ids).logits, model(ids).logits
    assert_as_accurate(torch.cat(steps, 1)[:, -1000:], expected[:, -1000:], baseline[:, -1000:])


def test_a_call_with_a_cache_records_no_gradients():
    model = make_model()
    cache = model.new_cache(1, 8)
    for num_tokens in (3, 1):
        assert not model(make_ids(1, num_tokens), cache=cache).logits.requires_grad
    assert not any(x.requires_grad for layer in cache.layers for x in layer.tensors())


def test_nothing_is_written_when_there_is_no_room():
    model = make_model()
    cache = model.new_cache(2, 8)
    model(make_ids(2, 6), cache=cache)
    before = [x.clone() for layer in cache.layers for x in layer.tensors()]
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    calls = [
        {"input_ids": make_ids(2, 3)},
        {"input_ids": make_ids(2, 3), "attention_mask": mask},
        {"input_ids": make_ids(1, 4), "cu_seqlens": torch.tensor([0, 1, 4])},
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"at most 8 tokens a row .* got 6 \+ 3 in row [01]"):
            model(**call, cache=cache)
    after = [x for layer in cache.layers for x in layer.tensors()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert cache.lengths.tolist() == cache.host_lengths == [6, 6]
    model(make_ids(2, 2), cache=cache)
    with pytest.raises(ValueError, match="at most 8 tokens"):
        model(make_ids(2, 1), cache=cache)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m, c: m(make_ids(3, 2), cache=c), "2 sequences, one a row, got 3"),
        (
            lambda m, c: m(make_ids(1, 4), cache=c, cu_seqlens=torch.tensor([0, 4])),
            "2 sequences, one a row, got 1",
        ),
        (lambda m, c: m.new_cache(0, 4), "batch and capacity >= 1"),
        (lambda m, c: m.new_cache(1, 0), "batch and capacity >= 1"),
        (lambda m, c: c.reset([2]), r"rows in \[0, 2\), got \[2\]"),
        (lambda m, c: c.reorder([0, -1]), r"rows in \[0, 2\), got \[-1\]"),
        (lambda m, c: c.reorder([0]), "2 rows, got 1"),
        (lambda m, c: (m(make_ids(2, 8), cache=c), c.count_replay()), "at most 8 tokens"),
    ],
)  # fmt: skip
def test_uses_that_make_no_sense_are_refused(use, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        use(model, model.new_cache(2, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("variant", ["minimax-01", "options"])
def test_a_step_can_be_captured_and_replayed(variant, dtype):
    """Rows of unequal length; replays must give what uncaptured steps give, bit for bit."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    changes = VARIANTS[variant] | {"head_dim": 32, "num_experts_per_tok": 4}
    torch.manual_seed(0)
    model = HybridLM(small_config(**changes), device="cuda", dtype=dtype).eval()
    ids = make_ids(3, 30).cuda()
    mask = torch.arange(8, device="cuda") >= torch.tensor([0, 3, 6], device="cuda")[:, None]
    token = torch.empty(3, 1, dtype=torch.long, device="cuda")

    def prefilled():
        cache = model.new_cache(3, 64)
        model(ids[:, :8], cache=cache, attention_mask=mask)
        return cache

    plain = prefilled()
    expected = [model(ids[:, t : t + 1], cache=plain).logits for t in range(8, 30)]
    warm = prefilled()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        token.copy_(ids[:, 8:9])
        for _ in range(2):
            model(token, cache=warm)
    torch.cuda.current_stream().wait_stream(side)
    cache, graph = prefilled(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(token, cache=cache).logits
    assert cache.host_lengths == [8, 5, 2]
    for t in range(8, 30):
        token.copy_(ids[:, t : t + 1])
        cache.count_replay()
        graph.replay()
        assert torch.equal(logits, expected[t - 8])
    assert cache.lengths.tolist() == cache.host_lengths == [30, 27, 24]


@pytest.mark.gpu
def test_a_step_on_a_gpu_does_not_wait_for_it():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    config = replace(small_config(), head_dim=32)
    model = HybridLM(config, device="cuda", dtype=torch.bfloat16).eval()
    cache, ids = model.new_cache(3, 64), make_ids(3, 8).cuda()
    mask = torch.arange(8, device="cuda") >= torch.tensor([0, 3, 6], device="cuda")[:, None]
    model(ids, cache=cache, attention_mask=mask)
    model(ids[:, :1], cache=cache)  # what is read once of each decay
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids[:, :1], cache=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
