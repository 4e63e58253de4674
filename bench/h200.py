"""Measure the lightning kernels and their peers on one GPU, at the shapes that goals are set for.

    python bench/h200.py --out results/h200 [--only triton,8x16x8K] [--budget 540] [--quick]

Three stages, each left out with `--skip`: "checks" runs the correctness matrix on the GPU (and the
compute sanitizer on small shapes) and writes `checks.json`; "rows" appends to `rows.jsonl`, ours
first, what is not measured there yet, until the budget is used up; "table" prints shares of the
floor beside the goals. So a run that is cut off is continued by the same command.

"cuda" is that backend as it is called; `--only cuda-portable,cuda-hopper` times its two scan kernels.
"""

import argparse
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import plan, rows, timing  # noqa: E402
from bench.gpu_checks import run_checks  # noqa: E402
from bench.inputs import Source  # noqa: E402
from bench.lines import format_digits  # noqa: E402
from bench.peers import CUDA_KERNELS, OURS, PEERS  # noqa: E402
from bench.rows import Point, Row  # noqa: E402
from bench.worker import Task, Worker, describe_machine  # noqa: E402

SOFTMAX_UP_TO = 64 << 10  # tokens: beyond, a call takes seconds to minutes
STAGES = ("checks", "rows", "table")


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table: a shape, a pass, and the shares of the floor that it must and should reach.

    With `versus_cudnn` they are times relative to that of cuDNN's softmax instead.
    """

    batch: int
    heads: int
    tokens: int
    dim: int
    pass_: str
    must: float | None
    goal: float | None
    layer: str = "0/80"
    versus_cudnn: bool = False
    precision: str = "default"

    @property
    def name(self) -> str:
        """As in "1x64x64K.d128.fwd"."""
        units = {20: "M", 10: "K", 0: ""}
        shift = next(n for n in units if self.tokens >> n << n == self.tokens >= 1 << n)
        late = "" if self.layer == "0/80" else f".layer{self.layer.split('/')[0]}"
        size = f"{self.tokens >> shift}{units[shift]}"
        late += "" if self.precision == "default" else f".{self.precision}"
        return f"{self.batch}x{self.heads}x{size}.d{self.dim}{late}.{self.pass_}"


K, M = 1 << 10, 1 << 20
LINES = [
    Line(1, 64, 64 * K, 128, "fwd", 0.80, 0.93),
    Line(1, 64, 64 * K, 128, "bwd", 0.47, 0.60),
    Line(8, 16, 8 * K, 128, "fwd", 0.82, 0.93),
    Line(8, 16, 8 * K, 128, "bwd", 0.47, 0.60),
    Line(1, 16, 1 * M, 128, "fwd", 0.82, 0.93),
    Line(1, 16, 1 * M, 128, "bwd", 0.44, 0.58),
    Line(1, 16, 4 * M, 128, "fwd", 0.78, 0.93),
    Line(1, 16, 4 * M, 128, "bwd", 0.44, 0.58),
    Line(1, 1, 4 * M, 128, "fwd", 0.82, 0.92),
    Line(1, 1, 4 * M, 128, "bwd", 0.44, 0.58),
    Line(1, 64, 4 * K, 128, "fwd", 0.74, 0.88),
    Line(1, 64, 4 * K, 128, "bwd", 0.40, 0.52),
    Line(1, 64, 512, 128, "fwd", 0.75, 0.60, versus_cudnn=True),
    Line(8, 16, 8 * K, 64, "fwd", 0.89, 0.96),
    Line(8, 16, 8 * K, 64, "bwd", 0.53, 0.62),
    Line(1, 64, 64 * K, 64, "fwd", 0.85, 0.95),
    Line(1, 64, 64 * K, 64, "bwd", 0.50, 0.60),
    Line(256, 64, 512, 128, "decode", 0.80, 0.92),
    # Almost no decay: at most a third slower than layer 0.
    Line(1, 16, 1 * M, 128, "fwd", 0.55, None, "78/80"),
    Line(1, 16, 1 * M, 128, "bwd", 0.29, None, "78/80"),
    Line(1, 16, 4 * M, 128, "fwd", 0.52, None, "78/80"),
    Line(1, 1, 4 * M, 128, "fwd", 0.55, None, "78/80"),
    Line(1, 1, 4 * M, 128, "bwd", 0.29, None, "78/80"),
    # Near-float32 products: offered, with no speed to reach.
    Line(1, 64, 64 * K, 128, "fwd", None, None, precision="high"),
    Line(1, 64, 64 * K, 128, "bwd", None, None, precision="high"),
]
QUICK = {"8x16x8K.d128.fwd", "8x16x8K.d128.bwd", "1x64x4K.d128.fwd"}


def points_of(line: Line, device: str) -> Iterator[Point]:
    """The line's point for each backend that can be timed at its length."""
    for op, backends in (*PEERS.items(), ("lightning", CUDA_KERNELS)):
        for backend in backends:
            if op == "softmax" and (line.tokens > SOFTMAX_UP_TO or line.layer != "0/80"):
                continue
            if line.pass_ == "decode" and backend not in (*OURS, "fla"):
                continue
            if line.precision != "default" and backend not in (*OURS, *CUDA_KERNELS):
                continue
            yield Point(
                suite="ops",
                op=op,
                backend=backend,
                pass_=line.pass_,
                batch=line.batch,
                heads=line.heads,
                kv_heads=line.heads,
                q_len=line.tokens,
                head_dim=line.dim,
                value_dim=line.dim,
                dtype="bfloat16",
                device=device,
                layer=line.layer,
                precision=line.precision,
                input="random",
            )


def measure(folder: Path, lines: list[Line], arguments: argparse.Namespace) -> None:
    """Append a row for each point that has none yet: our backends side by side, then each of the others."""
    start, path = time.perf_counter(), folder / "rows.jsonl"
    device = torch.cuda.get_device_name()
    described, worker = describe_machine("cuda"), Worker()
    origin = rows.Origin(
        run_id=folder.name, commit=rows.git_commit(), versions=described["versions"]
    )
    ceilings: timing.Ceilings = worker.call("ceilings", "cuda", "bfloat16")
    print(f"{device}: copy {ceilings.copy_gbps:.0f} GB/s, {ceilings.matmul_tflops:.0f} TFLOP/s")
    done = {r["key"] for r in _rows(path) if r["status"] in ("ok", "failed_accuracy")}
    points = [p for line in lines for p in points_of(line, device)]
    others = (b for b in order_of_backends() if b not in OURS)
    rank = {backend: n for n, backend in enumerate(others, 1)}
    for point in sorted(points, key=lambda p: rank.get(p.backend, 0)):
        fingerprint = plan.fingerprint(point.backend)
        if point.key(fingerprint) in done or not _selected(point, arguments.only):
            continue
        if time.perf_counter() - start > arguments.budget:
            print("budget used up; run the same command again to go on")
            break
        task = Task(
            point,
            Source("random"),
            ceilings,
            arguments.point_budget,
            sustained_s=timing.SUSTAINED_S,
        )
        row = origin.row(point, fingerprint, worker.measure(task))
        rows.append_row(path, row)
        print(_line_of(point, row), flush=True)
    worker.close()


def _line_of(point: Point, row: Row) -> str:
    result = f"{row['ms_median']:.4f} ms" if row["status"] == "ok" else row["status"]
    if row.get("reason"):
        result += f" ({row['reason']})"
    if row.get("share_of_limit"):
        result += f" {row['share_of_limit']:.1%}, error {row['error_rms']:.2e}"
    return f"{_name(point):28} {point.backend:15} {result}"


def _rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    rows.mend_last_line(path)
    return rows.load_rows(path)


def _name(point: Point) -> str:
    shape = point.batch, point.heads, point.q_len, point.head_dim, point.pass_
    return Line(*shape, 0.0, None, point.layer, precision=point.precision).name


def _selected(point: Point, only: list[str]) -> bool:
    words = [w for w in only if w in order_of_backends()]
    shapes = [w for w in only if w not in words]
    named = point.backend in (words or itertools.chain(*PEERS.values()))
    return named and (not shapes or any(w in _name(point) for w in shapes))


def order_of_backends() -> list[str]:
    """All backends that a run can time, ours first."""
    return [*OURS, *CUDA_KERNELS, *(b for b in itertools.chain(*PEERS.values()) if b not in OURS)]


def print_table(path: Path, lines: list[Line]) -> None:
    """Shares of the floor beside what they must and should be, and the times of the peers."""
    measured = {(_name_of_row(r), r["backend"]): r for r in _rows(path)}
    ours = (*OURS, *CUDA_KERNELS)
    print(f"\n{'shape':26}{'ms':>10}{'share':>8}{'must':>7}{'goal':>7}  verdict  peers (ms)")
    for line in lines:
        rows_of_line = {b: measured.get((line.name, b)) for b in order_of_backends()}
        times = {b: r["ms_median"] for b, r in rows_of_line.items() if r and r["status"] == "ok"}
        beside = ", ".join(f"{b} {ms:.4g}" for b, ms in times.items() if b not in ours)
        for backend in ours:
            row = rows_of_line[backend]
            if row is None and backend != "triton":
                continue
            cells = _verdict(line, row, times.get("cudnn", math.nan))
            print(f"{line.name:26}{cells} {backend:14} {beside if backend == 'triton' else ''}")


def _verdict(line: Line, row: Row | None, cudnn_ms: float) -> str:
    """Cells of a table: time, share of the floor, what it must and should be, and whether it is."""
    if row is None or row["status"] != "ok":
        return f"{row['status'] if row else 'not measured':>25}{'':>25}"
    share = row["share_of_limit"]
    holds = share >= (line.must or 0.0)
    if line.versus_cudnn:
        share = row["ms_median"] / cudnn_ms
        holds = share <= line.must
    wanted = ["-" if x is None else f"{x:.0%}" for x in (line.must, line.goal)]
    numbers = f"{row['ms_median']:>10.4f}{share:>8.0%}{wanted[0]:>7}{wanted[1]:>7}"
    return f"{numbers}  {'holds' if holds else 'MISSED':8}"


def readme_table(path: Path, time_of: str = "ms_median") -> str:
    """Times and, of our backends, shares of the floor of the layer-0 lines, as Markdown.

    `time_of` is "ms_median" or, for our backends alone, "ms_sustained"; rows without it are left
    out, and so is the column of a backend without rows.
    """
    measured = {(_name_of_row(r), r["backend"]): r for r in _rows(path)}
    if time_of != "ms_median":
        measured = {
            key: row | {"ms_median": row[time_of], "share_of_limit": row["floor_ms"] / row[time_of]}
            for key, row in measured.items()
            if time_of in row and row["backend"] in OURS
        }
    backends = [b for b in itertools.chain(*PEERS.values()) if any(b == of for _, of in measured)]
    header = ["B, H, T, D", "pass"]
    for backend in backends:
        header += [backend, "of the floor"] if backend in OURS else [backend]
    cells = [header, ["---"] * len(header)]
    for line in LINES:
        found = {b: measured.get((line.name, b)) for b in backends}
        ok = any(row and row["status"] == "ok" for b, row in found.items() if b in OURS)
        if not ok or line.layer != "0/80" or line.precision != "default":
            continue
        tokens = line.name.split(".")[0].split("x")[2]
        cells.append([f"{line.batch}, {line.heads}, {tokens}, {line.dim}", line.pass_])
        for backend, row in found.items():
            share = (row or {}).get("share_of_limit")
            cells[-1] += [_time_of(row)]
            cells[-1] += [f"{share:.0%}" if share else "-"] if backend in OURS else []
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _time_of(row: Row | None) -> str:
    if row is None:
        return "-"
    if row["status"] != "ok":
        return row["status"].replace("_", " ")
    return f"{format_digits(row['ms_median'], trim=True)} ms"


def _name_of_row(row: Row) -> str:
    shape = row["batch"], row["heads"], row["q_len"], row["head_dim"], row["pass"]
    return Line(*shape, 0.0, None, row["layer"], precision=row["precision"]).name


def main() -> None:
    """Run the stages that are not skipped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results/h200")
    parser.add_argument("--only", default="", help="backends and parts of shape names, by comma")
    parser.add_argument("--skip", default="", help=f"stages among {', '.join(STAGES)}, by comma")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for the rows")
    parser.add_argument("--point-budget", type=float, default=3.0, help="seconds a point")
    parser.add_argument("--quick", action="store_true", help="three shapes alone")
    arguments = parser.parse_args()
    arguments.only = [w for w in arguments.only.split(",") if w]
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = [line for line in LINES if not arguments.quick or line.name in QUICK]
    skipped = arguments.skip.split(",")
    if "table" not in skipped and not torch.cuda.is_available():
        print_table(arguments.out / "rows.jsonl", lines)
        return
    if "checks" not in skipped:
        run_checks(arguments.out, arguments.budget)
    if "rows" not in skipped:
        measure(arguments.out, lines, arguments)
    if "table" not in skipped:
        print_table(arguments.out / "rows.jsonl", lines)


if __name__ == "__main__":
    main()
