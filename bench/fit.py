"""What a series of times says about complexity: exponent, shares of the terms, crossover.

Inputs are measured times (milliseconds) of one operation over lengths (tokens). One slope over all
lengths would mix launch-bound points into the answer, so every fit here names the range it used, and
nothing is said about lengths that were not measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np

POINT_FIELDS = (
    *("suite", "op", "backend", "pass", "batch", "heads", "kv_heads", "q_len", "head_dim"),
    *("value_dim", "dtype", "device", "model", "layer", "precision", "input", "ranks"),
)
SERIES_FIELDS = (
    *("suite", "op", "backend", "pass", "model", "heads", "head_dim", "dtype", "device", "ranks"),
)
NUM_DRAWS = 2000  # bootstrap draws
ERROR_FLOOR = 0.004  # no median is trusted to better than 0.4 %
SLOPE_TOLERANCE = 0.1
MIN_TAIL = 4
Z95 = 1.96


@dataclass(frozen=True)
class Point:
    """One measured length (tokens): median and raw samples in milliseconds."""

    q_len: int
    ms_median: float
    samples: tuple[float, ...] = ()


@dataclass(frozen=True)
class LocalSlope:
    """Slope of log t over log N between two neighbouring lengths; 95 % interval where known."""

    start: int
    stop: int
    value: float
    lo: float | None = None
    hi: float | None = None


@dataclass(frozen=True)
class Exponent:
    """Exponent of t ~ N^value over `n0` to `n_max`; `value` is None where `reason` says "n/a"."""

    value: float | None
    lo: float | None
    hi: float | None
    n0: int | None
    num_points: int
    reason: str = ""
    n_max: int | None = None

    def __str__(self) -> str:
        if self.value is None:
            return self.reason
        window = f"{format_len(self.n0)}-{format_len(self.n_max)}, {self.num_points} points"
        note = f" ({self.reason})" if self.reason else ""
        return f"{self.value:.2f} [{self.lo:.2f}, {self.hi:.2f}] over {window}{note}"


@dataclass(frozen=True)
class TermShares:
    """Fit t = a + b N + c N^2 (ms; N in tokens) and each term's share of it at `n_max`.

    `equal_len` is the N where c N^2 = b N, None where b or c is 0; `rms_error` is the relative rms
    misfit. The numbers are None where `reason` says "n/a".
    """

    coefficients: tuple[float, float, float] | None
    constant: float | None
    linear: float | None
    quadratic: float | None
    equal_len: float | None
    rms_error: float | None
    n_min: int
    n_max: int
    reason: str = ""

    def __str__(self) -> str:
        if self.constant is None:
            return self.reason
        text = (
            f"constant {self.constant:.1%}, linear {self.linear:.1%}, "
            f"quadratic {self.quadratic:.1%} at {format_len(self.n_max)}"
        )
        if self.equal_len is None:
            return text
        outside = not self.n_min <= self.equal_len <= self.n_max
        note = " (outside the measured range)" if outside else ""
        return f"{text}; linear = quadratic at {format_len(self.equal_len)}{note}"


@dataclass(frozen=True)
class Crossover:
    """Length (tokens) where two times are equal and its 95 % interval.

    Each of the three is a number, or the text "> Nmax" or "< Nmin" for beyond the measured range.
    """

    value: float | str
    lo: float | str
    hi: float | str
    num_points: int

    def __str__(self) -> str:
        ends = (self.value, self.lo, self.hi)
        value, lo, hi = (end if isinstance(end, str) else format_len(end) for end in ends)
        return value if value == lo == hi else f"{value} [{lo}, {hi}]"


def format_len(length: float) -> str:
    """The length in binary units, three digits: 512, 1.5K, 64K, 4M."""
    power = 0
    while round(length) >= 1024 and power < 3:
        length, power = length / 1024, power + 1
    digits = f"{length:.0f}" if power == 0 or length >= 100 else f"{length:.3g}"
    return digits + ("", "K", "M", "G")[power]


def points_from_rows(rows: Iterable[dict[str, Any]], **match: Any) -> list[Point]:
    """Points, by length, of the timed `ok` rows whose fields equal `match`.

    Of rows that differ in nothing but the sources' fingerprint the last wins. ValueError when a field
    of `match` is in no row, or when two rows of one length are left: `match` must then say more.
    """
    rows = list(rows)
    unknown = [name for name in match if rows and not any(name in row for row in rows)]
    if unknown:
        raise ValueError(f"expected fields of the row schema, got {', '.join(unknown)}")
    chosen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        timed = row.get("status") == "ok" and row.get("ms_median") is not None
        if timed and all(row.get(name) == value for name, value in match.items()):
            chosen[tuple(row.get(name) for name in POINT_FIELDS)] = row
    ordered = sorted(chosen.values(), key=lambda row: row["q_len"])
    for one, other in pairwise(ordered):
        if one["q_len"] == other["q_len"]:
            differ = [name for name in POINT_FIELDS if one.get(name) != other.get(name)]
            raise ValueError(
                f"expected one row per length, got two of {one['q_len']} that differ in "
                + ", ".join(f"{name} ({one.get(name)}, {other.get(name)})" for name in differ)
            )
    return [
        Point(row["q_len"], row["ms_median"], tuple(row.get("samples") or ())) for row in ordered
    ]


def series(rows: Iterable[dict[str, Any]]) -> dict[tuple[Any, ...], list[Point]]:
    """Points of every series of timed `ok` rows, by the values of `SERIES_FIELDS` in that order."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("status") == "ok" and row.get("ms_median") is not None:
            groups.setdefault(tuple(row.get(name) for name in SERIES_FIELDS), []).append(row)
    return {key: points_from_rows(group) for key, group in groups.items()}


def local_slopes(
    lengths: Sequence[int],
    medians: Sequence[float],
    *,
    samples: Sequence[Sequence[float]] | None = None,
    intervals: Sequence[tuple[float, float]] | None = None,
) -> list[LocalSlope]:
    """log2(t2 / t1) / log2(N2 / N1) of each neighbouring pair: the slope per octave, any spacing.

    With `samples` (ms, per length) or `intervals` (95 % interval of each median, ms; these win) the
    relative errors of the two medians, at least 0.4 % each, are propagated to a 95 % interval.
    """
    given = [part for part in (lengths, medians, samples, intervals) if part is not None]
    if len({len(part) for part in given}) != 1:
        raise ValueError(f"expected one entry per length, got {[len(part) for part in given]}")
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    points = _checked(
        [
            Point(lengths[i], medians[i], tuple(samples[i]) if samples is not None else ())
            for i in order
        ]
    )
    half = np.full(len(points), np.nan)
    if intervals is not None:
        if not all(0 < lo <= hi < math.inf for lo, hi in intervals):
            raise ValueError(f"expected intervals with 0 < low <= high, got {list(intervals)}")
        half = np.array([math.log(intervals[i][1] / intervals[i][0]) / 2 for i in order])
    elif samples is not None:
        half = Z95 * _log_draws(points, seed=0).std(axis=0)
    half = np.maximum(half, Z95 * ERROR_FLOOR)
    slopes = []
    for i, (one, two) in enumerate(pairwise(points)):
        span = math.log(two.q_len / one.q_len)
        value = math.log(two.ms_median / one.ms_median) / span
        reach = math.hypot(half[i], half[i + 1]) / span
        ends = (None, None) if math.isnan(reach) else (value - reach, value + reach)
        slopes.append(LocalSlope(one.q_len, two.q_len, value, *ends))
    return slopes


def asymptotic_exponent(points: Sequence[Point], seed: int = 0) -> Exponent:
    """Exponent of the tail, where launches no longer matter, with its 95 % interval.

    Window: from N0 to the longest length, N0 being the smallest length for which all local slopes
    from there to the end differ by at most 0.1 (largest minus smallest) and are at least 3. Value:
    weighted least squares of log t on log N, weights 1/se^2, se the relative error of the median, at
    least 0.4 %. Interval: the wider of 1.96 standard errors times sqrt(max(1, chi2/dof)) and the
    bootstrap over the samples; it is then widened to hold the same interval of the last 4 points
    alone, because a tolerance of 0.1 lets the last of the overhead's bend into the window. Where no
    N0 qualifies the window is those 4 points, `reason` says so, and the interval is widened to hold
    their local slopes. Fewer than 4 points: n/a.
    """
    points = _checked(points)
    if len(points) < MIN_TAIL:
        reason = f"n/a: fewer than {MIN_TAIL} tail points (have {len(points)})"
        return Exponent(None, None, None, None, len(points), reason)
    pairs = local_slopes([p.q_len for p in points], [p.ms_median for p in points])
    slopes = [pair.value for pair in pairs]
    last = len(points) - MIN_TAIL
    start = next((i for i in range(last + 1) if np.ptp(slopes[i:]) <= SLOPE_TOLERANCE), None)
    tail = points[last if start is None else start :]
    value, *ends = _weighted_slope(tail, seed)
    ends += _weighted_slope(points[last:], seed)[1:]
    reason = ""
    if start is None:
        ends += slopes[last:]
        reason = f"no 3 local slopes up to the end agree within {SLOPE_TOLERANCE}: last 4 points"
    return Exponent(value, min(ends), max(ends), tail[0].q_len, len(tail), reason, tail[-1].q_len)


def term_shares(points: Sequence[Point]) -> TermShares:
    """Shares of the constant, linear and quadratic term at the longest length.

    Non-negative least squares of t = a + b N + c N^2 on relative error: the best of the 7 subsets of
    terms with no negative coefficient; the smaller one when two fit alike. Fewer than 4
    points: n/a.
    """
    points = _checked(points)
    n_min, n_max = points[0].q_len, points[-1].q_len
    if len(points) < MIN_TAIL:
        reason = f"n/a: fewer than {MIN_TAIL} points (have {len(points)})"
        return TermShares(None, None, None, None, None, None, n_min, n_max, reason)
    length = np.array([p.q_len for p in points]) / n_max  # so that coefficients are terms at n_max
    design = length[:, None] ** np.arange(3) / np.array([[p.ms_median] for p in points])
    best, best_error = np.zeros(3), math.inf
    for active in (c for size in (1, 2, 3) for c in combinations(range(3), size)):
        terms = np.zeros(3)
        terms[list(active)] = np.linalg.lstsq(design[:, active], np.ones(len(points)))[0]
        error = math.sqrt(np.mean((design @ terms - 1) ** 2))
        if terms.min() >= 0 and error < best_error * (1 - 1e-9) - 1e-12:
            best, best_error = terms, error
    a, b, c = (best / [1, n_max, float(n_max) ** 2]).tolist()
    shares = (best / best.sum()).tolist()
    return TermShares((a, b, c), *shares, b / c if b and c else None, best_error, n_min, n_max)


def crossover(points_a: Sequence[Point], points_b: Sequence[Point], seed: int = 0) -> Crossover:
    """Length from which `a`, the quadratic one, stays slower than `b`, over their common lengths.

    It is the last upward zero of log(t_a / t_b), interpolated in log2 N: median and 95 % interval of
    a 2,000-draw bootstrap over each point's samples (never tighter than 0.4 % a median; the error of
    interpolating is not in it). Nothing is extrapolated: `a` still faster at the longest common
    length gives "> Nmax", `a` slower at every one gives "< Nmin", and draws of either kind count as
    beyond that end in the interval too.
    """
    by_len = [{p.q_len: p for p in _checked(points)} for points in (points_a, points_b)]
    common = sorted(by_len[0].keys() & by_len[1].keys())
    if not common:
        raise ValueError(f"expected common lengths, got {[sorted(found) for found in by_len]}")
    a, b = ([found[length] for length in common] for found in by_len)
    octave = np.log2(common)
    measured = _last_zero(octave, _log_medians(a) - _log_medians(b))
    draws = _log_draws(a, seed) - _log_draws(b, seed + 1)
    zeros = np.sort([_last_zero(octave, ratio) for ratio in draws])
    low, middle, high = (zeros[round(q * (NUM_DRAWS - 1))] for q in (0.025, 0.5, 0.975))
    value = middle if math.isfinite(measured) else measured
    ends = min(low, value), max(high, value)
    texts = {math.inf: f"> {format_len(common[-1])}", -math.inf: f"< {format_len(common[0])}"}
    value, lo, hi = (texts.get(x) or float(2**x) for x in (value, *ends))
    return Crossover(value, lo, hi, len(common))


def bootstrap_medians(samples: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Medians of `NUM_DRAWS` resamples with replacement, unit of `samples`."""
    values = np.asarray(samples, dtype=np.float64)
    return np.median(values[rng.integers(len(values), size=(NUM_DRAWS, len(values)))], axis=1)


def _last_zero(octave: np.ndarray, log_ratio: np.ndarray) -> float:
    """Where `log_ratio` last rises through 0; inf if it ends below, -inf if it is never below."""
    below = np.flatnonzero(log_ratio <= 0)
    if len(below) == 0:
        return -math.inf
    i = below[-1]
    if i == len(octave) - 1:
        return math.inf if log_ratio[i] < 0 else float(octave[i])
    step = -log_ratio[i] / (log_ratio[i + 1] - log_ratio[i])
    return float(octave[i] + step * (octave[i + 1] - octave[i]))


def _log_medians(points: Sequence[Point]) -> np.ndarray:
    return np.log([p.ms_median for p in points])


def _log_draws(points: Sequence[Point], seed: int) -> np.ndarray:
    """Log of bootstrapped medians around `ms_median`, [draws, points], spread at least the floor."""
    rng = np.random.default_rng(seed)
    columns = []
    for point in points:
        samples = point.samples or (point.ms_median,)
        draws = np.log(bootstrap_medians(samples, rng) * (point.ms_median / np.median(samples)))
        missing = math.sqrt(max(0.0, ERROR_FLOOR**2 - draws.var()))
        columns.append(draws + missing * rng.standard_normal(NUM_DRAWS))
    return np.stack(columns, axis=1)


def _weighted_slope(points: Sequence[Point], seed: int) -> tuple[float, float, float]:
    """Weighted least squares slope of log t on log N; the wider of its two 95 % intervals."""
    x, y = np.log([p.q_len for p in points]), _log_medians(points)
    draws = _log_draws(points, seed)
    error = np.maximum(draws.std(axis=0), ERROR_FLOOR)
    weight = error**-2
    gain = weight * (x - np.average(x, weights=weight))
    gain /= gain @ x  # slope = gain . y
    slope = float(gain @ y)
    residual = y - slope * x
    residual -= np.average(residual, weights=weight)
    inflation = math.sqrt(max(1.0, float(weight @ residual**2) / (len(points) - 2)))
    reach = Z95 * inflation * float(np.linalg.norm(gain * error))
    low, high = np.quantile(draws @ gain, [0.025, 0.975]).tolist()
    return (slope, *max((slope - reach, slope + reach), (low, high), key=lambda e: e[1] - e[0]))


def _checked(points: Sequence[Point]) -> list[Point]:
    """The points by length; ValueError if there are none, or a length or time makes no sense."""
    if len(points) == 0:
        raise ValueError("expected at least one point, got none")
    for point in points:
        wrong = [t for t in (point.ms_median, *point.samples) if not 0 < t < math.inf]
        if wrong or not point.q_len > 0:
            came = f"{wrong[0]} ms at length {point.q_len}" if wrong else f"length {point.q_len}"
            raise ValueError(f"expected positive finite lengths and times, got {came}")
    ordered = sorted(points, key=lambda p: p.q_len)
    for one, two in pairwise(ordered):
        if one.q_len == two.q_len:
            raise ValueError(f"expected distinct lengths, got {one.q_len} twice")
    return ordered
