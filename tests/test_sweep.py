"""The sweep as a user runs it: bad input, a short run, kills and resumes, Ctrl-C, its report."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import sweep as sweep_module
from bench.rows import load_rows

ROOT = Path(__file__).resolve().parent.parent
SHORT = [
    "--suites",
    "ops",
    "--min-len",
    "256",
    "--max-len",
    "1K",
    "--budget",
    "600",
    "--point-budget",
    "0.1",
]
# The sweep with short measurements of the machine's limits, for tests that look at no rates.
QUICK = """
import sys
from bench.sweep import execute, parse_arguments, plan_points
if __name__ == "__main__":
    sys.exit(execute(parse_arguments(sys.argv[1:]), plan_points, ceiling_rounds=1))
"""


def quick(*options):
    return [sys.executable, "-c", QUICK, "--device", "cpu", *map(str, options)]


def sweep(*options):
    script = str(ROOT / "bench" / "sweep.py")
    command = [sys.executable, script, "--device", "cpu", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def refused(monkeypatch, capsys):
    """A function that runs the command in this process, and gives the line by which it refused."""

    def measure(*arguments):
        raise AssertionError("bad input is measured")

    monkeypatch.setattr(sweep_module, "Worker", measure)

    def run(*options):
        assert sweep_module.main(["--device", "cpu", *map(str, options)]) == 2
        output, errors = capsys.readouterr()
        assert output == "" and len(errors.strip().splitlines()) == 1
        return errors

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a short, undisturbed run."""
    folder = tmp_path_factory.mktemp("sweep") / "run"
    result = sweep(*SHORT, "--out", folder)
    assert result.returncode == 0, result.stderr
    return folder


def keys(folder):
    return {row["key"] for row in load_rows(folder / "rows.jsonl")}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--max-len", "4G"], "expected a length such as 64K, 4M or 1048576, got '4G'"),
        (["--ops", "linear"], "expected ops among lightning, softmax, got 'linear'"),
        (["--passes", "back"], "expected passes among fwd, bwd, fwd+bwd, decode, got 'back'"),
        (["--backends", "tritn"], "expected a backend among"),
        (["--heads", "0"], "expected --heads > 0, got 0"),
        (["--heads", "4", "--kv-heads", "3"], "expected --kv-heads that divides 4, got 3"),
        (["--layer", "80/80"], "expected 0 <= layer < num_layers = 80, got layer = 80"),
        (["--corpus", "/nowhere/at/all"], "expected a readable corpus, got /nowhere/at/all"),
        (["--corpus", __file__, "--max-len", "1M"], "expected a corpus of at least 1048576 bytes"),
        (["--out", "/proc/attnlab"], "expected a writable folder, got /proc/attnlab"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_bad_input_ends_with_one_line_and_code_2(options, message, refused, tmp_path):
    defaults = [] if "--out" in options else ["--out", tmp_path / "run"]
    assert message in refused(*defaults, *options)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_rows_needs_resume(finished):
    result = sweep(*SHORT, "--out", finished)
    assert result.returncode == 2 and "expected an empty folder or --resume" in result.stderr
    assert result.stdout == "" and len(result.stderr.strip().splitlines()) == 1


def test_a_corrupt_results_file_is_refused(refused, tmp_path):
    (tmp_path / "rows.jsonl").write_text("not json\n{}\n")
    assert "got line 1: 'not json'" in refused(*SHORT, "--out", tmp_path, "--resume")


def test_a_short_run_leaves_rows_a_manifest_and_a_report(finished):
    rows = load_rows(finished / "rows.jsonl")
    measured = [row for row in rows if row["status"] == "ok"]
    assert {(r["op"], r["backend"], r["pass"]) for r in measured} == {
        (op, backend, pass_)
        for op, backends in {"lightning": ["torch"], "softmax": ["sdpa", "reference"]}.items()
        for backend in backends
        for pass_ in ("fwd", "fwd+bwd", "decode")
    }
    for row in measured:
        assert row["ms_q1"] <= row["ms_median"] <= row["ms_q3"]
        assert 0 < row["error_ratio"] <= 1 and row["peak_bytes"] > 0
        assert row["share_of_limit"] == pytest.approx(row["floor_ms"] / row["ms_median"])
        assert row["input"] == "text" and row["versions"]["torch"] and row["ceilings"]
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["finished"] and manifest["settings"]["max_len"] == "1K"
    for name in ("report.html", "summary.md", "rows.csv", "figures/time.png"):
        assert (finished / name).stat().st_size > 0


def test_a_row_says_where_it_comes_from(finished):
    rows = load_rows(finished / "rows.jsonl")
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    assert {row["run_id"] for row in rows} == {finished.name}
    assert {(row["commit"] or "").removesuffix("-dirty") for row in rows} == {head}
    started = json.loads((finished / "manifest.json").read_text())["started"]
    assert all(row["ts_utc"] >= started for row in rows)


def test_documented_fields_are_those_of_a_row(finished):
    row = next(r for r in load_rows(finished / "rows.jsonl") if r["status"] == "ok")
    text = (ROOT / "results" / "README.md").read_text()
    undocumented = [name for name in row if f"`{name}`" not in text]
    assert undocumented == []


def test_two_kills_lose_no_point(finished, tmp_path):
    """Killed with -9 at two random moments and resumed, a run has the keys of an undisturbed one."""
    folder, wait = tmp_path / "run", random.Random(0)
    resumed = quick(*SHORT, "--ops", "softmax", "--out", folder, "--resume")
    for _ in range(2):
        before = len(keys(folder)) if (folder / "rows.jsonl").exists() else 0
        process = subprocess.Popen(resumed, stdout=subprocess.DEVNULL, cwd=ROOT)
        target = before + wait.randint(3, 6)
        while process.poll() is None and (
            not (folder / "rows.jsonl").exists()
            or len((folder / "rows.jsonl").read_bytes().splitlines()) < target
        ):
            time.sleep(0.02)
        time.sleep(wait.random() / 5)
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.wait()
        assert len(keys(folder)) >= target
        with (folder / "rows.jsonl").open("a") as file:
            file.write('{"key": "half')
    survived = {r["key"]: r for r in load_rows(folder / "rows.jsonl")}
    subprocess.run(resumed, stdout=subprocess.DEVNULL, cwd=ROOT, check=True)
    undisturbed = {r["key"] for r in load_rows(finished / "rows.jsonl") if r["op"] == "softmax"}
    assert keys(folder) == undisturbed and len(undisturbed) == 18
    final = {r["key"]: r for r in load_rows(folder / "rows.jsonl")}
    kept = [k for k, r in survived.items() if r["status"] == "ok" and final[k] == r]
    assert len(kept) == len([r for r in survived.values() if r["status"] == "ok"])


def test_ctrl_c_finishes_the_row_and_the_report(tmp_path):
    command = quick(*SHORT, "--ops", "lightning", "--out", tmp_path / "run")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert "ms" in process.stdout.readline()
    os.kill(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "report:" in rest
    assert (tmp_path / "run" / "report.html").exists()
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["finished"] is None


def test_what_does_not_fit_is_a_row_with_a_prediction(tmp_path):
    options = [
        "--suites",
        "ops",
        "--min-len",
        "256",
        "--max-len",
        "1M",
        "--ops",
        "softmax",
        "--passes",
        "fwd",
    ]
    command = quick(*options, "--budget", "60", "--point-budget", "0.5", "--out", tmp_path / "run")
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    rows = load_rows(tmp_path / "run" / "rows.jsonl")
    assert len(rows) == 2 * 13
    naive = {r["q_len"]: r for r in rows if r["backend"] == "reference"}
    assert naive[256]["status"] == "ok"
    assert naive[1 << 20]["status"] == "skipped_memory" and naive[1 << 20]["pred_bytes"] > 1 << 40
    skipped = [r for r in rows if r["status"] == "skipped_budget"]
    assert skipped and all(r["pred_ms"] > 0 and r["reason"] for r in skipped)
    assert all("ms_median" not in r for r in skipped)


@pytest.mark.parametrize(
    ("how", "status"), [(signal.SIGKILL, "out_of_memory"), (signal.SIGTERM, "error")], ids=str
)
def test_a_worker_that_dies_costs_one_row(how, status):
    from bench import worker

    one = worker.Worker()
    one.call("free_bytes", "cpu")
    os.kill(one._process.pid, how)
    row = one.measure(None)  # a dead process reads no task
    assert row["status"] == status and f"exit code {-how:d}" in row["reason"]
    assert one.call("free_bytes", "cpu") > 0
    one.close()
