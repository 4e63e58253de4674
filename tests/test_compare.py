"""Verdicts on pairs of synthetic runs, and the command's exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.compare import (
    compare_rows,
    compare_runs,
    format_table,
    main,
    mann_whitney_p,
    ratio_interval,
)

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "compare.py"


def make_row(ms: float = 1.0, *, noise: float = 0.005, num: int = 40, seed: int = 0, **fields):
    rng = np.random.default_rng(seed)
    samples = ms * np.exp(noise * rng.standard_normal(num))
    q1, median, q3 = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
    row = {
        "suite": "ops",
        "op": "lightning",
        "backend": "triton",
        "pass": "fwd",
        "batch": 1,
        "heads": 16,
        "q_len": 65536,
        "head_dim": 128,
        "dtype": "bfloat16",
        "device": "NVIDIA H200",
        "fingerprint": f"f{seed}",
        "status": "ok",
        "ms_median": median,
        "ms_q1": q1,
        "ms_q3": q3,
        "samples": samples.tolist(),
    }
    row |= fields
    return row | {"key": str([row[n] for n in ("op", "q_len", "device", "fingerprint")])}


def write_run(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def counts_of(text: str) -> dict[str, int]:
    counts = json.loads(text.strip().splitlines()[-1])
    return {verdict: count for verdict, count in counts.items() if count}


def test_p_values_are_those_of_the_normal_approximation_with_continuity_correction():
    assert mann_whitney_p([19, 22, 16, 29, 24], [20, 11, 17, 12]) == pytest.approx(0.111346886533)


def test_p_values_are_corrected_for_ties():
    p = mann_whitney_p([1, 2, 2, 3, 3, 3], [2, 3, 4, 4, 5, 5, 5])
    assert p == pytest.approx(0.027730886166)


def test_p_is_two_sided_and_one_where_all_samples_are_equal():
    low, high = [1.0, 2.0, 3.0, 4.0], [3.5, 5.0, 6.0, 7.0]
    assert mann_whitney_p(low, high) == mann_whitney_p(high, low) < 0.1
    assert mann_whitney_p([1.0] * 9, [1.0] * 9) == 1.0


def test_the_ratio_interval_holds_the_ratio_and_shrinks_with_samples():
    widths = []
    for num in (10, 160):
        a, b = make_row(1.0, num=num, noise=0.05), make_row(1.5, num=num, noise=0.05, seed=1)
        lo, hi = ratio_interval(a["samples"], b["samples"])
        assert lo < 1.5 < hi
        widths.append(hi - lo)
    assert widths[1] < widths[0] / 2


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (1.10, "SLOW"),
        (1 / 1.10, "FAST"),
        (1.00, "SAME"),
        (1.01, "SAME"),
        (1.04, "AMBIGUOUS"),
        (1 / 1.04, "AMBIGUOUS"),
    ],
)
def test_steady_samples_are_judged_by_their_ratio(ratio, verdict):
    found = compare_rows(make_row(1.0), make_row(ratio, seed=1))
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(ratio, rel=0.005)
    assert found.lo < found.ratio < found.hi


@pytest.mark.parametrize("ratio", [1.0, 1.10], ids=["same", "slower"])
def test_noise_wider_than_the_change_is_ambiguous(ratio):
    a, b = make_row(1.0, noise=0.3), make_row(1.0, noise=0.3, seed=1)
    shift = ratio * a["ms_median"] / b["ms_median"]
    b["samples"] = [shift * x for x in b["samples"]]
    b["ms_median"] *= shift
    found = compare_rows(a, b)
    assert found.ratio == pytest.approx(ratio)
    assert found.verdict == "AMBIGUOUS"


def test_a_change_that_the_rank_test_does_not_support_is_ambiguous():
    a = make_row(samples=[1.0] * 8, ms_median=1.0)
    b = make_row(samples=[0.9] + [1.1] * 7, ms_median=1.1)
    found = compare_rows(a, b)
    assert found.ratio > 1.05 and found.lo > 1.02 and found.p > 0.002
    assert found.verdict == "AMBIGUOUS"


@pytest.mark.parametrize("ratio", [1.06, 1 / 1.06], ids=["slower", "faster"])
def test_a_change_whose_interval_reaches_the_margin_is_ambiguous(ratio):
    spread = np.linspace(0.85, 1.15, 60)
    a = make_row(samples=spread.tolist(), ms_median=1.0)
    b = make_row(samples=(ratio * spread).tolist(), ms_median=ratio)
    found = compare_rows(a, b)
    assert found.p < 0.002 and found.lo < 1.02 and found.hi > 1 / 1.02
    assert found.verdict == "AMBIGUOUS"


@pytest.mark.parametrize(("ratio", "verdict"), [(1.10, "SLOW"), (1 / 1.10, "FAST")])
def test_a_change_that_the_clock_explains_is_ambiguous(ratio, verdict):
    a = make_row(1.0, clocks={"sm_mhz": 1980})
    steady = make_row(ratio, seed=1, clocks={"sm_mhz": 1980})
    throttled = make_row(ratio, seed=1, clocks={"sm_mhz": 1980 / ratio})
    assert compare_rows(a, steady).verdict == verdict
    found = compare_rows(a, throttled)
    assert found.verdict == "AMBIGUOUS"
    assert float(found.note.removeprefix("cycles B/A ")) == pytest.approx(1, abs=0.01)
    assert compare_rows(a, make_row(ratio, seed=1, clocks=None)).verdict == verdict


@pytest.mark.parametrize("nums", [(7, 40), (40, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("ratio", [3.0, 1 / 3], ids=["slower", "faster"])
def test_few_samples_are_never_slow_or_fast(nums, ratio):
    found = compare_rows(make_row(1.0, num=nums[0]), make_row(ratio, num=nums[1], seed=1))
    assert found.verdict == "AMBIGUOUS"
    assert found.p is None and found.lo is None
    assert found.note == f"few samples ({nums[0]}, {nums[1]})"


def test_eight_samples_are_enough_for_a_verdict():
    assert compare_rows(make_row(1.0, num=8), make_row(1.5, num=8, seed=1)).verdict == "SLOW"


@pytest.mark.parametrize(
    ("quartiles_a", "quartiles_b", "ms_b", "verdict"),
    [
        ((0.99, 1.01), (1.00, 1.02), 1.01, "SAME"),
        ((0.99, 1.00), (1.005, 1.02), 1.01, "AMBIGUOUS"),
        ((0.90, 1.10), (0.95, 1.15), 1.03, "AMBIGUOUS"),
        ((None, None), (None, None), 1.01, "SAME"),
    ],
    ids=["overlap", "apart", "overlap-but-3-percent", "samples-overlap"],
)
def test_few_samples_are_the_same_if_spreads_overlap_and_medians_agree(
    quartiles_a, quartiles_b, ms_b, verdict
):
    a, b = (
        make_row(ms_median=1.0, samples=[0.99, 1.01]),
        make_row(ms_median=ms_b, samples=[1, ms_b]),
    )
    a["ms_q1"], a["ms_q3"] = quartiles_a
    b["ms_q1"], b["ms_q3"] = quartiles_b
    assert compare_rows(a, b).verdict == verdict


def test_points_are_matched_by_the_call_and_not_by_the_sources():
    a = [make_row(q_len=1024), make_row(q_len=2048), make_row(q_len=4096)]
    b = [make_row(q_len=2048, seed=1), make_row(q_len=1024, seed=2), make_row(heads=8, seed=3)]
    found = {(c.verdict, c.key[7]) for c in compare_runs(a, b)}
    assert found == {("SAME", 1024), ("SAME", 2048), ("ONLY_A", 4096), ("ONLY_B", 65536)}


def test_a_point_that_failed_in_one_run_is_listed_with_its_status():
    a = [make_row(q_len=1024), make_row(q_len=2048, status="skipped_budget", ms_median=None)]
    b = [make_row(q_len=1024, status="out_of_memory", ms_median=None), make_row(q_len=2048)]
    found = [(c.verdict, c.note) for c in compare_runs(a, b)]
    assert found == [("ONLY_A", "B: out_of_memory"), ("ONLY_B", "A: skipped_budget")]


def test_the_table_is_sorted_by_verdict_then_ratio_and_aligned():
    a = [make_row(q_len=1024 * 2**i) for i in range(5)]
    ratios = [1.0, 1.2, 0.8, 1.5]
    b = [make_row(r, q_len=1024 * 2**i, seed=1) for i, r in enumerate(ratios)]
    lines = format_table(compare_runs(a, b)).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["SLOW", "SLOW", "FAST", "SAME", "ONLY_A"]
    column = lines[0].index("q_len")
    assert [line[column:].split()[0] for line in lines[1:]] == ["8K", "2K", "4K", "1K", "16K"]


def test_fields_that_vary_appear_in_the_table():
    a = [make_row(heads=16), make_row(heads=64)]
    lines = format_table(compare_runs(a, a)).splitlines()
    column = lines[0].index("heads")
    assert {line[column:].split()[0] for line in lines[1:]} == {"16", "64"}
    assert "head_dim" not in lines[0]


def test_the_last_line_counts_verdicts_and_only_fail_on_slow_fails(tmp_path, capsys):
    a = write_run(tmp_path / "a", [make_row(), make_row(q_len=1024)])
    b = write_run(tmp_path / "b", [make_row(1.2, seed=1), make_row(q_len=1024, seed=2)])
    assert main([str(a), str(b)]) == 0
    assert counts_of(capsys.readouterr().out) == {"SLOW": 1, "SAME": 1}
    assert main([str(a), str(b / "rows.jsonl"), "--fail-on", "slow"]) == 1
    assert main([str(b), str(a), "--fail-on", "slow"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_different_devices_are_warned_about_and_not_compared(tmp_path, capsys):
    a = write_run(tmp_path / "a", [make_row()])
    b = write_run(tmp_path / "b", [make_row(2.0, device="NVIDIA H100")])
    assert main([str(a), str(b), "--fail-on", "slow"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("warning: devices differ")
    assert "A ran on NVIDIA H200; B on NVIDIA H100" in out
    assert counts_of(out) == {"ONLY_A": 1, "ONLY_B": 1}


def skipped_run(folder: Path) -> Path:
    return write_run(folder, [make_row(status="skipped_budget", ms_median=None)])


def corrupt_run(folder: Path) -> Path:
    write_run(folder, [make_row()])
    (folder / "rows.jsonl").write_text("{half\n" + json.dumps(make_row()) + "\n")
    return folder


def negative_run(folder: Path) -> Path:
    return write_run(folder, [make_row(ms_median=-1.0)])


@pytest.mark.parametrize(
    ("make_run", "message"),
    [
        (lambda folder: folder, "expected a run's folder or its rows.jsonl, got"),
        (skipped_run, "expected at least one timed point, got none"),
        (corrupt_run, ""),
        (negative_run, "expected positive times, got -1.0 ms"),
    ],
    ids=["no-such-path", "nothing-timed", "corrupt-line", "negative-time"],
)
def test_bad_input_exits_2_with_one_line(tmp_path, capsys, make_run, message):
    good = write_run(tmp_path / "good", [make_row()])
    assert main([str(good), str(make_run(tmp_path / "bad"))]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"compare: {message}")
    assert captured.err.count("\n") == 1


def test_the_script_runs_from_anywhere(tmp_path):
    a, b = (write_run(tmp_path / name, [make_row(seed=i)]) for i, name in enumerate("ab"))
    done = subprocess.run(
        [sys.executable, SCRIPT, a, b, "--fail-on", "slow"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert counts_of(done.stdout) == {"SAME": 1}
