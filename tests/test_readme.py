"""The README is true: its example runs, its table is the sample's, its files exist."""

import re
from pathlib import Path

import pytest

from bench import h200
from bench.findings import readme_table
from bench.lines import latest
from bench.model_table import readme_table as model_table
from bench.rows import load_rows

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_the_example_runs():
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
    names = {}
    exec(code, names)
    assert names["output"].shape == (1, 4, 1000, 64)
    assert names["query"].grad is not None and names["step"].shape == (1, 4, 1, 64)


def test_the_result_table_is_that_of_the_committed_rows():
    rows = latest(load_rows(ROOT / "results" / "sample" / "rows.jsonl"))
    assert readme_table(rows) in TEXT
    assert h200.readme_table(ROOT / "results" / "h200" / "rows.jsonl") in TEXT
    assert model_table(load_rows(ROOT / "results" / "h200" / "model" / "rows.jsonl"), "1b") in TEXT


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
