"""Generation against full passes without a cache: what is drawn, when it ends, what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from test_model import FLOAT64, OPTIONS, deviation, make_ids, make_model, small_config

from attnlab.inference import graph
from attnlab.inference.generate import (
    decode_step,
    generate,
    prefill,
    prefill_packed,
    sample,
    stream,
    unpadded,
)
from attnlab.inference.graph import GraphedStep, can_capture
from attnlab.model import HybridLM

VARIANTS = {"minimax-01": {}, "options": OPTIONS, "tied": {"tie_word_embeddings": True}}
LENGTHS = [7, 1, 4]
CHI_SQUARE = 40.0
"""Of at most 5 degrees of freedom: a right sampler exceeds it once in 6 million seeds."""
DRAWS = 50_000


pytestmark = pytest.mark.usefixtures("one_thread")


def make_prompts():
    return [make_ids(1, n, seed=n)[0].tolist() for n in LENGTHS]


def padded(prompts):
    """Left-padded ids and their mask; padding is an id like any other."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[3] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    return ids, mask


def packed(prompts):
    bounds = torch.tensor([0] + [len(row) for row in prompts]).cumsum(0)
    return torch.tensor([i for row in prompts for i in row])[None], bounds


def greedy(model, prompt, count):
    """The definition: a full pass over everything for each new token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_of_unequal_prompts_are_those_of_full_passes_over_each_alone(
    variant, chunk_size
):
    model = make_model(torch.float64, **VARIANTS[variant])
    prompts = make_prompts()
    expected = [greedy(model, prompt, 12) for prompt in prompts]
    assert len({tuple(row) for row in expected}) == 3  # prompts make a difference
    given = {"max_new_tokens": 12, "chunk_size": chunk_size}
    assert generate(model, prompts, **given) == expected
    assert generate(model, unpadded(*padded(prompts)), **given) == expected
    assert [generate(model, [prompt], **given)[0] for prompt in prompts] == expected


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prompt_in_chunks_gives_the_logits_of_one_pass(variant, chunk_size):
    """As rows, left-padded and packed; then one more token, for what the cache holds."""
    model, prompts = make_model(torch.float64, **VARIANTS[variant]), make_prompts()
    ids, mask = padded(prompts)
    more = make_ids(3, 1, seed=9)
    calls = {
        "rows": lambda c: prefill(model, c, ids, chunk_size=chunk_size),
        "padded": lambda c: prefill(model, c, ids, attention_mask=mask, chunk_size=chunk_size),
        "packed": lambda c: prefill_packed(model, c, *packed(prompts), chunk_size=chunk_size),
    }
    for name, call in calls.items():
        cache = model.new_cache(3, 8)
        first, second = call(cache), decode_step(model, cache, more[:, 0])
        rows = ids.tolist() if name == "rows" else prompts
        assert cache.host_lengths == [len(row) + 1 for row in rows]
        for n, row in enumerate(rows):
            whole = model(torch.cat([torch.tensor(row), more[n]])[None]).logits[0]
            assert deviation(first[n], whole[-2]) < FLOAT64, name
            assert deviation(second[n], whole[-1]) < FLOAT64, name


def test_a_second_prompt_goes_on_behind_the_first_and_columns_of_padding_alone_are_passed_over():
    model, prompts = make_model(torch.float64), make_prompts()
    ids, mask = padded(prompts)
    wide = torch.cat([torch.zeros(3, 5, dtype=torch.long), ids], 1)
    wide_mask = torch.cat([torch.zeros(3, 5, dtype=torch.long), mask], 1)
    cache = model.new_cache(3, 20)
    prefill(model, cache, wide, attention_mask=wide_mask, chunk_size=2)
    logits = prefill_packed(model, cache, *packed(prompts), chunk_size=5)
    for n, row in enumerate(prompts):
        assert deviation(logits[n], model(torch.tensor([row + row])).logits[0, -1]) < FLOAT64


def draw(logits, draws=DRAWS, seed=0, **given):
    generator = torch.Generator().manual_seed(seed)
    return sample(logits.expand(draws, -1), generator=generator, **given)


def chi_square(ids, probability):
    counts = torch.bincount(ids, minlength=len(probability)).double()
    assert counts[probability == 0].sum() == 0
    expected = probability.double() * len(ids)
    there = probability > 0
    return ((counts - expected).square()[there] / expected[there]).sum().item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_ids_are_drawn_with_the_probabilities_of_the_softmax(dtype, temperature):
    logits = torch.tensor([0.5, -1.0, 2.0, 1.25, -0.5, 0.0], dtype=dtype)
    ids = draw(logits, temperature=temperature)
    assert ids.dtype == torch.int64 and ids.shape == (DRAWS,)
    expected = (logits.double() / temperature).softmax(-1)
    assert chi_square(ids, expected) < CHI_SQUARE
    other = (logits.double() / (1.1 * temperature)).softmax(-1)  # the test can tell
    assert chi_square(ids, other) > CHI_SQUARE


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (None, None, 5),
        (1, None, 1),
        (3, None, 3),
        (5, None, 5),
        (99, None, 5),
        (None, 0.49, 1),
        (None, 0.51, 2),
        (None, 0.76, 3),
        (None, 0.97, 5),
        (None, 1.0, 5),
        (None, 1e-9, 1),
        (3, 0.8, 2),  # of three, which hold 4/7, 2/7, 1/7; of all ids it would be three
        (2, 0.9, 2),
    ],
)
def test_cuts_leave_exactly_the_likeliest_ids(top_k, top_p, kept):
    order = torch.tensor([3, 0, 4, 1, 2])  # ids from the likeliest on
    probability = torch.empty(5).index_copy(0, order, torch.tensor([16.0, 8, 4, 2, 2]) / 32)
    expected = probability.clone()
    expected[order[kept:]] = 0
    ids = draw(probability.log(), top_k=top_k, top_p=top_p)
    assert chi_square(ids, expected / expected.sum()) < CHI_SQUARE


def test_equal_logits_are_cut_to_exactly_k_and_impossible_ids_never_come():
    assert set(draw(torch.zeros(6), 2000, top_k=2).tolist()) == {0, 1}
    impossible = torch.tensor([0.0, -math.inf, 0.0])
    assert set(draw(impossible, 2000).tolist()) == {0, 2}
    assert set(draw(impossible, 2000, top_p=0.9).tolist()) == {0, 2}


def test_without_temperature_the_largest_logit_is_taken_however_large_the_logits_are():
    logits = 1e4 * torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(-1)
    for temperature in (0, 0.0, 1e-45, 1e-30):
        assert torch.equal(sample(logits, temperature=temperature, top_k=9, top_p=0.9), best)
    huge = torch.tensor([[3e38, -3e38, 3e38]])
    assert sample(huge, temperature=0.5).item() in (0, 2)


def test_a_seed_repeats_its_draws_and_another_gives_others():
    model, prompts = make_model(), make_prompts()
    given = {"max_new_tokens": 20, "temperature": 1.0, "top_k": 40, "top_p": 0.95}
    first = generate(model, prompts, seed=1, **given)
    state = torch.get_rng_state()
    assert generate(model, prompts, seed=1, **given) == first
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator isn't touched
    assert generate(model, prompts, seed=2, **given) != first
    torch.manual_seed(5)
    free = generate(model, prompts, **given)
    torch.manual_seed(5)
    assert generate(model, prompts, **given) == free


def cut_after(row, ends):
    return row[: min([row.index(i) + 1 for i in ends if i in row], default=len(row))]


def test_a_row_ends_with_the_end_of_text_and_others_go_on():
    model, prompts = make_model(torch.float64), make_prompts()
    plain = generate(model, prompts, max_new_tokens=12, eos_token_id=())
    for ends in ([plain[0][2]], [plain[1][0], plain[2][5]]):
        expected = [cut_after(row, ends) for row in plain]
        assert any(len(row) < 12 for row in expected)
        assert generate(model, prompts, max_new_tokens=12, eos_token_id=ends) == expected
    end = plain[0][2]
    expected = [cut_after(row, [end]) for row in plain]
    assert generate(model, prompts, max_new_tokens=12, eos_token_id=end) == expected
    model.config = replace(model.config, eos_token_id=end)
    assert generate(model, prompts, max_new_tokens=12) == expected
    assert generate(model, prompts, max_new_tokens=12, eos_token_id=()) == plain


def test_no_step_runs_once_all_rows_have_ended_nor_after_the_last_token():
    model, prompts = make_model(torch.float64), make_prompts()
    plain = generate(model, prompts, max_new_tokens=9, eos_token_id=())
    ends = [row[2] for row in plain]
    longest = max(len(cut_after(row, ends)) for row in plain)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    generate(model, prompts, max_new_tokens=9, eos_token_id=ends)
    assert len(calls) == longest <= 3
    calls.clear()
    generate(model, prompts, max_new_tokens=9, eos_token_id=())
    assert len(calls) == 9


def test_a_stream_hands_out_what_generate_returns_and_ended_rows_repeat_their_end():
    model, prompts = make_model(torch.float64), make_prompts()
    given = {"max_new_tokens": 10, "temperature": 0.8, "seed": 3}
    plain = generate(model, prompts, eos_token_id=(), **given)
    end = plain[1][1]
    steps = torch.stack(list(stream(model, prompts, eos_token_id=end, **given)), 1).tolist()
    for row, whole in zip(steps, plain, strict=True):
        expected = cut_after(whole, [end])
        assert row == (expected + [expected[-1]] * 10)[: len(row)]
    tokens = stream(model, prompts, eos_token_id=(), **given)
    assert next(tokens).tolist() == [row[0] for row in plain]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m: generate(m, [], max_new_tokens=1), "at least one prompt, got 0"),
        (lambda m: generate(m, [[1], []], max_new_tokens=1), r"none in prompt \[1\]"),
        (lambda m: generate(m, [[1], [2, 50]], max_new_tokens=1), r"\[0, 50\), got 2 to 50"),
        (lambda m: generate(m, [[-1]], max_new_tokens=1), r"\[0, 50\), got -1"),
        (lambda m: generate(m, [[1.5]], max_new_tokens=1), "int32 or int64"),
        (lambda m: stream(m, [[1]], max_new_tokens=0), "max_new_tokens of at least 1, got 0"),
        (lambda m: stream(m, [[1]], max_new_tokens=1, temperature=-0.1), "at least 0, got -0.1"),
        (lambda m: stream(m, [[1]], max_new_tokens=1, temperature=math.nan), "got nan"),
        (lambda m: stream(m, [[1]], max_new_tokens=1, temperature=math.inf), "got inf"),
        (lambda m: stream(m, [[1]], max_new_tokens=1, top_k=0), "top_k of at least 1, got 0"),
        (lambda m: stream(m, [[1]], max_new_tokens=1, top_p=0.0), "top_p above 0 .* got 0.0"),
        (lambda m: stream(m, [[1]], max_new_tokens=1, top_p=1.1), "at most 1, got 1.1"),
        (lambda m: stream(m, [[1]], max_new_tokens=1, chunk_size=0), "chunk_size of at least 1"),
        (lambda m: stream(m, [[1]], max_new_tokens=1, seed=2**64), "a seed of 64 bits"),
        (lambda m: stream(m.train(), [[1]], max_new_tokens=1), "eval mode"),
        (lambda m: sample(torch.zeros(3)), r"logits \[B, V\], got \[3\]"),
        (lambda m: sample(torch.zeros(2, 3), top_k=-1), "top_k of at least 1, got -1"),
        (lambda m: unpadded(*(x.flip(1) for x in padded(make_prompts()))), "padding on the left"),
        (lambda m: GraphedStep(m, m.new_cache(1, 4)), "a model on a GPU .* got cpu"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_work(use, message):
    model = make_model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    with pytest.raises(ValueError, match=message):
        use(model)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m, c: prefill(m, c, torch.zeros(3, 0, dtype=torch.long)), "at least one token"),
        (lambda m, c: prefill(m, c, make_ids(3, 9), chunk_size=2), "at most 8 tokens a row"),
        (lambda m, c: prefill(m, c, make_ids(2, 3)), "3 sequences, one a row, got 2"),
        (lambda m, c: prefill(m, c, torch.full((3, 4), 50), chunk_size=2), r"ids in \[0, 50\)"),
        (lambda m, c: prefill(m, c, make_ids(3, 3), attention_mask=torch.eye(3)[[0, 2, 2]]),
         "padding on the left"),
        (lambda m, c: prefill(m, c, make_ids(3, 2), attention_mask=torch.tensor([[1, 1]] * 2 + [[0, 0]])),
         r"none in prompt \[2\]"),
        (lambda m, c: prefill(m, c, make_ids(3, 4), chunk_size=0), "chunk_size of at least 1"),
        (lambda m, c: prefill_packed(m, c, make_ids(1, 12), torch.tensor([0, 1, 3, 12]), chunk_size=2),
         r"at most 8 tokens a row .* got 0 \+ 9 in row 2"),
        (lambda m, c: prefill_packed(m, c, make_ids(1, 6), torch.tensor([0, 3, 3, 6])),
         r"none in prompt \[1\]"),
        (lambda m, c: prefill_packed(m, c, make_ids(1, 6), torch.tensor([0, 3, 4, 5])),
         "end at the 6 tokens"),
        (lambda m, c: prefill_packed(m, c, make_ids(3, 2), torch.tensor([0, 3, 4, 6])), "batch 1"),
        (lambda m, c: decode_step(m, c, make_ids(3, 1)), r"tokens of shape \[B\], got \[3, 1\]"),
        (lambda m, c: decode_step(m, c, torch.tensor([1, 2, 50])), r"ids in \[0, 50\)"),
    ],
)  # fmt: skip
def test_a_refused_prompt_leaves_the_cache_empty(use, message):
    model = make_model()
    cache = model.new_cache(3, 8)
    with pytest.raises(ValueError, match=message):
        use(model, cache)
    assert cache.host_lengths == cache.lengths.tolist() == [0, 0, 0]
    assert all((x == 0).all() for layer in cache.layers for x in layer.tensors())


class RecordedStep:
    """A CUDA graph without a GPU: the capture leaves no trace, a replay does what was captured."""

    def __init__(self, step):
        self.step, self.cache, self.replays = step, step.cache, 0

    def _tensors(self):
        return [self.cache.lengths, *(x for y in self.cache.layers for x in y.tensors())]

    def __enter__(self):
        self.before = [x.clone() for x in self._tensors()], list(self.cache.host_lengths)

    def __exit__(self, *_):
        for x, old in zip(self._tensors(), self.before[0], strict=True):
            x.copy_(old)
        self.cache.host_lengths = self.before[1]
        self.step._logits.fill_(math.nan)

    def replay(self):
        """Nothing that the host counts is seen or moved."""
        counted = self.cache.host_lengths
        self.cache.host_lengths = self.cache.lengths.tolist()
        self.step._logits.copy_(self.step._step())
        self.cache.host_lengths = counted
        self.replays += 1


def test_one_graph_serves_until_the_cache_is_full(monkeypatch):
    """Without a GPU, for what the host does: when steps are captured, and what is counted."""
    model, prompts = make_model(torch.float64), make_prompts()
    expected = generate(model, prompts, max_new_tokens=14)
    made = []
    monkeypatch.setattr(graph, "can_capture", lambda *_: True)
    monkeypatch.setattr(
        torch.cuda, "CUDAGraph", lambda: made.append(RecordedStep(step)) or made[-1]
    )
    monkeypatch.setattr(torch.cuda, "graph", lambda recorded: recorded)
    cache = model.new_cache(3, 20)
    step = GraphedStep(model, cache)
    rows = [prefill_packed(model, cache, *packed(prompts)).argmax(-1)]
    for _ in range(13):
        rows.append(step(rows[-1]).argmax(-1))
    assert torch.stack(rows, 1).tolist() == expected
    assert cache.host_lengths == cache.lengths.tolist() == [20, 14, 17]
    assert [recorded.replays for recorded in made] == [12]  # the first of 13 steps is not captured
    with pytest.raises(ValueError, match="at most 20 tokens a row"):
        step(rows[-1])
    with pytest.raises(ValueError, match=r"tokens of shape \[3\], got \[1\]"):
        step(rows[-1][:1])
    assert cache.host_lengths == [20, 14, 17]


def gpu_model(dtype, **changes):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    config = small_config(head_dim=32, hidden_size=32, **changes)
    return HybridLM(config, device="cuda", dtype=dtype).eval()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("variant", ["minimax-01", "options"])
def test_replayed_steps_are_those_without_a_graph_bit_for_bit(variant, dtype):
    model = gpu_model(dtype, **VARIANTS[variant])
    ids, bounds = packed(make_prompts())
    plain, cache = model.new_cache(3, 60), model.new_cache(3, 60)
    step = GraphedStep(model, cache)
    tokens = prefill_packed(model, plain, ids.cuda(), bounds).argmax(-1)
    assert torch.equal(tokens, prefill_packed(model, cache, ids.cuda(), bounds).argmax(-1))
    for _ in range(50):
        expected = decode_step(model, plain, tokens)
        assert torch.equal(step(tokens), expected)
        tokens = expected.argmax(-1)
    assert cache.host_lengths == cache.lengths.tolist() == plain.host_lengths


@pytest.mark.gpu
def test_graphs_give_the_tokens_of_steps_without_them():
    model = gpu_model(torch.float32)
    for given in ({}, {"temperature": 0.7, "seed": 1, "top_p": 0.9}):
        outs = [
            generate(model, make_prompts(), max_new_tokens=40, use_cuda_graph=use, **given)
            for use in (True, False)
        ]
        assert outs[0] == outs[1]


@pytest.mark.gpu
def test_a_graph_serves_other_backends_too():
    """They look at all slots of the cache, so sums may have another order than in plain steps."""
    model = gpu_model(torch.float64).use_backend("reference", "sdpa")
    ids = torch.arange(3 * 11, device="cuda").view(3, 11)  # torch packs no float64 on a GPU
    plain, cache = model.new_cache(3, 40), model.new_cache(3, 40)
    step = GraphedStep(model, cache)
    tokens = prefill(model, plain, ids).argmax(-1)
    prefill(model, cache, ids)
    for _ in range(20):
        expected = decode_step(model, plain, tokens)
        assert deviation(step(tokens), expected) < FLOAT64
        tokens = expected.argmax(-1)


@pytest.mark.gpu
def test_steps_that_would_wait_for_the_gpu_are_not_captured():
    model = gpu_model(torch.float32)
    assert can_capture(model, 32) and not can_capture(model, 33)
    assert can_capture(gpu_model(torch.bfloat16), 33)
    prompts = [[i + 1] for i in range(33)]
    assert len(generate(model, prompts, max_new_tokens=3)) == 33
