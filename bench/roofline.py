"""Where forward and backward of our backends lie under the roofline, as Nsight Compute counts it.

    python bench/roofline.py --out results/h200/roofline.json [--backends triton,cuda-hopper]

profiles one call of each pass and backend under `ncu` and writes shares of the peak (memory, L2,
shared memory, tensor cores, instructions issued), occupancy, bytes and time of every kernel launched.
`--call BACKEND` makes the calls that are profiled.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attnlab.decay import minimax_log_decay  # noqa: E402
from attnlab.functional import lightning_attention  # noqa: E402
from bench import peers, rows  # noqa: E402
from bench.rows import Row  # noqa: E402

PASSES = ("fwd", "bwd")
SHAPE = (1, 64, 16 << 10, 128)  # B, H, T, D: as long calls, without their time under the profiler
# Figures in percent but for the first three; a counter that this ncu doesn't know is left out.
COUNTERS = {
    "ns": "gpu__time_duration.sum",
    "dram_bytes": "dram__bytes.sum",
    "registers": "launch__registers_per_thread",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor_pipe": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "shared_reads": "l1tex__data_bank_reads.avg.pct_of_peak_sustained_elapsed",
    "shared_writes": "l1tex__data_bank_writes.avg.pct_of_peak_sustained_elapsed",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
}


def known_counters(ncu: str) -> dict[str, str]:
    """The counters among `COUNTERS` that this ncu has on this chip."""
    listed = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True).stdout
    names = {line.split()[0] for line in listed.splitlines() if line.strip()}
    return {
        figure: counter
        for figure, counter in COUNTERS.items()
        if counter.split(".")[0] in names or counter.startswith("launch__")
    }


def profile(ncu: str, backend: str, pass_: str, budget_s: float) -> Row:
    """Figures of every kernel of one call, or the reason why there are none."""
    counters = known_counters(ncu)
    command = [
        *(ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"),
        *("--target-processes", "all", "--profile-from-start", "off"),
        *("--metrics", ",".join(counters.values())),
        *(sys.executable, __file__, "--call", backend, "--pass", pass_),
    ]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=budget_s)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {budget_s:.0f} s"}
    kernels = figures_of(run.stdout, counters)
    return {"kernels": kernels} if kernels else {"error": (run.stdout + run.stderr)[-1500:]}


def figures_of(text: str, counters: dict[str, str]) -> list[Row]:
    """Kernels in the CSV that ncu printed: a line of names, one of units, then a line a kernel."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return []
    names, _, *values = csv.reader(lines)
    found = []
    for line in values:
        cells = dict(zip(names, line, strict=False))
        figures = {
            figure: float(cells[counter].replace(",", ""))
            for figure, counter in counters.items()
            if cells.get(counter)
        }
        found.append({"kernel": cells["Kernel Name"], "grid": cells.get("Grid Size")} | figures)
    return found


def make_call(backend: str, pass_: str) -> None:
    """One call between the marks that the profiler starts and stops at, after one that compiles."""
    batch, heads, tokens, dim = SHAPE
    shape = batch, heads, tokens, dim
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    for x in inputs[:3]:
        x.requires_grad_(pass_ == "bwd")
    log_decay = minimax_log_decay(heads, 0, 80).cuda()

    def forward() -> torch.Tensor:
        return lightning_attention(*inputs[:3], log_decay, backend=backend).output

    def call() -> None:
        if pass_ == "bwd":
            torch.autograd.grad(output, inputs[:3], inputs[3], retain_graph=True)
        else:
            forward()

    output = forward()
    call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def main() -> None:
    """Profile, or make the call that is profiled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results/h200/roofline.json")
    parser.add_argument("--backends", default="triton,cuda-portable,cuda-hopper", help="by comma")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds a profile")
    parser.add_argument(
        "--call", choices=(*peers.OURS, *peers.CUDA_KERNELS), help="make a call alone"
    )
    parser.add_argument("--pass", dest="pass_", choices=PASSES, default="fwd")
    arguments = parser.parse_args()
    if arguments.call:
        make_call(arguments.call, arguments.pass_)
        return
    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if not Path(ncu).exists():
        parser.error("expected Nsight Compute's ncu, found none")
    found = {"device": torch.cuda.get_device_name(), "ts_utc": rows.now_utc(), "shape": SHAPE}
    for backend in arguments.backends.split(","):
        for pass_ in PASSES:
            found[f"{backend}.{pass_}"] = profile(ncu, backend, pass_, arguments.budget)
            rows.write_json(arguments.out, found)
            print(backend, pass_, json.dumps(found[f"{backend}.{pass_}"]), flush=True)


if __name__ == "__main__":
    main()
