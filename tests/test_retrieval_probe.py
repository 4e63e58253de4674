"""The probe against brute force, and both against the closed form."""

import math

import pytest
import torch

from attnlab.decay import minimax_log_decay
from attnlab.retrieval import probe, theory
from attnlab.retrieval.intervals import wilson
from attnlab.retrieval.pairs import READINGS, Pairs, Stream
from attnlab.retrieval.probe import Head, minimax_heads, probe_lightning, probe_softmax

pytestmark = pytest.mark.usefixtures("one_thread")
DIMS = {"key_dim": 64, "value_dim": 64}


def everything(stream):
    """Keys `[N, K]`, values `[N, V]`, entries `[N]` of a stream, joined from the probe's chunks."""
    pairs = Pairs(stream, "cpu", torch.float32)
    gap = stream.write_gap
    step = stream.num_tokens // (2 * READINGS * gap) * gap
    chunks = [
        pairs.chunk(start, stop, number)
        for number, (start, stop) in enumerate(probe._chunks(stream, step), start=1)
    ]
    return pairs, *(torch.cat(parts) for parts in zip(*chunks, strict=True))


@pytest.mark.parametrize("gap", [1, 8])
def test_streamed_recall_is_that_of_a_sum_over_all_writes(gap):
    """In float64, from the definition: sum of exp(-s (N-i)) (q k_i) v_i at each reading's moment."""
    stream = Stream(num_tokens=2048 * gap, head_dim=32, write_gap=gap, seed=3)
    slope = 0.02 / gap
    pairs, keys, values, entries = everything(stream)
    rows = list(probe_lightning(stream, [Head(slope=slope)]))
    step = stream.num_tokens // (2 * READINGS * gap) * gap
    moments = range(stream.num_tokens - 63 * step, stream.num_tokens + 1, step)
    assert [row.distance for row in rows] == [gap << i for i in range(11)]
    for row in rows:
        correct, margin = 0, 0.0
        for moment in moments:
            age = moment - torch.arange(moment).double()
            query = keys[moment - row.distance].double()
            weights = torch.exp(-slope * age) * (keys[:moment].double() @ query)
            products = pairs.codebook.double() @ (weights @ values[:moment].double())
            own = products[entries[moment - row.distance]].clone()
            products[entries[moment - row.distance]] = -math.inf
            correct += int(own > products.max())
            margin += float(own - products.max()) / 64
        assert row.correct == correct and row.n == 64
        assert row.margin == pytest.approx(margin, rel=1e-3, abs=1e-5)


def test_without_decay_recall_is_read_at_each_doubling():
    stream = Stream(num_tokens=1024, head_dim=32)
    rows = list(probe_lightning(stream, [Head(slope=0.0)]))
    assert [row.num_tokens for row in rows] == [64, 128, 256, 512, 1024]
    pairs, keys, values, entries = everything(stream)
    for row in rows:
        index = torch.arange(64) * row.num_tokens // 64
        state = keys[: row.num_tokens].T @ values[: row.num_tokens]
        right, margin = pairs.judge(keys[index] @ state, entries[index])
        assert row.correct == int(right.sum()) and row.distance is None
        assert row.margin == pytest.approx(float(margin.mean()), rel=1e-3, abs=1e-5)


def test_chunks_of_softmax_add_up_to_attention_over_all_keys(monkeypatch):
    """From the definition in float64, with chunks of 100 keys."""
    monkeypatch.setattr(probe, "CHUNK", 100)
    stream, scale = Stream(num_tokens=512, head_dim=32), 6.0
    rows = list(probe_softmax(stream, [scale], per_log_length=0.7))
    pairs = Pairs(stream, "cpu", torch.float32)
    bounds = sorted({0, 64, 128, 256, 512, 100, 200, 300, 400, 500})
    parts = [pairs.chunk(a, b, i) for i, (a, b) in enumerate(zip(bounds, bounds[1:]), 1)]  # noqa: RUF007, B905
    keys, values, entries = (torch.cat(x) for x in zip(*parts, strict=True))
    assert len(rows) == 8
    for row in rows:
        used = 0.7 * math.log(row.num_tokens) if row.per_log_length else scale
        assert row.logit_scale == pytest.approx(used)
        n = row.num_tokens
        weights = (used * keys[:64].double() @ keys[:n].double().T).softmax(-1)
        right, margin = pairs.judge(weights @ values[:n].double(), entries[:64])
        assert row.correct == int(right.sum())
        assert row.margin == pytest.approx(float(margin.mean()), rel=1e-4, abs=1e-6)


def crossing(rows, share):
    """log2 of the place at which a share that falls with it is one half, between two places."""
    places = [math.log2(row.distance or row.num_tokens) for row in rows]
    shares = [share(row) for row in rows]
    last = max(i for i, x in enumerate(shares) if x >= 0.5)
    slope = (shares[last] - shares[last + 1]) / (places[last + 1] - places[last])
    return places[last] + (shares[last] - 0.5) / slope


def check_prediction(rows):
    """The halves within half an octave (a factor of 1.4), shares within 0.05 in the mean."""
    measured = crossing(rows, lambda row: row.correct / row.n)
    assert abs(measured - crossing(rows, lambda row: row.predicted)) < 0.5
    assert sum(abs(row.correct / row.n - row.predicted) for row in rows) / len(rows) < 0.05


@pytest.mark.parametrize("slope", [0.25, 2.0**-4, 2.0**-6, 2.0**-8, 0.0])
@pytest.mark.parametrize("gap", [1, 16])
def test_the_closed_form_predicts_recall(slope, gap):
    stream = Stream(num_tokens=8192 * gap, head_dim=64, write_gap=gap, seed=1)
    check_prediction(list(probe_lightning(stream, [Head(slope=slope / gap)])))


@pytest.mark.parametrize("codebook", [8, 4096])
def test_the_closed_form_knows_values_that_come_up_again(codebook):
    """Of 8 values each is in an eighth of the writes, which costs a factor of 9 in capacity at dim 64."""
    stream = Stream(num_tokens=8192, head_dim=64, codebook=codebook)
    check_prediction(list(probe_lightning(stream, [Head(slope=0.0)])))
    assert theory.effective_dim(64, 64, codebook) == 64 / (1 / 64 + 1 / codebook)


def test_the_closed_form_predicts_softmax():
    rows = list(probe_softmax(Stream(num_tokens=1 << 15), [4.0, 6.0]))
    for scale in (4.0, 6.0):
        check_prediction([r for r in rows if r.logit_scale == scale and not r.per_log_length])
    assert all(row.correct == 64 for row in rows if row.per_log_length and row.num_tokens >= 256)


@pytest.mark.parametrize(("slope", "gap"), [(2.0**-4, 1), (2.0**-7, 1), (1e-4, 256)])
def test_the_horizon_is_where_half_is_recalled_within_a_factor_of_two(slope, gap):
    horizon = theory.lightning_horizon(slope, write_gap=gap, **DIMS)
    flags = {"slope": slope, "num_tokens": 1 << 22, "write_gap": gap, **DIMS}
    assert theory.lightning_recall(distance=round(horizon / 2), **flags) > 0.5
    assert theory.lightning_recall(distance=round(horizon * 2), **flags) < 0.5


def test_no_slope_has_a_longer_horizon_than_the_best_one():
    size = theory.effective_dim(64, 64)
    best = math.e * math.log(256) / size
    longest = theory.lightning_horizon(best, **DIMS)
    assert longest == pytest.approx(size / (2 * math.e * math.log(256)))
    others = [theory.lightning_horizon(best * f, **DIMS) for f in (0.3, 0.8, 1.25, 4.0)]
    assert max(others) < longest
    assert theory.lightning_horizon(1e-9, **DIMS) == 0.0


def test_half_is_recalled_near_the_capacity_and_the_softmax_horizon():
    keys = round(theory.capacity(64, 64))
    flags = {"slope": 0.0, "distance": 0, **DIMS}
    assert theory.lightning_recall(num_tokens=keys // 2, **flags) > 0.5
    assert theory.lightning_recall(num_tokens=keys * 2, **flags) < 0.5
    far = round(theory.softmax_horizon(8.0, **DIMS))
    assert theory.softmax_recall(logit_scale=8.0, num_tokens=far // 2, **DIMS) > 0.5
    assert theory.softmax_recall(logit_scale=8.0, num_tokens=far * 2, **DIMS) < 0.5


@pytest.mark.parametrize(("signal", "noise", "spread"), [(0.5, 0.2, 0.06), (1.0, 0.35, 0.12)])
def test_the_integral_is_the_share_of_draws_that_are_won(signal, noise, spread):
    """20,000 draws of the normal variables themselves; four deviations are 0.014."""
    draw = torch.Generator().manual_seed(0)
    own = signal + noise * torch.randn(20_000, generator=draw)
    others = torch.randn(20_000, 31, generator=draw) * math.hypot(noise, spread)
    share = float((own > others.amax(1)).double().mean())
    assert theory.top_one_probability(signal, noise, spread, 32) == pytest.approx(share, abs=0.014)


def test_writes_squared_is_its_sum():
    for slope, gap in ((0.1, 1), (0.003, 7)):
        expected = sum(math.exp(-2 * slope * gap * j) for j in range(1, 101))
        expected -= math.exp(-2 * slope * 3 * gap)
        got = theory.writes_squared(slope, 100 * gap, 3 * gap, gap)
        assert got == pytest.approx(expected, rel=1e-12)
    assert theory.writes_squared(0.0, 100, 5) == 99


def test_heads_are_minimax_01s():
    heads = minimax_heads()
    assert heads[-1] == Head(slope=0.0)
    for head in heads[:-1]:
        assert head.slope == pytest.approx(-float(minimax_log_decay(64, head.layer, 80)[head.head]))
    slowest = next(h for h in heads if h.layer == 78)
    assert 1 / slowest.slope == pytest.approx(20_208, rel=1e-3)  # tokens in which it e-folds


def test_wilson_intervals_are_known_values():
    """24 of 24: 0.862 to 1 (closed form n / (n + z^2)); 0 of 10; 8 of 10 from Wilson's formula."""
    assert wilson(24, 24) == pytest.approx((24 / (24 + 3.8415), 1.0), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 3.8415 / 13.8415), abs=1e-4)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    with pytest.raises(ValueError, match="n >= 1, got"):
        wilson(1, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_tokens": 100}, "at least 128 tokens, got 100"),
        ({"num_tokens": 1000, "write_gap": 8}, "at least 1024 tokens, got 1000"),
        ({"num_tokens": 1000, "write_gap": 0}, "write_gap >= 1, got 0"),
    ],
)
def test_a_stream_that_is_too_short_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        Stream(**flags)
