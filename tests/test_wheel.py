"""The wheel holds the three packages with their sources, works alone, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_source_file_and_no_other(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = ("attnlab", "kernels_triton", "kernels_cuda")
    tracked = subprocess.run(
        ["git", "ls-files", *packages], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(tracked) <= names
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} <= set(packages)
    for package in packages:
        assert f"{package}/py.typed" in names


def test_the_wheel_works_without_the_repository(wheel, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(wheel)!r}); import attnlab, torch;"
        "assert attnlab.__file__.startswith(sys.path[0]);"
        "x = torch.randn(1, 2, 9, 32);"
        "print(attnlab.lightning_attention(x, x, x, -torch.rand(2)).output.shape)"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", "import site; site.main(); " + code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "[1, 2, 9, 32]" in result.stdout
