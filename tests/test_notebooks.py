"""The notebooks: each .py and its .ipynb agree, and both run from top to bottom."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
SAMPLE = ROOT / "results" / "sample"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


def run(name, cwd, **parameters):
    """The notebook with outputs; an error in any cell is raised."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    if parameters:
        (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
        cell.source = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": cwd}}).execute()
    return notebook


def pictures(notebook):
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    return [o for o in outputs if "image/png" in o.get("data", {})]


def test_there_are_five_notebooks():
    assert NAMES == [
        "01_lightning_from_scratch",
        "02_linear_versus_softmax",
        "03_retrieval_decay",
        "04_the_hybrid",
        "05_scaling_out",
    ]
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_both_files_of_a_pair_hold_the_same_cells(name):
    cells = [
        [(c.cell_type, c.source, c.metadata.get("tags")) for c in jupytext.read(path).cells]
        for path in (FOLDER / f"{name}.py", FOLDER / f"{name}.ipynb")
    ]
    assert cells[0] == cells[1], f"run: jupytext --sync notebooks/{name}.py"


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_outputs_are_small_and_free_of_errors(name):
    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < 400 * 1024
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    assert pictures(notebook)


def test_lightning_from_scratch_runs_from_the_root():
    assert len(pictures(run("01_lightning_from_scratch", ROOT))) == 5


def test_linear_versus_softmax_shows_the_sample_from_its_own_folder():
    notebook = run("02_linear_versus_softmax", FOLDER, RUN=str(SAMPLE))
    assert len(pictures(notebook)) == 6
    text = nbformat.writes(notebook)
    assert "results/sample" in text and "exponent of" in text


def test_retrieval_decay_shows_the_sample_from_its_own_folder():
    notebook = run("03_retrieval_decay", FOLDER, RUN="results/sample-recall")
    assert len(pictures(notebook)) == 8
    text = nbformat.writes(notebook)
    assert "is predicted within a factor of" in text and "hybrid-3to1 finds 90 % or more" in text


def test_the_hybrid_runs_from_the_root():
    assert len(pictures(run("04_the_hybrid", ROOT))) == 5


def test_scaling_out_runs_its_ranks_from_the_root():
    notebook = run("05_scaling_out", ROOT)
    assert len(pictures(notebook)) == 8
    assert "50% is seen with two groups" in nbformat.writes(notebook)
