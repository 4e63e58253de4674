"""The sweep on ranks: its rows beside those of one process, and a gate that sees planted defects."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_runs import run_gate, run_measure

from bench import plan, ranks, sweep
from bench.lines import fastest, latest, lines_of
from bench.rows import Origin, Point, append_row, load_rows

ROOT = Path(__file__).resolve().parent.parent


def point(op, **changes):
    given = {
        **{
            "suite": "ops",
            "op": op,
            "backend": "lasp+",
            "pass_": "fwd+bwd",
            "batch": 1,
            "heads": 4,
        },
        **{"kv_heads": 2 if op == "softmax" else 4, "q_len": 500, "head_dim": 32, "value_dim": 32},
        **{"dtype": "float32", "device": "cpu", "layer": "79/80", "precision": "default"},
        **{"input": "text", "ranks": 4},
    }
    return Point(**given | changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["lightning", "softmax"])
def test_every_rank_s_part_passes_the_gate(op, dtype, worlds):
    for name, ratio in worlds(4).call(run_gate, point(op, dtype=dtype)):
        assert ratio <= 1, name
    assert all(ratio <= 1 for _, ratio in worlds(4).call(run_gate, point(op, pass_="fwd")))


@pytest.mark.parametrize(
    "op, mutation, names",
    [
        ("lightning", "hops beyond the neighbour dropped", {"output", "grad_query"}),
        ("lightning", "A instead of its transpose", {"grad_key", "grad_value"}),
        ("softmax", "gradients of keys not returned", {"grad_key", "grad_value"}),
        ("softmax", "parts merged without rescaling", {"output"}),
    ],
)
def test_the_gate_sees_a_planted_defect(op, mutation, names, worlds):
    found = worlds(4).call(run_gate, point(op), mutation=mutation)
    assert max(ratio for _, ratio in found) > 10
    assert {name for name, ratio in found if ratio > 1} & names


def test_the_slowest_rank_s_time_counts_on_all_ranks(worlds):
    times = worlds(4).call(run_measure, 0.02)
    assert all(samples == times[0] for samples in times)
    assert len(times[0]) >= 10 and min(times[0]) > 20  # milliseconds: that of rank 3


@pytest.mark.parametrize(
    "options, message",
    [
        (["--batch", "2"], "expected --batch 1 on ranks, got 2"),
        (["--min-len", "4"], "expected --min-len of at least 8, got 4"),
        (["--ops", "linear"], "expected ops among lightning, softmax"),
    ],
)
def test_what_ranks_can_not_measure_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ranks.points_of(sweep.parse_arguments(["--device", "cpu", *options]), "cpu", 4)


def test_a_sweep_on_ranks_has_rows_of_ranks_beside_those_of_one_process(tmp_path):
    out = tmp_path / "run"
    words = "--device cpu --suites ops --min-len 256 --max-len 256 --passes fwd,fwd+bwd"
    options = [*words.split(), "--budget", "900", "--backends", "torch,sdpa"]
    earlier = earlier_row(out, options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / "bench" / "sweep.py"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    flags = {"capture_output": True, "text": True, "env": environment, "timeout": 280}
    result = subprocess.run([*command, "--out", str(out), "--resume"], **flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("report:") == 1
    found = load_rows(out / "rows.jsonl")
    assert len(found) == 8 and found[0] == earlier  # which is not measured again
    spread = {(r["op"], r["backend"], r["pass"]): r for r in found if r.get("ranks")}
    ops = ("lightning", "lasp+"), ("softmax", "ring")
    assert set(spread) == {(*names, pass_) for names in ops for pass_ in ("fwd", "fwd+bwd")}
    for row in spread.values():
        assert row["status"] == "ok" and row["ranks"] == 2
        if row is not found[0]:
            assert 0 < row["error_ratio"] <= 1 and row["floor_ms"] > 0
            assert row["peak_bytes"] > 0 and row["timer"] == "wall"
    lines = lines_of(latest(found), "fwd")
    names = ["lightning torch", "lightning lasp+, 2 ranks", "softmax sdpa", "softmax ring, 2 ranks"]
    assert [line.name for line in lines] == names
    assert fastest(lines, "lightning").backend == "torch"  # of one process
    assert "lasp+, 2 ranks" in (out / "report.html").read_text()


def earlier_row(out, options):
    """A point that an earlier run has measured."""
    out.mkdir()
    ((first, *_),) = ranks.points_of(sweep.parse_arguments(options), "cpu", 2)
    origin = Origin(run_id="run", commit=None, versions={})
    outcome = {"status": "ok", "reason": None, "ms_median": 5.0, "samples": [5.0], "point_s": 1.0}
    row = origin.row(first, plan.fingerprint(first.backend), outcome)
    append_row(out / "rows.jsonl", row)
    return row
