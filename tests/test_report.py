"""The charts and the report of a run, on rows made up here: what is measured, what is predicted."""

import base64
import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from bench import plots, report
from bench.findings import crossover_table, findings, time_table
from bench.fit import asymptotic_exponent, crossover, local_slopes, points_from_rows
from bench.lines import by_configuration, lines_of

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = [2**power for power in range(10, 23)]
PASS_FACTOR = {"fwd": 1.0, "fwd+bwd": 3.4}
# (op, backend): milliseconds a call, a token, a squared token; longest measured length; error
COSTS = {
    ("lightning", "triton"): (0.030, 6.0e-6, 0, 2**22, 2.1e-3),
    ("lightning", "cuda"): (0.022, 7.5e-6, 0, 2**22, 2.0e-3),
    ("lightning", "torch"): (0.400, 6.5e-5, 0, 2**21, 2.4e-3),
    ("lightning", "fla"): (0.080, 9.0e-6, 0, 2**22, 2.3e-3),
    ("softmax", "sdpa"): (0.015, 1.0e-6, 7.0e-9, 2**16, 1.6e-3),
    ("softmax", "flash"): (0.020, 1.0e-6, 7.5e-9, 2**16, 1.7e-3),
    ("softmax", "reference"): (0.060, 5.0e-6, 6.0e-8, 2**14, 1.2e-3),
}
BYTES_PER_TOKEN = 4 * 16 * 128 * 2


def make_row(
    op: str, backend: str, pass_name: str, q_len: int, status: str = "ok", **fields
) -> dict:
    """A row of the schema with everything that is not measured."""
    row = {
        "schema": 1, "run_id": "made-up", "ts_utc": "2026-01-01T00:00:00Z",
        "key": f"{op}-{backend}-{pass_name}-{q_len}", "suite": "ops",
        "op": op, "backend": backend, "pass": pass_name, "batch": 1, "heads": 16, "kv_heads": 16,
        "q_len": q_len, "head_dim": 128, "value_dim": 128, "dtype": "bfloat16",
        "device": "NVIDIA H200", "model": None, "layer": "0/80" if op == "lightning" else None,
        "precision": "default" if op == "lightning" else None, "input": "text",
        "fingerprint": "f00d", "commit": "abc1234",
        "versions": {"torch": "2.13.0", "triton": "3.7.0", "python": "3.12.1"},
        "status": status, "reason": None, "pred_ms": None, "pred_bytes": None, "ms_median": None,
    }  # fmt: skip
    return row | fields


def timed(ms: float, rng: np.random.Generator) -> dict:
    samples = np.sort(ms * (1 + 0.01 * rng.standard_normal(1 if ms > 1000 else 30)))
    low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75])
    return {
        "ms_median": middle, "ms_q1": low, "ms_q3": high, "ms_lo": middle * 0.995,
        "ms_hi": middle * 1.005, "samples": samples.tolist(), "timer": "event",
        "l2_flush": True, "first_call_ms": ms + 300, "point_s": 1.5,
        "ceilings": {"copy_gbps": 4300.0, "matmul_tflops": 788.0},
    }  # fmt: skip


def ops_row(op: str, backend: str, pass_name: str, q_len: int, rng: np.random.Generator) -> dict:
    call, token, pair, last, error = COSTS[op, backend]
    factor = PASS_FACTOR[pass_name]
    ms = factor * (call + token * q_len + pair * q_len**2)
    naive = backend == "reference"
    num_bytes = 2**21 + factor * BYTES_PER_TOKEN * q_len + naive * 64 * q_len**2
    guess = {"pred_ms": 1.1 * ms, "pred_bytes": round(num_bytes)}
    if q_len > last:
        first = q_len == 2 * last
        status = (
            "skipped_dominated" if not first else "out_of_memory" if naive else "skipped_budget"
        )
        reason = (
            f"predicted {ms:.0f} ms, the budget is 500 ms" if first else "a shorter one was skipped"
        )
        return make_row(op, backend, pass_name, q_len, status, reason=reason, **guess)
    floor = factor * (token / 3 * q_len if op == "lightning" else pair / 1.6 * q_len**2)
    limit = "memory" if op == "lightning" or q_len < 2048 else "compute"
    return make_row(op, backend, pass_name, q_len, **guess) | timed(ms, rng) | {
        "tokens_per_s": q_len / ms * 1e3, "floor_ms": floor, "limit": limit,
        "share_of_limit": floor / ms, "peak_bytes": round(num_bytes),
        "error_ratio": 0.5 + 0.02 * math.log2(q_len), "error_rms": error * (1 + 0.1 * rng.random()),
        "error_max": 3 * error,
    }  # fmt: skip


def decode_row(op: str, backend: str, q_len: int, rng: np.random.Generator) -> dict:
    ms = 0.012 if op == "lightning" else 0.014 + 2.2e-6 * q_len
    kept = 2**20 if op == "lightning" else BYTES_PER_TOKEN // 2 * q_len
    measured = {"tokens_per_s": 1e3 / ms, "limit": "memory", "share_of_limit": 0.1 + kept / 1e12,
                "peak_bytes": 2**20 + kept, "error_rms": 2e-3, "error_ratio": 0.7}  # fmt: skip
    return make_row(op, backend, "decode", q_len) | timed(ms, rng) | measured


def make_rows() -> list[dict]:
    """Lightning to 4M; softmax to 64K, then skipped; naive softmax out of memory, then skipped."""
    rng = np.random.default_rng(0)
    rows = [ops_row(*key, p, n, rng) for n in LENGTHS for key in COSTS for p in PASS_FACTOR]
    decoders = [("lightning", "triton"), ("lightning", "cuda"), ("softmax", "sdpa")]
    return rows + [decode_row(*key, n, rng) for n in LENGTHS for key in decoders]


def write_run(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


WRONG = make_row(
    "lightning", "cuda", "fwd", 2**12, "failed_accuracy", key="wrong",
    reason="error 3.2 times the budget <in output>", error_rms=0.4, error_ratio=3.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return make_rows()


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory) -> Path:
    """A reported run, one of whose points is wrong."""
    right = [r for r in rows if r["key"] != "lightning-cuda-fwd-4096"]
    folder = write_run(tmp_path_factory.mktemp("runs") / "made-up", [*right, WRONG])
    (folder / "manifest.json").write_text(
        json.dumps({"argv": ["--max-len", "4M"], "ceilings": {"bfloat16": {"copy_gbps": 4321}}})
    )
    report.write_report(folder)
    return folder


def panels(rows: list[dict], name: str) -> dict:
    """Axes of a figure by title (its first line)."""
    figure = plots.make_figure(name, rows)
    return {axes.get_title().split("\n")[0]: axes for axes in figure.axes}


def artist(axes, gid: str):
    return next(line for line in axes.lines if line.get_gid() == gid)


def drawn(line) -> dict[int, float]:
    """The points of a line that are to be seen."""
    x, y = line.get_data()
    return {int(a): b for a, b in zip(x, y, strict=True) if math.isfinite(b)}


def of(rows: list[dict], op: str, backend: str, pass_name: str = "fwd", **fields) -> list[dict]:
    wanted = {"op": op, "backend": backend, "pass": pass_name} | fields
    return [row for row in rows if wanted.items() <= row.items()]


def test_all_six_figures_are_drawn_large_enough_to_read(run):
    names = {path.stem for path in (run / "figures").glob("*.png")}
    assert names == {"time", "throughput", "share", "memory", "exponent", "error"}
    for path in (run / "figures").glob("*.png"):
        pixels = imread(path)[..., :3]
        inked = (pixels.min(axis=-1) < 0.9).mean()
        assert pixels.shape[1] > 1500 and 0.01 < inked < 0.3, path.name


def test_the_page_loads_nothing_and_holds_every_figure(run):
    page = (run / "report.html").read_text()
    sources = re.findall(r'(?:src|href)\s*=\s*["\']?([^"\'\s>]*)', page)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"url\(|@import|<script|<link|https?://", page)
    embedded = {base64.b64decode(source.split(",")[1]) for source in sources}
    assert embedded == {path.read_bytes() for path in (run / "figures").glob("*.png")}


@pytest.mark.parametrize("name", ["report.html", "summary.md"])
def test_both_documents_state_exponents_and_crossovers(run, rows, name):
    text = (run / name).read_text()
    soft, light = (
        points_from_rows(of(rows, *key)) for key in (("softmax", "sdpa"), ("lightning", "triton"))
    )
    assert f"exponent of triton {asymptotic_exponent(light)}" in text
    assert f"exponent of sdpa {asymptotic_exponent(soft)}; beyond that" in text
    assert f"Crossover forward: {crossover(soft, light)} tokens" in text
    assert "copy_gbps 4321" in text


def test_exponents_of_linear_and_quadratic_costs_come_out_as_such(rows):
    text = "\n".join(findings(rows))
    found = dict(re.findall(r"(\w+) forward is measured.*?exponent of \w+ ([\d.]+)", text))
    assert float(found["Lightning"]) == pytest.approx(1, abs=0.05)
    assert float(found["Softmax"]) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("name", ["report.html", "summary.md"])
def test_a_wrong_point_is_shown_before_anything_else(run, name):
    text = (run / name).read_text()
    top = text[: text.index("Findings")]
    assert "1 of 221 points failed" in top
    assert "error 3.2 times the budget" in top


def test_a_run_without_wrong_points_has_no_alert(rows, run):
    assert report.alert(rows) == []
    assert len(report.alert([*rows, WRONG])) == 1


def test_markup_in_a_reason_is_shown_as_text(run):
    page = (run / "report.html").read_text()
    assert "&lt;in output&gt;" in page and "<in output>" not in page


def test_skipped_points_are_hollow_on_a_dashed_line_at_their_prediction(rows):
    axes = panels(rows, "time")["forward"]
    hollow = artist(axes, "predicted: softmax sdpa")
    skipped = {r["q_len"]: r["pred_ms"] for r in of(rows, "softmax", "sdpa") if r["q_len"] > 2**16}
    assert len(skipped) == 6 and drawn(hollow) == skipped
    assert hollow.get_markerfacecolor() == "none" and hollow.get_linestyle() == "None"
    dashed = artist(axes, "dashed: softmax sdpa")
    (last,) = of(rows, "softmax", "sdpa", q_len=2**16)
    assert drawn(dashed) == skipped | {2**16: last["ms_median"]}
    assert dashed.get_linestyle() == "--"


def test_measured_points_are_filled_and_joined_up_to_the_last_one_only(rows):
    line = artist(panels(rows, "time")["forward"], "measured: softmax sdpa")
    found = of(rows, "softmax", "sdpa", status="ok")
    assert drawn(line) == {row["q_len"]: row["ms_median"] for row in found}
    assert line.get_markerfacecolor() == line.get_color() and max(drawn(line)) == 2**16


def test_a_gap_in_the_measured_points_is_not_bridged(run, rows):
    holed = [r for r in rows if r["key"] != "lightning-cuda-fwd-4096"] + [WRONG]
    y = artist(panels(holed, "time")["forward"], "measured: lightning cuda").get_ydata()
    assert np.isnan(y).tolist() == [n == 2**12 for n in LENGTHS]


@pytest.mark.parametrize(("name", "field"), [("time", "pred_ms"), ("memory", "pred_bytes")])
def test_running_out_of_memory_has_a_marker_of_its_own(rows, name, field):
    axes = panels(rows, name)["forward"]
    (row,) = of(rows, "softmax", "reference", status="out_of_memory")
    cross = artist(axes, "out_of_memory: softmax reference")
    assert drawn(cross) == {2**15: row[field]}
    assert cross.get_markerfacecolor() == "none"
    assert cross.get_marker() != artist(axes, "predicted: softmax reference").get_marker()


def test_quantities_without_predictions_show_measured_points_only(rows):
    for name in ("throughput", "share", "error"):
        line = artist(panels(rows, name)["forward"], "measured: softmax sdpa")
        assert max(drawn(line)) == 2**16
        hollow = artist(panels(rows, name)["forward"], "predicted: softmax sdpa")
        assert drawn(hollow) == {}


def test_a_failed_point_is_marked_in_the_figure_of_errors(rows):
    axes = panels([*rows, WRONG], "error")["forward"]
    assert drawn(artist(axes, "failed: lightning cuda")) == {2**12: 0.4}


def test_exponents_are_drawn_octave_by_octave_with_lines_at_one_and_two(rows):
    axes = panels(rows, "exponent")["forward"]
    points = points_from_rows(of(rows, "softmax", "sdpa"))
    slopes = local_slopes([p.q_len for p in points], [p.ms_median for p in points])
    line = artist(axes, "measured: softmax sdpa")
    assert line.get_ydata() == pytest.approx([slope.value for slope in slopes])
    level = {line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1}
    assert {1, 2} <= level


def test_the_crossover_is_marked_where_the_fit_puts_it(rows):
    axes = panels(rows, "time")
    soft, light = (
        points_from_rows(of(rows, *key)) for key in (("softmax", "sdpa"), ("lightning", "triton"))
    )
    where = crossover(soft, light)
    assert any(set(line.get_xdata()) == {where.value} for line in axes["forward"].lines)
    assert f"at {where}" in axes["forward"].texts[0].get_text()
    assert not axes["decode step"].texts  # no crossover there: lightning is always faster


def two_lines(rows):
    return of(rows, "softmax", "sdpa") + of(rows, "lightning", "triton")


def test_a_crossover_of_one_implementation_names_the_stacks(rows):
    texts = []
    for backend in ("attnlab", None):
        changed = [row | {"backend": backend or row["backend"]} for row in two_lines(rows)]
        texts.append(panels(changed, "time")["forward"].texts[0].get_text().splitlines()[0])
    assert texts == ["softmax = lightning", "sdpa = triton"]


def test_lengths_are_written_in_powers_of_two(rows):
    axis = panels(rows, "time")["forward"].xaxis
    labels = [axis.get_major_formatter()(x, None) for x in axis.get_ticklocs()]
    assert labels == ["4M", "1M", "256K", "64K", "16K", "4K", "1K"]


def test_every_known_series_can_be_told_apart_without_colour():
    markers = [marker for _, marker in plots.LOOKS.values()]
    assert len(set(markers)) == len(markers)
    crosses = {own for own, _ in plots.NOTES.values() if own}
    assert crosses.isdisjoint(markers) and crosses.isdisjoint(plots.OTHER_MARKERS)


def test_an_unknown_backend_is_drawn_too(rows):
    other = [row | {"backend": "novel"} for row in of(rows, "lightning", "triton")]
    axes = panels(rows + other, "time")["forward"]
    line = artist(axes, "measured: lightning novel")
    assert len(drawn(line)) == 13
    assert line.get_marker() != artist(axes, "measured: lightning triton").get_marker()


def test_a_figure_without_data_is_not_written(rows, tmp_path):
    few = [row | {"error_rms": None, "share_of_limit": None} for row in rows if row["q_len"] < 2048]
    paths = plots.write_figures(few, tmp_path)
    assert {path.name for path in paths} == {"time.png", "throughput.png", "memory.png"}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}


def test_another_shape_gets_its_own_figures_and_another_suite_none(rows, tmp_path):
    few = [row for row in of(rows, "lightning", "triton") if row["q_len"] < 8192]
    small = [row | {"heads": 4, "error_rms": None} for row in few[:2]]
    probe = [row | {"suite": "probe", "dtype": "float32"} for row in few]
    paths = plots.write_figures(few + small + probe, tmp_path)
    assert {path.name for path in paths if "time" in path.name} == {"time.png", "time-2.png"}
    assert tmp_path / "error-2.png" not in paths


def test_lightning_at_another_precision_shares_the_figures_of_softmax(rows):
    high = [row | {"precision": "high"} if row["op"] == "lightning" else row for row in rows]
    (group,) = by_configuration(high)
    assert crossover_table(group).rows == crossover_table(rows).rows


def test_series_that_differ_in_one_field_only_are_named_by_it(rows):
    few = of(rows, "lightning", "triton")
    both = few + [row | {"layer": "40/80"} for row in few]
    names = [line.name for line in lines_of(both, "fwd")]
    assert names == ["lightning triton, layer 0/80", "lightning triton, layer 40/80"]


def test_times_that_were_not_measured_stand_in_the_table_as_predictions(rows):
    table = time_table(lines_of(rows, "fwd"))
    cells = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert re.fullmatch(r"\*~[\d.]+ s\*", cells["4M"]["softmax sdpa"])
    assert re.fullmatch(r"[\d.]+ ms", cells["4M"]["lightning triton"])
    assert cells["32K"]["softmax reference"] == "out of memory"
    short = [row for row in rows if row["op"] == "lightning" or row["q_len"] < 2**17]
    assert time_table(lines_of(short, "fwd")).rows[-1][-1] == "—"


def test_predictions_are_italic_on_the_page(run):
    assert re.search(r"<td><em>~[\d.]+ s</em></td>", (run / "report.html").read_text())


def test_equal_peaks_of_memory_have_no_crossover(rows):
    found = {tuple(row[:2]): row[4] for row in crossover_table(rows).rows}
    assert found["peak memory", "forward"] == "none: equal within 1 %"
    assert found["peak memory", "decode step"] == "< 1K"


def test_the_exports_have_every_row(run):
    stored = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    with (run / "rows.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["key"] for row in table] == [row["key"] for row in stored]
    assert json.loads(table[0]["samples"]) == stored[0]["samples"]
    parquet = pytest.importorskip("pyarrow.parquet")
    assert parquet.read_table(run / "rows.parquet").num_rows == len(stored)


def test_without_pyarrow_the_rest_is_written_and_a_notice_is_given(
    rows, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    report.export(rows, tmp_path)
    assert (tmp_path / "rows.csv").exists() and not (tmp_path / "rows.parquet").exists()
    assert "pyarrow is not installed" in capsys.readouterr().err


def test_a_point_measured_again_from_new_sources_replaces_the_wrong_one(rows, tmp_path):
    again = make_row("lightning", "cuda", "fwd", 2**12, fingerprint="new", key="new")
    folder = write_run(tmp_path, [WRONG, again | {"ms_median": 1.0, "samples": [1.0]}])
    report.write_report(folder)
    assert "failed" not in (folder / "summary.md").read_text().split("Findings")[0]
    assert len((folder / "rows.csv").read_text().splitlines()) == 3


def test_points_that_were_all_skipped_make_a_report_without_findings(tmp_path):
    skipped = make_row(
        "softmax", "sdpa", "fwd", 2**22, "skipped_memory", reason="70 TB", pred_ms=9e6
    )
    report.write_report(write_run(tmp_path, [skipped]))
    text = (tmp_path / "summary.md").read_text()
    assert "*~9000 s*" in text and "70 TB" in text


def test_no_rows_are_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"expected at least one row in .*rows\.jsonl, got none"):
        report.write_report(write_run(tmp_path, []))


def test_a_bad_folder_ends_with_one_line_and_exit_code_two(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "report.py"), str(tmp_path / "missing")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "missing" in done.stderr


def test_importing_the_plots_chooses_no_backend():
    code = "import sys, bench.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
