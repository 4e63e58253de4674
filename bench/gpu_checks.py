"""Are the kernels of our backends right on this GPU? The correctness matrix, then the compute sanitizer.

    python bench/gpu_checks.py FOLDER [--backends triton,cuda] [--budget 540]

writes `checks.json` there, with what it said before of backends that are not asked for.
`--small-calls BACKEND` makes the calls that the sanitizer watches.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import rows  # noqa: E402
from bench.rows import Row  # noqa: E402

BACKENDS = ("triton", "cuda")
# Barriers that a kernel names itself are synccheck's business; Triton generates its own.
SANITIZERS = {"triton": ("memcheck", "racecheck"), "cuda": ("memcheck", "racecheck", "synccheck")}
# What a sanitizer's lines tell: sums, the kinds of errors, and where in a Triton kernel they are (a
# warp-specialised kernel's `def` and its `warp_specialize` are the two ends of the hand-off of work to
# its warps, which Triton generates).
TOLD = r"[A-Z]+ SUMMARY.*|(?<= in )\w+\.py:\d+|(?<=^========= )(?:Error|Invalid|Barrier error).*"


def run_checks(folder: Path, budget_s: float, backends: tuple[str, ...] = BACKENDS) -> None:
    """Correctness matrices and sanitizers on this GPU; their outcome goes to `checks.json`."""
    path = folder / "checks.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for backend in backends:
        found[backend] = {"device": torch.cuda.get_device_name(), "ts_utc": rows.now_utc()}
        found[backend]["matrix"] = _run_matrix(backend, budget_s)
        rows.write_json(path, found)
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        for check in SANITIZERS[backend] if Path(tool).exists() else ():
            command = [tool, "--tool", check, sys.executable, __file__, "--small-calls", backend]
            found[backend][check] = _outcome(command, budget_s, TOLD)
            rows.write_json(path, found)
        print(json.dumps(found[backend], indent=1), flush=True)


def runs_of_tests(backend: str) -> list[list[str]]:
    """Arguments of pytest for all tests of a backend: of cuda's portable kernels and wide tiles too."""
    matrix = ["-k", backend, "tests/test_backends.py"]
    runs = [[*matrix, f"tests/test_{backend}.py"]]
    if backend == "cuda":
        runs += [["-p", "tests.cuda_on_host", *flag, *matrix] for flag in ([], ["--hopper"])]
    return runs


def _run_matrix(backend: str, budget_s: float) -> Row:
    """Tests of a backend, dealt out to processes since most of their time is compilation."""
    # Without the project's own options, which want plugins that a GPU machine may lack.
    pytest = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    commands, total, count = [], 0, max(1, min(12, os.cpu_count() or 1))
    for arguments in runs_of_tests(backend):
        listing = [*pytest, "--collect-only", *arguments]
        listed = subprocess.run(listing, capture_output=True, text=True, cwd=ROOT, check=False)
        tests = [line for line in listed.stdout.splitlines() if "::" in line]
        if not tests:
            return {"code": listed.returncode, "tail": (listed.stdout + listed.stderr)[-1500:]}
        plugin = arguments[: arguments.index("-k")]
        commands += [[*pytest, *plugin, *tests[n::count]] for n in range(min(count, len(tests)))]
        total += len(tests)
    with ThreadPoolExecutor(count) as pool:
        counts = r"\d+ \w+(?=(?:,.*)? in [\d.]+s)"
        parts = list(pool.map(lambda c: _outcome(c, budget_s, counts), commands))
    totals: Counter[str] = Counter()
    for number, word in (x.split() for part in parts for x in part["summary"]):
        totals[word] += int(number)
    failures = [part["tail"] for part in parts if part["code"] != 0]
    seconds = max(part["seconds"] for part in parts)
    return {"tests": total, "totals": totals, "seconds": seconds, "failures": failures}


def _outcome(command: list[str], budget_s: float, pattern: str) -> Row:
    start = time.perf_counter()
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=budget_s, cwd=ROOT)
        code, text = run.returncode, run.stdout + run.stderr
    except subprocess.TimeoutExpired as error:
        code, text = None, (error.stdout or b"").decode()
    return {
        "code": code,
        "summary": list(dict.fromkeys(re.findall(pattern, text, re.M))),
        "seconds": round(time.perf_counter() - start, 1),
        "tail": text[-1500:] if code != 0 else None,
    }


def variants_of(backend: str) -> list[Callable[[], AbstractContextManager]]:
    """Contexts in which a backend's calls run each of its scan kernels."""
    if backend != "cuda":
        return [contextlib.nullcontext]
    from kernels_cuda import lightning

    choices = (False, True) if torch.cuda.get_device_capability()[0] == 9 else (False,)
    return [lambda choice=choice: lightning.hopper_kernels(choice) for choice in choices]


def small_calls(backend: str, device: str = "cuda") -> None:
    """Calls of odd sizes of all kernels, forward and backward, for the sanitizer to look at."""
    import attnlab
    from attnlab.schedules import forced_plan

    g = torch.tensor([-0.3, -0.05], device=device)
    flags = {"backend": backend, "return_final_state": True}

    def tensors(*dims: int) -> list[torch.Tensor]:
        shapes = [(1, 2, 333, d) for d in (dims[0], *dims)]
        made = [torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes]
        return [x.requires_grad_() for x in made]

    for variant in variants_of(backend):
        for dims, mode in itertools.product(
            ((64, 64), (128, 128), (64, 128)), ("single", "halo", "two-pass")
        ):
            inputs, state = tensors(*dims), torch.randn(1, 2, *dims, device=device)
            with variant(), forced_plan(mode, 3):
                results = attnlab.lightning_attention(*inputs, g, initial_state=state, **flags)
                sum(x.sum() for x in results).backward()
        bounds = torch.tensor([0, 100, 100, 333], device=device)
        with variant():
            inputs = tensors(128, 128)
            packed = attnlab.lightning_attention_varlen(*inputs, g, bounds, **flags)
            high = attnlab.lightning_attention(*inputs, g, precision="high", **flags)
            (packed.output + high.output).sum().backward()
    step = [x.detach()[:, :, :1] for x in tensors(64, 64)]
    slots = torch.tensor([2], device=device)
    for width in (64, 65):  # aligned, and not
        state = torch.zeros(3, 2, 64, width, device=device)[..., :64]
        attnlab.lightning_decode_(*step, g, state, slots=slots, backend=backend)
    if device == "cuda":
        torch.cuda.synchronize()
    print("all calls are done")


def main() -> None:
    """Check, or make the calls that are checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="by comma")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for each command")
    parser.add_argument("--small-calls", choices=BACKENDS, help="make a backend's calls alone")
    arguments = parser.parse_args()
    if arguments.small_calls:
        small_calls(arguments.small_calls)
        return
    if arguments.folder is None:
        parser.error("expected a folder")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    run_checks(arguments.folder, arguments.budget, tuple(arguments.backends.split(",")))


if __name__ == "__main__":
    main()
