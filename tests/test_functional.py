"""Bad input: each mistake gets a ValueError that says what was expected and what came."""

import pytest
import torch

import attnlab


def tensors(B=2, H=3, T=5, K=32, V=16, dtype=torch.float32):
    return (
        torch.randn(B, H, T, K, dtype=dtype),
        torch.randn(B, H, T, K, dtype=dtype),
        torch.randn(B, H, T, V, dtype=dtype),
        -torch.rand(H),
    )


q, k, v, g = tensors()
STATE = torch.zeros(2, 3, 32, 16)
CASES = {
    "rank": ((q[0], k, v, g), {}, r"query of shape \[B, H, T, D\], got shape \[3, 5, 32\]"),
    "integers": ((q.int(), k, v, g), {}, "query of a floating dtype, got torch.int32"),
    "mixed dtypes": (
        (q, k.half(), v, g),
        {},
        "key of query's dtype torch.float32, got torch.float16",
    ),
    "devices": ((q, k.to("meta"), v, g), {}, "key on query's device cpu, got meta"),
    "batch": ((q, k[:1], v, g), {}, "key with batch 2, got 1"),
    "heads": ((q, k[:, :2], v[:, :2], g), {}, r"heads and tokens \[3, 5\], got \[2, 5\]"),
    "tokens": ((q, k, v[:, :, :4], g), {}, r"heads and tokens \[3, 5\], got \[3, 4\]"),
    "key dim": ((q, k[..., :8], v, g), {}, "key dim 32 as query, got 8"),
    "decay shape": ((q, k, v, g[:2]), {}, r"log_decay of shape \[3\] in float32, got \[2\]"),
    "decay dtype": ((q, k, v, g.half()), {}, r"in float32, got \[3\] torch.float16"),
    "positive decay": ((q, k, v, -g), {}, "log_decay <= 0 and not NaN, got"),
    "nan decay": ((q, k, v, g * torch.nan), {}, "log_decay <= 0 and not NaN, got"),
    "state shape": (
        (q, k, v, g),
        {"initial_state": STATE.mT},
        r"initial_state of shape \[2, 3, 32, 16\], got \[2, 3, 16, 32\]",
    ),
    "state dtype": (
        (q, k, v, g),
        {"initial_state": STATE.half()},
        "in torch.float32, got torch.float16",
    ),
    "precision": (
        (q, k, v, g),
        {"precision": "low"},
        "precision among default, high, tf32, got 'low'",
    ),
    "tf32 of halves": (
        (q.half(), k.half(), v.half(), g),
        {"precision": "tf32"},
        "float32 inputs with precision 'tf32', got torch.float16",
    ),
    "backend": ((q, k, v, g), {"backend": "tritn"}, "expected a backend among .*, got 'tritn'"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_lightning_call_is_refused(name):
    arguments, flags, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        attnlab.lightning_attention(*arguments, **flags)


@pytest.mark.parametrize(
    "bounds, message",
    [
        (torch.tensor([0, 3, 2, 5]), "cu_seqlens sorted, got a fall after entry 1"),
        (torch.tensor([1, 5]), "cu_seqlens to start at 0, got 1"),
        (torch.tensor([0, 4]), "cu_seqlens to end at the 5 tokens, got 4"),
        (torch.tensor([0.0, 5.0]), "in int32 or int64, got"),
        (torch.tensor([[0, 5]]), r"shape \[documents \+ 1\]"),
        (torch.tensor([0]), r"shape \[documents \+ 1\]"),
    ],
    ids=["unsorted", "start", "end", "floats", "rank", "short"],
)
def test_wrong_document_bounds_are_refused(bounds, message):
    one = [x[:1] for x in (q, k, v)]
    with pytest.raises(ValueError, match=message):
        attnlab.lightning_attention_varlen(*one, g, bounds)
    with pytest.raises(ValueError, match=message.replace("cu_seqlens", "cu_seqlens_[qk]")):
        attnlab.softmax_attention_varlen(*one, bounds, bounds)


def test_packed_tensors_have_batch_one():
    with pytest.raises(ValueError, match="batch 1, got 2"):
        attnlab.lightning_attention_varlen(q, k, v, g, torch.tensor([0, 5]))


@pytest.mark.parametrize(
    "slots, message",
    [
        (torch.tensor([0, 7]), r"slots in \[0, 4\), got \[7\]"),
        (torch.tensor([1, 1]), "distinct slots"),
        (torch.tensor([0]), r"slots of shape \[2\]"),
    ],
    ids=["outside", "twice", "shape"],
)
def test_wrong_slots_are_refused(slots, message):
    step = [x[:, :, :1] for x in (q, k, v)]
    with pytest.raises(ValueError, match=message):
        attnlab.lightning_decode_(*step, g, torch.zeros(4, 3, 32, 16), slots=slots)


def test_decode_takes_one_token_and_its_own_state():
    with pytest.raises(ValueError, match="one query token a sequence, got 5"):
        attnlab.lightning_decode_(q, k, v, g, STATE)
    with pytest.raises(ValueError, match=r"state of shape \[2, 3, 32, 16\], got \[1, 3, 32, 16\]"):
        attnlab.lightning_decode_(*(x[:, :, :1] for x in (q, k, v)), g, STATE[:1])


CACHE = torch.randn(2, 3, 9, 32), torch.randn(2, 3, 9, 16)
LENGTHS = torch.tensor([9, 4])


@pytest.mark.parametrize(
    "arguments, flags, message",
    [
        ((q, k, v, LENGTHS), {}, "one query token a sequence, got 5"),
        ((q[:, :, :1], k[:, :2], v[:, :2], LENGTHS), {}, "divide the 3 query heads, got 2"),
        ((q[:, :, :1], *CACHE, LENGTHS[:1]), {}, r"lengths of shape \[2\] .*, got \[1\]"),
        ((q[:, :, :1], *CACHE, LENGTHS.float()), {}, "in int32 or int64 on cpu, got"),
        ((q[:, :, :1], *CACHE, LENGTHS.to("meta")), {}, "on cpu, got .* on meta"),
        ((q[:, :, :1], *CACHE, LENGTHS + 1), {}, r"lengths in \[0, 9\], got 5 to 10"),
        ((q[:, :, :1], *CACHE, LENGTHS - 5), {}, r"lengths in \[0, 9\], got -1 to 4"),
        ((q[:, :, :1], *CACHE, LENGTHS), {"span": 8}, r"lengths in \[0, 8\], got 4 to 9"),
        ((q[:, :, :1], *CACHE, LENGTHS), {"span": 10}, r"a span in \[0, 9\], got 10"),
    ],
    ids=["tokens", "groups", "shape", "dtype", "device", "long", "negative", "span", "capacity"],
)
def test_a_wrong_step_over_a_cache_is_refused(arguments, flags, message):
    with pytest.raises(ValueError, match=message):
        attnlab.softmax_decode(*arguments, **flags)


def test_a_step_over_nothing_is_empty_or_zero():
    one = q[:, :, :1]
    empty = [x[:, :, :0] for x in CACHE]
    assert torch.equal(attnlab.softmax_decode(one, *empty, LENGTHS * 0), torch.zeros(2, 3, 1, 16))
    none = attnlab.softmax_decode(one[:0], *(x[:0] for x in CACHE), LENGTHS[:0])
    assert none.shape == (0, 3, 1, 16)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_slots_beyond_the_span_are_not_looked_at(backend):
    one, (keys, values) = q[:, :, :1], (x.clone() for x in CACHE)
    expected = attnlab.softmax_decode(one, keys, values, LENGTHS - 4, backend=backend)
    keys[:, :, 5:] = values[:, :, 5:] = torch.nan
    actual = attnlab.softmax_decode(one, keys, values, LENGTHS - 4, span=5, backend=backend)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "arguments, flags, message",
    [
        ((q, k[:, :1], v[:, :1]), {}, r"3 key heads \(or enable_gqa=True\), got 1"),
        ((q, k[:, :2], v[:, :2]), {"enable_gqa": True}, "divide the 3 query heads, got 2"),
        (
            (q, k, v),
            {"attn_mask": torch.ones(4, 4) > 0},
            r"broadcastable to \[2, 3, 5, 5\], got \[4, 4\]",
        ),
        ((q, k, v), {"attn_mask": torch.ones(5, 5).int()}, "attn_mask of bool or torch.float32"),
    ],
    ids=["heads", "groups", "mask shape", "mask dtype"],
)
def test_a_wrong_softmax_call_is_refused(arguments, flags, message):
    with pytest.raises(ValueError, match=message):
        attnlab.softmax_attention(*arguments, **flags)


def test_a_changed_decay_is_checked_again():
    decay = g.clone()
    attnlab.lightning_attention(q, k, v, decay)
    decay.neg_()
    with pytest.raises(ValueError, match="log_decay <= 0"):
        attnlab.lightning_attention(q, k, v, decay)


def test_a_compiled_call_checks_the_decay_too():
    compiled = torch.compile(
        lambda *x: attnlab.lightning_attention(*x).output, fullgraph=True, backend="aot_eager"
    )
    compiled(q, k, v, g)
    with pytest.raises(ValueError, match="log_decay <= 0"):
        compiled(q, k, v, -g)


def test_the_result_unpacks_and_has_names():
    output, state = attnlab.lightning_attention(q, k, v, g, return_final_state=True)
    result = attnlab.lightning_attention(q, k, v, g)
    assert torch.equal(result.output, output) and result.final_state is None
    assert state.dtype == torch.float32
