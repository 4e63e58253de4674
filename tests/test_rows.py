import json
import os
from dataclasses import replace

import pytest

from bench.rows import Point, append_row, load_rows, mend_last_line

POINT = Point(
    suite="ops",
    op="lightning",
    backend="torch",
    pass_="fwd",
    batch=1,
    heads=1,
    kv_heads=1,
    q_len=1024,
    head_dim=64,
    value_dim=64,
    dtype="float32",
    device="cpu",
    layer="0/80",
    precision="default",
    input="text",
)


def row(key, **fields):
    return {"key": key, "op": "lightning", "status": "ok"} | fields


def test_what_is_appended_is_loaded(tmp_path):
    file = tmp_path / "rows.jsonl"
    for n in range(3):
        append_row(file, row(f"k{n}", ms_median=float(n)))
    assert [r["ms_median"] for r in load_rows(file)] == [0.0, 1.0, 2.0]


def test_the_last_row_of_a_key_wins_in_its_first_place(tmp_path):
    file = tmp_path / "rows.jsonl"
    for key, ms in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        append_row(file, row(key, ms_median=ms))
    assert [(r["key"], r["ms_median"]) for r in load_rows(file)] == [("a", 3.0), ("b", 2.0)]


def test_a_half_written_last_line_is_dropped_with_a_notice(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    append_row(file, row("a"))
    with file.open("a") as f:
        f.write('{"key": "b", "op": "li')
    assert [r["key"] for r in load_rows(file)] == ["a"]
    assert "dropped a half-written last line" in capsys.readouterr().err
    mend_last_line(file)
    append_row(file, row("c"))
    assert [r["key"] for r in load_rows(file)] == ["a", "c"]


def test_any_other_broken_line_is_an_error(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"key": "a"\n' + json.dumps(row("b")) + "\n")
    with pytest.raises(ValueError, match=r"expected a JSON row in .* got line 1"):
        load_rows(file)
    file.write_text('["a"]\n')
    with pytest.raises(ValueError, match="expected a row with key, status and op"):
        load_rows(file)
    with pytest.raises(ValueError, match="expected a readable results file"):
        load_rows(tmp_path / "none.jsonl")


def test_nan_is_refused_before_it_reaches_the_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="JSON compliant"):
        append_row(file, row("a", ms_median=float("nan")))
    assert not file.exists()


def test_a_row_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    append_row(tmp_path / "rows.jsonl", row("a"))
    assert synced == [(tmp_path / "rows.jsonl").stat().st_size]


def test_the_key_tells_points_and_sources_apart():
    assert POINT.key("f") == replace(POINT).key("f")
    assert POINT.key("f") != POINT.key("g")
    assert POINT.key("f") != replace(POINT, pass_="bwd").key("f")
    assert POINT.fields()["pass"] == "fwd"
