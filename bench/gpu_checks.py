"""Is the Triton backend right on this GPU? The correctness matrix, then the compute sanitizer.

    python bench/gpu_checks.py FOLDER

writes `checks.json` there. `--small-calls` makes the calls that the sanitizer watches.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import rows  # noqa: E402
from bench.rows import Row  # noqa: E402


def run_checks(folder: Path, budget_s: float) -> None:
    """Correctness matrix and sanitizer on this GPU; their outcome goes to `checks.json`."""
    found = {"device": torch.cuda.get_device_name(), "ts_utc": rows.now_utc()}
    found["matrix"] = _run_matrix(budget_s)
    # The lines say where hazards are: a warp-specialised kernel's `def` and its `warp_specialize`
    # are the two ends of the hand-off of work to its warps, which Triton generates.
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    small = [sys.executable, __file__, "--small-calls"]
    for check in ("memcheck", "racecheck"):
        if Path(tool).exists():
            sanitize = [tool, "--tool", check, *small]
            found[check] = _outcome(sanitize, budget_s, r"[A-Z]+ SUMMARY.*|(?<= in )\w+\.py:\d+")
    rows.write_json(folder / "checks.json", found)
    print(json.dumps(found, indent=1), flush=True)


def _run_matrix(budget_s: float) -> Row:
    """Tests of the backend, dealt out to processes since most of their time is compilation."""
    # Without the project's own options, which want plugins that a GPU machine may lack.
    pytest = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    files = "tests/test_backends.py", "tests/test_triton.py"
    listing = [*pytest, "--collect-only", "-k", "triton", *files]
    listed = subprocess.run(listing, capture_output=True, text=True, cwd=ROOT, check=False)
    tests = [line for line in listed.stdout.splitlines() if "::" in line]
    if not tests:
        return {"code": listed.returncode, "tail": (listed.stdout + listed.stderr)[-1500:]}
    count = min(12, os.cpu_count() or 1, len(tests))
    with ThreadPoolExecutor(count) as pool:
        commands = [[*pytest, *tests[n::count]] for n in range(count)]
        counts = r"\d+ \w+(?=(?:,.*)? in [\d.]+s)"
        parts = list(pool.map(lambda c: _outcome(c, budget_s, counts), commands))
    totals: Counter[str] = Counter()
    for number, word in (x.split() for part in parts for x in part["summary"]):
        totals[word] += int(number)
    failures = [part["tail"] for part in parts if part["code"] != 0]
    seconds = max(part["seconds"] for part in parts)
    return {"tests": len(tests), "totals": totals, "seconds": seconds, "failures": failures}


def _outcome(command: list[str], budget_s: float, pattern: str) -> Row:
    start = time.perf_counter()
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=budget_s, cwd=ROOT)
        code, text = run.returncode, run.stdout + run.stderr
    except subprocess.TimeoutExpired as error:
        code, text = None, (error.stdout or b"").decode()
    return {
        "code": code,
        "summary": list(dict.fromkeys(re.findall(pattern, text))),
        "seconds": round(time.perf_counter() - start, 1),
        "tail": text[-1500:] if code != 0 else None,
    }


def small_calls() -> None:
    """Forward, backward, packed and decoding calls of odd sizes, for the sanitizer to look at."""
    import attnlab
    from attnlab.schedules import forced_plan

    g = torch.tensor([-0.3, -0.05], device="cuda")
    for dim, mode in itertools.product((64, 128), ("single", "halo", "two-pass")):
        q, k, v = (
            torch.randn(1, 2, 333, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        with forced_plan(mode, 3):
            attnlab.lightning_attention(q, k, v, g, backend="triton").output.sum().backward()
    bounds = torch.tensor([0, 100, 100, 333], device="cuda")
    attnlab.lightning_attention_varlen(q, k, v, g, bounds, backend="triton")
    step = [x.detach()[:, :, :1] for x in (q, k, v)]
    state = torch.zeros(3, 2, dim, dim, device="cuda")
    slots = torch.tensor([2], device="cuda")
    attnlab.lightning_decode_(*step, g, state, slots=slots, backend="triton")
    torch.cuda.synchronize()


if __name__ == "__main__":
    if "--small-calls" in sys.argv:
        small_calls()
    else:
        run_checks(Path(sys.argv[1]), budget_s=540.0)
