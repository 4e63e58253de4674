"""The README is true: its example runs, its table is the sample's, its files exist."""

import re
from pathlib import Path

import pytest

from bench import claims, h200
from bench.findings import readme_table
from bench.lines import latest
from bench.model_table import parts_table
from bench.model_table import readme_table as model_table
from bench.rows import load_rows
from bench.training_figure import read_runs, table
from bench.virtual import run_in_virtual_time

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_the_example_runs():
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
    names = {}
    exec(code, names)
    assert names["output"].shape == (1, 4, 1000, 64)
    assert names["query"].grad is not None and names["step"].shape == (1, 4, 1, 64)


def test_the_result_tables_are_those_of_the_committed_rows():
    results = ROOT / "results"
    assert readme_table(latest(load_rows(results / "sample" / "rows.jsonl"))) in TEXT
    for time_of in ("ms_median", "ms_sustained"):
        assert h200.readme_table(results / "h200" / "rows.jsonl", time_of) in TEXT
    assert model_table(load_rows(results / "h200" / "model" / "rows.jsonl"), "1b") in TEXT
    assert parts_table(load_rows(results / "h100" / "model" / "rows.jsonl"), "hybrid-1b") in TEXT
    assert table(read_runs(results / "h100" / "training")) in TEXT


def test_the_table_of_claims_is_what_notebook_05_computes():
    runs = run_in_virtual_time((claims.LONG,), (2,))
    assert claims.table(claims.readme_claims(runs)) + "\n\n" in TEXT


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!https?:)[^)]+)\)", TEXT))
def test_every_linked_file_exists(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", TEXT, re.M))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def test_every_file_of_the_map_exists():
    section = TEXT.split("## Map")[1].split("```")[1]
    for name in re.findall(r"(\w+\.py)", section):
        assert list(ROOT.glob(f"*/{name}")), name
