"""The runs on a GPU without one: what is timed, what the tables show, what the checks keep."""

import json
from dataclasses import replace

import pytest

from attnlab import registry
from bench import calls, gpu_checks, h200, peers, roofline, rows
from bench.peers import CUDA_KERNELS, PEERS

LINES = {line.name: line for line in h200.LINES}
FORWARD = LINES["8x16x8K.d128.fwd"]
HIGH = LINES["1x64x64K.d128.high.fwd"]


def backends_of(line, *only):
    points = h200.points_of(line, "a GPU")
    return [p.backend for p in points if h200._selected(p, list(only))]


def test_a_line_is_timed_for_all_backends_and_for_kernels_that_are_named():
    assert backends_of(FORWARD) == [b for of_op in PEERS.values() for b in of_op]
    assert backends_of(FORWARD, "cuda-hopper", "triton") == ["triton", "cuda-hopper"]
    assert backends_of(FORWARD, "8x16x8K", *CUDA_KERNELS) == list(CUDA_KERNELS)
    assert backends_of(HIGH) == ["triton", "cuda"]
    assert backends_of(LINES["256x64x512.d128.decode"]) == ["triton", "cuda", "fla"]


def test_a_peer_says_what_it_lacks(monkeypatch):
    point = next(p for p in h200.points_of(FORWARD, "a GPU") if p.backend == "lightning_attn2")
    problem = calls.problem_of(point, "cuda")
    for found, changes, reason in (
        (None, {}, "needs the package lightning-attn"),
        ("found", {"precision": "high"}, "needs 16-bit inputs"),
        ("found", {"key_dim": 256}, "more than 128 channels"),
        ("found", {}, None),
    ):
        monkeypatch.setattr(peers, "find_spec", lambda name, found=found: found)
        said = registry.why_not(problem.op, "lightning_attn2", replace(problem, **changes))
        assert said == reason if reason is None else reason in said


def written(path, measured):
    point = next(h200.points_of(FORWARD, "a GPU"))
    origin = rows.Origin(run_id="run", commit="abc", versions={})
    for (op, backend), fields in measured.items():
        row = origin.row(replace(point, op=op, backend=backend), "f", fields)
        rows.append_row(path, row)
    return path


def timed(ms):
    return {"status": "ok", "ms_median": ms, "share_of_limit": 0.25 / ms}


def test_the_readmes_table_has_columns_of_backends_that_were_measured(tmp_path):
    measured = {
        ("lightning", "triton"): timed(0.27),
        ("softmax", "cudnn"): timed(3.5),
        ("lightning", "lightning_attn2"): {"status": "failed_accuracy", "reason": "wrong"},
        ("lightning", "cuda-hopper"): timed(0.2),
    }
    path = written(tmp_path / "rows.jsonl", measured)
    header, _, line = h200.readme_table(path).splitlines()
    assert header == ("| B, H, T, D | pass | triton | of the floor | lightning_attn2 | cudnn |")
    assert line == "| 8, 16, 8K, 128 | fwd | 0.27 ms | 93% | failed accuracy | 3.5 ms |"
    written(path, {("lightning", "cuda"): timed(0.26)})
    header, _, line = h200.readme_table(path).splitlines()
    assert "| of the floor | cuda | of the floor | lightning_attn2 |" in header
    assert "| 93% | 0.26 ms | 96% | failed accuracy |" in line


def test_sustained_times_have_a_table_of_their_own(tmp_path):
    long = timed(0.27) | {"ms_sustained": 0.5, "floor_ms": 0.25}
    measured = {("lightning", "triton"): long, ("lightning", "cuda"): timed(0.26)}
    header, _, line = h200.readme_table(
        written(tmp_path / "rows.jsonl", measured), "ms_sustained"
    ).splitlines()
    assert header == "| B, H, T, D | pass | triton | of the floor |"
    assert line == "| 8, 16, 8K, 128 | fwd | 0.5 ms | 50% |"


def test_the_verdict_is_given_for_each_of_our_kernels(tmp_path, capsys):
    measured = {("lightning", "triton"): timed(0.27), ("lightning", "cuda-portable"): timed(0.5)}
    h200.print_table(written(tmp_path / "rows.jsonl", measured), [FORWARD])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert ["holds" in lines[0], "MISSED" in lines[1]] == [True, True]
    assert lines[1].split()[-1] == "cuda-portable" and len(lines) == 2


def test_checks_of_one_backend_leave_those_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu_checks, "_run_matrix", lambda backend, budget_s: {"tests": 1})
    monkeypatch.setattr(gpu_checks.shutil, "which", lambda name: __file__)
    monkeypatch.setattr(gpu_checks, "_outcome", lambda command, budget_s, told: {"ran": command[2]})
    gpu_checks.run_checks(tmp_path, 1.0, ("cuda",))
    gpu_checks.run_checks(tmp_path, 1.0, ("triton",))
    found = json.loads((tmp_path / "checks.json").read_text())
    assert list(found) == ["cuda", "triton"]
    assert found["cuda"]["synccheck"] == {"ran": "synccheck"} and "synccheck" not in found["triton"]


@pytest.mark.parametrize("backend", gpu_checks.BACKENDS)
def test_a_backends_tests_are_those_of_its_file_and_its_matrix(backend):
    runs = gpu_checks.runs_of_tests(backend)
    assert runs[0] == ["-k", backend, "tests/test_backends.py", f"tests/test_{backend}.py"]
    assert sum("tests.cuda_on_host" in run for run in runs) == (2 if backend == "cuda" else 0)
    assert any("--hopper" in run for run in runs) == (backend == "cuda")


NCU = """==PROF== Connected to process 12
"ID","Kernel Name","Grid Size","dram__throughput.avg.pct","gpu__time_duration.sum"
"","","","%","ns"
"0","hopper_scan","(132, 1, 1)","91.25","1,050,000"
==PROF== Disconnected
"""


def test_figures_are_read_from_what_the_profiler_prints():
    counters = {"dram": "dram__throughput.avg.pct", "ns": "gpu__time_duration.sum", "l2": "lts"}
    expected = {"kernel": "hopper_scan", "grid": "(132, 1, 1)", "dram": 91.25, "ns": 1.05e6}
    assert roofline.figures_of(NCU, counters) == [expected]
    assert roofline.figures_of("==ERROR== no permission", counters) == []
