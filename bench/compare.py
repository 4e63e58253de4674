"""Compare two runs point by point: `python bench/compare.py RUN_A RUN_B [--fail-on slow]`.

RUN_A is the older run, RUN_B the newer one: folders that hold `rows.jsonl`, or such files. Points are
matched by every field of the call, whatever sources they ran. Verdicts:

    SLOW       B/A > 1.05, its 95 % interval above 1.02, p < .002, and the cycles agree
    FAST       the mirror image: B/A < 1/1.05, its interval below 1/1.02, p < .002, cycles agree
    SAME       the interval inside [.98, 1.02]
    AMBIGUOUS  anything else; never a failure

B/A is the ratio of medians, its interval a bootstrap over the samples, p a two-sided Mann-Whitney U
test. Cycles are time times SM clock, where both rows carry one: a ratio that only the clock explains
is no change of the code. With fewer than 8 samples on a side a verdict is SAME (spreads overlap and
B/A inside [.98, 1.02]) or AMBIGUOUS. Exit code: 1 for `--fail-on slow` with a SLOW point, 2 for bad
input.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.fit import POINT_FIELDS, bootstrap_medians, format_len
from bench.rows import load_rows

VERDICTS = ("SLOW", "FAST", "AMBIGUOUS", "SAME", "ONLY_A", "ONLY_B")
CHANGE = 1.05  # ratio of medians that counts as a change
MARGIN = 1.02  # what its interval must exclude
SAME_BAND = (0.98, 1.02)
MAX_P = 0.002
MIN_SAMPLES = 8
SHOWN = ("op", "backend", "pass", "q_len")  # columns; other fields appear where they vary

Row = dict[str, Any]
Key = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Verdict on one point; times in milliseconds, `ratio` B/A, None where one side is missing."""

    key: Key
    verdict: str
    ms_a: float | None = None
    ms_b: float | None = None
    ratio: float | None = None
    lo: float | None = None
    hi: float | None = None
    p: float | None = None
    note: str = ""


def mann_whitney_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the Mann-Whitney U test: normal approximation, tie and continuity corrected."""
    num_a, num_b = len(a), len(b)
    total = num_a + num_b
    _, place, ties = np.unique([*a, *b], return_inverse=True, return_counts=True)
    rank = (np.cumsum(ties) - (ties - 1) / 2)[place]
    u = rank[:num_a].sum() - num_a * (num_a + 1) / 2
    tied = float((ties.astype(float) ** 3 - ties).sum()) / (total * (total - 1))
    variance = num_a * num_b / 12 * (total + 1 - tied)
    if variance <= 0:  # all samples equal
        return 1.0
    z = max(0.0, abs(u - num_a * num_b / 2) - 0.5) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))


def ratio_interval(a: Sequence[float], b: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of median(b) / median(a)."""
    rng = np.random.default_rng(seed)
    ratios = bootstrap_medians(b, rng) / bootstrap_medians(a, rng)
    lo, hi = np.quantile(ratios, [0.025, 0.975]).tolist()
    return lo, hi


def compare_rows(row_a: Row, row_b: Row) -> Comparison:
    """Verdict on two `ok` rows of one point, by the rule at the top of this file."""
    key = point_key(row_a)
    ms_a, ms_b = row_a["ms_median"], row_b["ms_median"]
    a, b = row_a.get("samples") or [], row_b.get("samples") or []
    if not min(ms_a, ms_b, *a, *b) > 0:
        raise ValueError(f"expected positive times, got {min(ms_a, ms_b, *a, *b)} ms for {key}")
    ratio = ms_b / ms_a
    if min(len(a), len(b)) < MIN_SAMPLES:
        (lo_a, hi_a), (lo_b, hi_b) = _spread(row_a), _spread(row_b)
        overlap = lo_a <= hi_b and lo_b <= hi_a
        same = overlap and SAME_BAND[0] <= ratio <= SAME_BAND[1]
        verdict = "SAME" if same else "AMBIGUOUS"
        note = f"few samples ({len(a)}, {len(b)})"
        return Comparison(key=key, verdict=verdict, ms_a=ms_a, ms_b=ms_b, ratio=ratio, note=note)
    lo, hi = ratio_interval(a, b)
    p = mann_whitney_p(a, b)
    cycles = _cycle_ratio(row_a, row_b, ratio)
    verdict, note = _verdict(ratio, lo, hi, p, cycles)
    return Comparison(
        key=key, verdict=verdict, ms_a=ms_a, ms_b=ms_b, ratio=ratio, lo=lo, hi=hi, p=p, note=note
    )


def compare_runs(rows_a: Iterable[Row], rows_b: Iterable[Row]) -> list[Comparison]:
    """Comparisons of all points timed in either run, by verdict, then by falling ratio."""
    runs = [{point_key(row): row for row in rows} for rows in (rows_a, rows_b)]
    found = []
    for key in dict.fromkeys([*runs[0], *runs[1]]):
        row_a, row_b = (run.get(key) for run in runs)
        if _timed(row_a) and _timed(row_b):
            found.append(compare_rows(row_a, row_b))
        elif _timed(row_a):
            note = f"B: {row_b.get('status')}" if row_b else ""
            found.append(Comparison(key=key, verdict="ONLY_A", ms_a=row_a["ms_median"], note=note))
        elif _timed(row_b):
            note = f"A: {row_a.get('status')}" if row_a else ""
            found.append(Comparison(key=key, verdict="ONLY_B", ms_b=row_b["ms_median"], note=note))
    return sorted(found, key=lambda c: (VERDICTS.index(c.verdict), -(c.ratio or 0)))


def point_key(row: Row) -> Key:
    """What makes two rows the same point: all fields of the call, not the sources it ran."""
    return tuple(row.get(name) for name in POINT_FIELDS)


def format_table(comparisons: Sequence[Comparison]) -> str:
    """Aligned plain text, one line a comparison, under a line of headings."""
    varying = [
        name
        for i, name in enumerate(POINT_FIELDS)
        if name not in SHOWN and len({c.key[i] for c in comparisons}) > 1
    ]
    lines = [("verdict", "B/A", "95 %", "p", "A ms", "B ms", *SHOWN, *varying, "note")]
    for c in comparisons:
        fields = dict(zip(POINT_FIELDS, c.key, strict=True))
        if isinstance(fields["q_len"], int):
            fields["q_len"] = format_len(fields["q_len"])
        interval = "-" if c.lo is None else f"[{c.lo:.3f}, {c.hi:.3f}]"
        numbers = (_number(c.ratio, ".3f"), interval, _number(c.p, ".1e"))
        times = (_number(c.ms_a, ".4g"), _number(c.ms_b, ".4g"))
        shown = ("-" if fields[n] is None else str(fields[n]) for n in (*SHOWN, *varying))
        lines.append((c.verdict, *numbers, *times, *shown, c.note))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare two runs point by point.")
    parser.add_argument("run_a", type=Path, help="older run: a folder or its rows.jsonl")
    parser.add_argument("run_b", type=Path, help="newer run")
    parser.add_argument("--fail-on", choices=["slow"], help="exit 1 when a point has this verdict")
    args = parser.parse_args(argv)
    try:
        rows_a, rows_b = _read(args.run_a), _read(args.run_b)
        comparisons = compare_runs(rows_a, rows_b)
    except (OSError, ValueError) as error:
        print(f"compare: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    devices = [sorted({str(row.get("device")) for row in rows}) for rows in (rows_a, rows_b)]
    if devices[0] != devices[1]:
        came = f"A ran on {', '.join(devices[0])}; B on {', '.join(devices[1])}"
        print(f"warning: devices differ, points of different devices are not compared: {came}")
    counts = Counter(c.verdict for c in comparisons)
    print(format_table(comparisons))
    print(json.dumps({verdict: counts[verdict] for verdict in VERDICTS}))
    return 1 if args.fail_on == "slow" and counts["SLOW"] else 0


def _read(path: Path) -> list[Row]:
    file = path / "rows.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"expected a run's folder or its rows.jsonl, got {path}")
    rows = load_rows(file)
    if not any(_timed(row) for row in rows):
        raise ValueError(f"expected at least one timed point, got none in {file}")
    return rows


def _timed(row: Row | None) -> bool:
    return row is not None and row.get("status") == "ok" and row.get("ms_median") is not None


def _spread(row: Row) -> tuple[float, float]:
    """Quartiles where the row has them, else smallest and largest sample, milliseconds."""
    if row.get("ms_q1") is not None and row.get("ms_q3") is not None:
        return row["ms_q1"], row["ms_q3"]
    samples = row.get("samples") or [row["ms_median"]]
    return min(samples), max(samples)


def _cycle_ratio(row_a: Row, row_b: Row, ratio: float) -> float | None:
    """Ratio of SM cycles, B/A; None where a row has no clock."""
    clock_a, clock_b = ((row.get("clocks") or {}).get("sm_mhz") for row in (row_a, row_b))
    return ratio * clock_b / clock_a if clock_a and clock_b else None


def _verdict(ratio: float, lo: float, hi: float, p: float, cycles: float | None) -> tuple[str, str]:
    """Verdict and note for points with enough samples."""
    slow = ratio > CHANGE and lo > MARGIN and p < MAX_P
    fast = ratio < 1 / CHANGE and hi < 1 / MARGIN and p < MAX_P
    if slow or fast:
        agree = cycles is None or (cycles > CHANGE if slow else cycles < 1 / CHANGE)
        if agree:
            return ("SLOW" if slow else "FAST"), ""
        return "AMBIGUOUS", f"cycles B/A {cycles:.3f}"
    return ("SAME" if lo >= SAME_BAND[0] and hi <= SAME_BAND[1] else "AMBIGUOUS"), ""


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


if __name__ == "__main__":
    sys.exit(main())
