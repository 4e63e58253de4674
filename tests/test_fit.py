"""The fits on synthetic times: known terms, seeded multiplicative noise."""

from collections.abc import Callable

import numpy as np
import pytest

from bench.fit import (
    Point,
    asymptotic_exponent,
    crossover,
    format_len,
    local_slopes,
    points_from_rows,
    series,
    term_shares,
)

OCTAVES = [2**e for e in range(10, 23)]  # 1K to 4M


def make_points(
    time: Callable[[int], float],
    *,
    lengths: list[int] = OCTAVES,
    noise: float = 0.01,
    num_samples: int = 20,
    seed: int = 0,
) -> list[Point]:
    rng = np.random.default_rng(seed)
    points = []
    for length in lengths:
        samples = time(length) * np.exp(noise * rng.standard_normal(num_samples))
        points.append(Point(length, float(np.median(samples)), tuple(samples.tolist())))
    return points


def quadratic(length: int) -> float:
    return 0.02 + 2e-9 * length**2


def linear(length: int) -> float:
    return 0.05 + 2e-5 * length


def make_row(**fields) -> dict:
    return {
        "suite": "ops",
        "op": "lightning",
        "backend": "triton",
        "pass": "fwd",
        "model": None,
        "batch": 1,
        "heads": 16,
        "head_dim": 128,
        "dtype": "bfloat16",
        "device": "cpu",
        "status": "ok",
        "q_len": 1024,
        "ms_median": 2.0,
        "samples": [1.9, 2.0, 2.1],
    } | fields


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (1, "1"),
        (1000, "1000"),
        (1024, "1K"),
        (1536, "1.5K"),
        (65536, "64K"),
        (1023 * 1024, "1023K"),
        (2**20 - 1, "1M"),
        (4194304, "4M"),
        (2**31, "2G"),
        (2**41, "2048G"),
        (300.4, "300"),
    ],
)
def test_lengths_are_written_in_binary_units(length, text):
    assert format_len(length) == text


def test_a_local_slope_is_per_octave_whatever_the_spacing():
    slopes = local_slopes([1024, 1536, 6144], [1.0, 1.5**2, 6.0**2])
    assert [(s.start, s.stop) for s in slopes] == [(1024, 1536), (1536, 6144)]
    assert [s.value for s in slopes] == pytest.approx([2, 2])
    assert all(s.lo is None and s.hi is None for s in slopes)


def test_intervals_are_propagated_to_the_local_slope():
    wide, tight = (
        local_slopes([1024, 4096], [1.0, 4.0], intervals=[(1 / r, r), (4 / r, 4 * r)])[0]
        for r in (1.1, 1.0001)
    )
    assert wide.hi - wide.value == pytest.approx(np.log2(1.1) * np.sqrt(2) / 2)
    assert wide.value - wide.lo == pytest.approx(wide.hi - wide.value)
    floor = 1.96 * 0.004 * np.sqrt(2) / np.log(4)
    assert tight.hi - tight.value == pytest.approx(floor)


def test_noisier_samples_give_wider_local_slopes():
    widths = []
    for noise in (0.02, 0.2):
        points = make_points(lambda n: 1e-5 * n, lengths=[1024, 2048], noise=noise)
        columns = zip(*((p.q_len, p.ms_median, p.samples) for p in points), strict=True)
        lengths, medians, samples = columns
        slope = local_slopes(lengths, medians, samples=samples)[0]
        assert slope.lo < 1 < slope.hi
        widths.append(slope.hi - slope.lo)
    assert 5 < widths[1] / widths[0] < 20


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("time", "truth"), [(quadratic, 2), (linear, 1)], ids=["N^2", "N"])
def test_the_exponent_is_that_of_the_tail_in_spite_of_launch_overhead(time, truth, seed):
    points = make_points(time, seed=seed)
    found = asymptotic_exponent(points)
    assert found.value == pytest.approx(truth, abs=0.03)
    assert found.lo <= truth <= found.hi
    assert found.hi - found.lo < 0.1
    assert found.n0 > 4096  # the launch-bound points are out
    assert found.n_max == 4194304
    assert found.num_points == sum(p.q_len >= found.n0 for p in points)
    assert found.reason == ""
    x, y = np.log2([p.q_len for p in points]), np.log2([p.ms_median for p in points])
    assert abs(np.polyfit(x, y, 1)[0] - truth) > 0.05  # one slope over all lengths is wrong


def test_the_interval_covers_the_truth_in_most_runs():
    covered = []
    for seed in range(40):
        found = asymptotic_exponent(make_points(linear, seed=seed, num_samples=9))
        covered.append(found.lo <= 1 <= found.hi)
    assert np.mean(covered) >= 0.85


def test_the_window_starts_where_the_local_slopes_begin_to_agree():
    slopes = [0.2, 0.6, 1.04, 0.98, 1.0, 0.96]
    times = 2 ** np.concatenate([[0], np.cumsum(slopes)])
    found = asymptotic_exponent([Point(2**i, t) for i, t in enumerate(times.tolist())])
    assert (found.n0, found.n_max, found.num_points) == (4, 64, 5)
    assert str(found).endswith("over 4-64, 5 points")


def test_slopes_that_agreed_before_the_end_do_not_make_a_tail():
    slopes = [1.0, 1.0, 1.0, 1.0, 1.5, 2.0, 2.0, 2.0]
    times = 2 ** np.concatenate([[0], np.cumsum(slopes)])
    found = asymptotic_exponent([Point(2**i, t) for i, t in enumerate(times.tolist())])
    assert (found.n0, found.num_points) == (32, 4)
    assert found.value == pytest.approx(2)


def test_the_order_of_the_points_does_not_matter():
    points = make_points(quadratic)
    backwards = points[::-1]
    assert asymptotic_exponent(backwards) == asymptotic_exponent(points)
    assert term_shares(backwards) == term_shares(points)
    lengths, medians, intervals = [1, 2, 4], [1.0, 3.0, 9.0], [(0.9, 1.1), (2.0, 4.0), (5.0, 15.0)]
    assert local_slopes(lengths[::-1], medians[::-1], intervals=intervals[::-1]) == local_slopes(
        lengths, medians, intervals=intervals
    )


def test_points_are_weighted_by_their_error():
    times = [1.0, 2.0, 4.0, 8.0 * 1.05]
    exact = [Point(2**i, t) for i, t in enumerate(times)]
    noisy_last = (*exact[:3], Point(8, 8.4, (4.2, 6.3, 8.4, 10.5, 12.6)))
    plain, weighted = asymptotic_exponent(exact), asymptotic_exponent(noisy_last)
    assert plain.value > 1.01
    assert weighted.value == pytest.approx(1, abs=0.001)


def test_samples_that_are_absent_do_not_make_an_exact_exponent():
    found = asymptotic_exponent([Point(2**i, 4.0**i) for i in range(10, 16)])
    assert found.value == pytest.approx(2)
    assert 0.002 < found.hi - found.lo < 0.05


def test_a_residual_beyond_the_samples_widens_the_interval():
    rng = np.random.default_rng(1)
    wobble = np.exp(0.03 * rng.standard_normal(8))
    smooth = asymptotic_exponent([Point(4**i, 4.0**i) for i in range(1, 9)])
    rough = asymptotic_exponent([Point(4**i, 4.0**i * wobble[i - 1]) for i in range(1, 9)])
    assert rough.num_points == smooth.num_points == 8
    assert rough.hi - rough.lo > 2 * (smooth.hi - smooth.lo)


def test_without_an_agreeing_tail_the_last_four_points_are_used_and_named():
    slopes = [0.5, 0.8, 1.1, 1.5, 2.0]
    times = 2 ** np.concatenate([[0], np.cumsum(slopes)])
    found = asymptotic_exponent([Point(2**i, t) for i, t in enumerate(times.tolist())])
    assert (found.n0, found.num_points) == (4, 4)
    assert "last 4 points" in found.reason and found.reason in str(found)
    assert found.lo < 1.1001 and found.hi > 1.9999  # the interval holds the slopes of the window


def test_three_points_have_no_exponent():
    found = asymptotic_exponent(make_points(quadratic, lengths=[1024, 2048, 4096]))
    assert found.value is None and found.lo is None and found.hi is None
    assert str(found) == "n/a: fewer than 4 tail points (have 3)"


def test_the_exponent_reads_as_value_interval_and_window():
    found = asymptotic_exponent(make_points(lambda n: 1e-9 * n**2, lengths=OCTAVES[6:]))
    assert str(found) == f"2.00 [{found.lo:.2f}, {found.hi:.2f}] over 64K-4M, 7 points"


def test_the_shares_of_three_terms_are_recovered():
    a, b, c = 0.05, 2e-5, 1e-11
    points = make_points(lambda n: a + b * n + c * n**2, noise=0.003)
    found = term_shares(points)
    whole = a + b * 2**22 + c * 2**44
    assert found.coefficients == pytest.approx((a, b, c), rel=0.05)
    assert found.quadratic == pytest.approx(c * 2**44 / whole, abs=0.02)
    assert found.linear == pytest.approx(b * 2**22 / whole, abs=0.02)
    assert found.constant + found.linear + found.quadratic == pytest.approx(1)
    assert found.equal_len == pytest.approx(b / c, rel=0.1)
    assert 0 < found.rms_error < 0.01
    assert str(found).endswith(f"linear = quadratic at {format_len(found.equal_len)}")


@pytest.mark.parametrize("power", [0, 1, 2])
def test_a_term_that_is_absent_gets_no_share(power):
    found = term_shares([Point(n, 0.3 * n**power) for n in OCTAVES])
    shares = [0, 0, 0]
    shares[power] = 1
    assert [found.constant, found.linear, found.quadratic] == shares
    assert found.equal_len is None
    assert str(found).endswith(f"quadratic {shares[2]:.1%} at 4M")


def test_shares_stay_non_negative_where_plain_least_squares_would_not():
    found = term_shares([Point(n, n**0.7) for n in OCTAVES])
    assert min(found.coefficients) >= 0
    assert found.quadratic == 0 and found.linear > 0 and found.constant > 0
    assert found.rms_error > 0.1  # and the misfit shows


def test_an_equal_length_outside_the_measured_range_is_marked():
    found = term_shares([Point(n, 1e-3 * n + 1e-12 * n**2) for n in OCTAVES])
    assert found.equal_len == pytest.approx(1e9, rel=1e-3)
    assert str(found).endswith("(outside the measured range)")


def test_three_points_have_no_shares():
    found = term_shares(make_points(quadratic, lengths=[1024, 2048, 4096]))
    assert found.coefficients is None and found.quadratic is None
    assert str(found) == "n/a: fewer than 4 points (have 3)"


@pytest.mark.parametrize("seed", range(3))
def test_the_crossover_is_recovered(seed):
    a = make_points(lambda n: 1e-9 * n**2, seed=seed)
    b = make_points(lambda n: 3e-5 * n, seed=seed + 100)  # equal at 30,000 tokens
    found = crossover(a, b)
    assert found.value == pytest.approx(30000, rel=0.03)
    assert found.lo < 30000 < found.hi
    assert found.hi / found.lo < 1.1
    assert found.num_points == len(OCTAVES)
    assert str(found) == (
        f"{format_len(found.value)} [{format_len(found.lo)}, {format_len(found.hi)}]"
    )


def test_the_crossover_depends_on_nothing_but_points_and_seed():
    a, b = make_points(lambda n: 1e-9 * n**2), make_points(lambda n: 3e-5 * n, seed=1)
    assert crossover(a, b, seed=3) == crossover(a[::-1], b[::-1], seed=3)
    assert crossover(a, b, seed=3) != crossover(a, b, seed=4)


def test_only_common_lengths_count_for_the_crossover():
    a = make_points(lambda n: 1e-9 * n**2, lengths=OCTAVES[:4])  # 1K to 8K; equal at 30,000
    b = make_points(lambda n: 3e-5 * n)
    found = crossover(a, b)
    assert str(found) == "> 8K"
    assert found.num_points == 4


def test_a_crossover_below_the_measured_range_is_not_extrapolated():
    a = make_points(lambda n: 1e-9 * n**2, lengths=OCTAVES[6:])
    b = make_points(lambda n: 3e-5 * n, lengths=OCTAVES[6:])
    found = crossover(a, b)
    assert (found.value, found.lo, found.hi) == ("< 64K",) * 3
    assert str(found) == "< 64K"


def test_swapping_the_operations_gives_no_crossover():
    a, b = make_points(lambda n: 1e-9 * n**2), make_points(lambda n: 3e-5 * n)
    assert crossover(b, a).value == "> 4M"  # the second never becomes the faster one for good


def test_draws_without_a_crossing_push_the_interval_beyond_the_range():
    lengths = [1024, 2048, 4096, 8192]
    a = make_points(lambda n: n**2, lengths=lengths, noise=0.3)
    b = make_points(lambda n: 7600.0 * n, lengths=lengths, noise=0.3, seed=9)
    found = crossover(a, b)
    assert isinstance(found.value, float) and 4096 < found.value <= 8192
    assert isinstance(found.lo, float) and found.lo < found.value
    assert found.hi == "> 8K"
    assert str(found).endswith("> 8K]")


def test_the_crossover_is_the_last_one():
    lengths = [1024, 2048, 4096, 8192]
    a = [Point(n, t) for n, t in zip(lengths, [2.0, 0.5, 0.5, 2.0], strict=True)]
    found = crossover(a, [Point(n, 1.0) for n in lengths])
    assert found.value == pytest.approx(4096 * 2**0.5, rel=0.01)


@pytest.mark.parametrize("noisy", ["a", "b"])
def test_noise_of_either_operation_widens_the_crossover(noisy):
    noise = {"a": 0.001, "b": 0.001} | {noisy: 0.2}
    a = make_points(lambda n: 1e-9 * n**2, noise=noise["a"])
    b = make_points(lambda n: 3e-5 * n, noise=noise["b"])
    found = crossover(a, b)
    assert found.hi / found.lo > 1.1


def test_a_single_sample_is_not_taken_as_exact():
    a = [Point(n, 1e-9 * n**2) for n in OCTAVES]
    found = crossover(a, [Point(n, 3e-5 * n) for n in OCTAVES])
    assert 1.005 < found.hi / found.lo < 1.05


def test_points_come_from_the_matching_timed_rows_in_order():
    rows = [
        make_row(q_len=4096, ms_median=4.0, samples=[3.9, 4.1]),
        make_row(q_len=1024),
        make_row(q_len=2048, status="skipped_budget", ms_median=None, samples=None),
        make_row(q_len=2048, **{"pass": "bwd"}),
        make_row(q_len=8192, samples=None),
    ]
    assert points_from_rows(rows, op="lightning", **{"pass": "fwd"}) == [
        Point(1024, 2.0, (1.9, 2.0, 2.1)),
        Point(4096, 4.0, (3.9, 4.1)),
        Point(8192, 2.0),
    ]


def test_of_rows_that_differ_only_in_their_sources_the_last_wins():
    rows = [make_row(fingerprint="old"), make_row(fingerprint="new", ms_median=1.0, samples=[1.0])]
    assert points_from_rows(rows) == [Point(1024, 1.0, (1.0,))]


def test_rows_are_grouped_into_series():
    rows = [
        make_row(),
        make_row(q_len=2048),
        make_row(op="softmax", backend="sdpa"),
        make_row(op="softmax", backend="cudnn", status="unsupported", ms_median=None),
    ]
    found = series(rows)
    key = ("ops", "lightning", "triton", "fwd", None, 16, 128, "bfloat16", "cpu", None)
    assert [p.q_len for p in found[key]] == [1024, 2048]
    assert [k[1:3] for k in found] == [("lightning", "triton"), ("softmax", "sdpa")]


def test_two_rows_of_one_length_are_refused_with_the_field_that_differs():
    with pytest.raises(ValueError, match=r"two of 1024 that differ in batch \(1, 8\)"):
        points_from_rows([make_row(), make_row(batch=8)])


def test_a_field_outside_the_schema_is_refused():
    with pytest.raises(ValueError, match="row schema, got headdim"):
        points_from_rows([make_row()], headdim=128)


@pytest.mark.parametrize("fit", [asymptotic_exponent, term_shares, lambda p: crossover(p, p)])
@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "at least one point, got none"),
        ([Point(1024, 0.0)], "got 0.0 ms at length 1024"),
        ([Point(1024, 1.0, (1.0, -2.0))], "got -2.0 ms at length 1024"),
        ([Point(1024, float("nan"))], "got nan ms"),
        ([Point(0, 1.0)], "got length 0"),
        ([Point(1024, 1.0), Point(1024, 1.1)], "distinct lengths, got 1024 twice"),
    ],
    ids=["empty", "zero-time", "negative-sample", "nan", "zero-length", "duplicate"],
)
def test_senseless_points_are_refused(fit, points, message):
    with pytest.raises(ValueError, match=message):
        fit(points)


def test_local_slopes_refuse_lists_of_different_length():
    with pytest.raises(ValueError, match=r"one entry per length, got \[2, 1\]"):
        local_slopes([1024, 2048], [1.0])


def test_local_slopes_refuse_intervals_upside_down():
    with pytest.raises(ValueError, match="0 < low <= high, got"):
        local_slopes([1024, 2048], [1.0, 2.0], intervals=[(0.9, 1.1), (2.2, 1.8)])


def test_a_crossover_without_common_lengths_is_refused():
    with pytest.raises(ValueError, match=r"common lengths, got \[\[1024\], \[2048\]\]"):
        crossover([Point(1024, 1.0)], [Point(2048, 1.0)])
