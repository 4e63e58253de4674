"""Imports point down only, and importing attnlab imports no kernel package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Lower layers first; a module may import its own layer and those before it.
LAYERS = [
    ["problem", "decay"],
    ["reference", "checks", "segments", "planner"],
    ["registry", "schedules", "custom_op"],
    ["lightning_scans"],
    ["lightning_ops"],
    ["chunked", "sdpa", "fla", "triton_backend", "cuda_backend", "triton_softmax"],
    ["backends"],
    ["functional", "testing", "cache"],
    ["__init__"],
    ["model"],
    ["inference", "distributed"],
    ["training"],
    ["retrieval"],
    ["cli"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
HEAVY = (
    "rich",
    "pandas",
    "matplotlib",
    "transformers",
    "tokenizers",
    "safetensors",
    "cupy",
    "fla",
    "triton",
    "kernels_triton",
    "kernels_cuda",
)


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_name(path):
    return path.relative_to(ROOT / "attnlab").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted((ROOT / "attnlab").rglob("*.py")), ids=module_name)
def test_attnlab_imports_only_what_lies_below(path):
    own = module_name(path)
    assert own in RANK, f"give {own} a layer in this test"
    for name in imported_names(path):
        top, *rest = name.split(".")
        assert top not in ("bench", "tests", "notebooks")
        if top == "attnlab" and rest and rest[0] in RANK and rest[0] != own:
            # Backends load the implementations lazily, by name.
            lazily = own == "backends" and RANK[rest[0]] == RANK["chunked"]
            assert lazily or RANK[rest[0]] <= RANK[own], f"{own} imports {name}"


@pytest.mark.parametrize("package", ["kernels_triton", "kernels_cuda"])
def test_kernel_packages_know_nothing_of_attnlab(package):
    for path in (ROOT / package).rglob("*.py"):
        tops = {name.split(".")[0] for name in imported_names(path)}
        assert not tops & {"attnlab", "bench", "tests"}, path


def test_importing_attnlab_imports_nothing_heavy():
    code = f"import attnlab, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
