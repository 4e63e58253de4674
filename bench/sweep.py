"""Time and check every backend from 1K to millions of tokens: `python bench/sweep.py --max-len 4M`.

For each length, backend and pass: predict memory and time; if the point fits the budgets, check its
output against float64, then time it; append one row. The folder of results can be resumed after
any interruption, and ends with a report.

Under `torchrun --nproc-per-node N` the sequence is also spread over the N ranks (`bench.ranks`).
"""

import argparse
import datetime
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from attnlab.registry import check_backend_name
from bench import plan, probe_suite, retrieval_suite, rows
from bench.calls import OPS, PASSES
from bench.inputs import Source, check_corpus
from bench.report import write_report
from bench.rows import Point, Row
from bench.timing import CEILING_ROUNDS
from bench.units import run_units
from bench.worker import Task, Worker

DEFAULTS = {
    "cpu": {"heads": 1, "head_dim": 64, "dtype": "float32", "budget": 500, "point_budget": 30},
    "cuda": {"heads": 16, "head_dim": 128, "dtype": "bfloat16", "budget": 1500, "point_budget": 90},
}
RUNS = plan.ROOT / "results" / "runs"
SUITES = ("probe", "retrieval", "ops")
UNITS = {"probe": probe_suite, "retrieval": retrieval_suite}  # whose points give several rows
UNIT_SHARES = {"probe": 0.12, "retrieval": 0.18}  # of the budget, at most


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Options of the command line; those that depend on the device are filled in."""
    parser = argparse.ArgumentParser(
        description="Sweep attention backends over sequence lengths. Under torchrun (torchrun "
        "--nproc-per-node N bench/sweep.py ...) forward and backward are first timed with each "
        "sequence spread over the N ranks, lightning by LASP+ and softmax by ring attention, then "
        "the backends in one process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--max-len", default="4M", help="longest sequence: 4M, 64K, 1048576")
    add("--min-len", default="128", help="shortest sequence; lengths double from here")
    add("--suites", default=",".join(SUITES), help="comma-separated")
    add("--ops", default="lightning,softmax", help="comma-separated")
    add("--backends", default="auto", help="comma-separated, or auto for all that run here")
    add("--passes", default="fwd,fwd+bwd,decode", help=f"comma-separated, of {', '.join(PASSES)}")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--models", default="none", help="sizes of whole models to time at the end, as 3m, or none")
    add("--batch", type=int, default=1, help="sequences")
    add("--heads", type=int, help="query heads (default: 1 on a CPU, 16 on CUDA)")
    add("--kv-heads", type=int, help="key heads of softmax (default: as many as heads)")
    add("--head-dim", type=int, help="key and value dim (default: 64 on a CPU, 128 on CUDA)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: by device")
    add("--precision", default="default", choices=("default", "high", "tf32"))
    add("--layer", default="0/80", help="layer whose MiniMax slopes are used, of how many")
    add("--input", default="text", choices=("text", "random"), help="what q, k, v are made from")
    add("--corpus", help="file or folder for --input text (default: Python's standard library)")
    add("--budget", type=float, help="seconds for the whole sweep")
    add("--point-budget", type=float, help="seconds for one point")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="folder of results (default: a new one under results/runs)")
    add("--resume", action="store_true", help="go on in --out, or in the newest run")
    arguments = parser.parse_args(argv)
    fill_in(arguments, DEFAULTS)
    arguments.kv_heads = arguments.kv_heads or arguments.heads
    return arguments


def listed(text: str, known: tuple[str, ...], what: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"expected {what} among {', '.join(known)}, got {name!r}")
    return names


def fill_in(arguments: argparse.Namespace, by_device: dict[str, dict], **instead: object) -> None:
    """Set what was not given: the device, and options by device; `instead` goes before those."""
    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, value in (by_device[arguments.device] | instead).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raise `ValueError` for the first of the named options that isn't above zero."""
    for name in names:
        value = getattr(arguments, name)
        if value <= 0:
            raise ValueError(f"expected --{name.replace('_', '-')} > 0, got {value}")


def plan_points(arguments: argparse.Namespace, device_name: str) -> list[list[Point]]:
    """Points of the sweep, a shuffled list a length; `ValueError` for what can't be meant."""
    check_positive(arguments, "batch", "heads", "kv_heads", "head_dim", "budget", "point_budget")
    if arguments.heads % arguments.kv_heads:
        raise ValueError(
            f"expected --kv-heads that divides {arguments.heads}, got {arguments.kv_heads}"
        )
    plan.check_layer(arguments.layer)
    suites = listed(arguments.suites, SUITES, "suites")
    backends = None if arguments.backends == "auto" else arguments.backends.split(",")
    for name in backends or []:
        check_backend_name(name)
    points = []
    ops = listed(arguments.ops, tuple(OPS), "ops")
    passes = listed(arguments.passes, PASSES, "passes")
    for length in plan.lengths(
        *(plan.parse_length(x) for x in (arguments.min_len, arguments.max_len))
    ):
        of_length = []
        for op, pass_ in itertools.product(ops, passes):
            template = Point(
                suite="ops",
                op=op,
                backend="",
                pass_=pass_,
                batch=arguments.batch,
                heads=arguments.heads,
                kv_heads=arguments.kv_heads if op == "softmax" else arguments.heads,
                q_len=length,
                head_dim=arguments.head_dim,
                value_dim=arguments.head_dim,
                dtype=arguments.dtype,
                device=device_name,
                layer=arguments.layer,
                precision=arguments.precision if op == "lightning" else "default",
                input=arguments.input,
            )
            chosen = plan.choose_backends(op, backends, template)
            of_length += [replace(template, backend=name) for name in chosen]
        if not of_length:
            raise ValueError(f"expected a backend of {arguments.ops}, got {arguments.backends}")
        points.append(plan.shuffled(of_length, arguments.seed))
    if "ops" not in suites:
        points = []
    elif arguments.input == "text":
        check_corpus(arguments.corpus, arguments.batch * points[-1][0].q_len)
    if arguments.models != "none":
        from bench import bench_model  # which runs its own points through this module

        points += bench_model.points_of_sweep(arguments, device_name)
    return points


def open_folder(arguments: argparse.Namespace) -> tuple[Path, list[Row]]:
    """Folder of the run and the rows that it holds already; `ValueError` if it can't be used."""
    folder = arguments.out
    if folder is None and arguments.resume:
        earlier = sorted(f.parent for f in RUNS.glob("*/rows.jsonl"))
        if not earlier:
            raise ValueError(f"expected a run to resume under {RUNS}, got none")
        folder = earlier[-1]
    if folder is None:
        folder = RUNS / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{arguments.device}"
    file = folder / "rows.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.touch()
        if not os.access(file, os.W_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        raise ValueError(f"expected a writable folder, got {folder}: {error.strerror}") from None
    if file.stat().st_size and not arguments.resume:
        raise ValueError(f"expected an empty folder or --resume, got rows in {folder}")
    rows.mend_last_line(file)
    return folder, rows.load_rows(file)


class Progress:
    """A bar with the point in hand on a terminal, a line a finished point elsewhere."""

    def __init__(self, total: int) -> None:
        self._bar = None
        if sys.stdout.isatty():
            from rich.progress import Progress as Bar

            # No refreshing thread: it would run, and be measured, beside the timed calls.
            self._bar = Bar(auto_refresh=False)
            self._bar.start()
            self._task = self._bar.add_task("", total=total)

    def begin(self, point: Point) -> None:
        """Show what runs now."""
        if self._bar is not None:
            self._bar.update(self._task, description=_label(point), refresh=True)

    def finish(self, point: Point, row: Row) -> None:
        """Show how it went."""
        outcome = row["status"] if row["status"] != "ok" else f"{row['ms_median']:.4g} ms"
        if row.get("tokens_per_s") and point.model:
            outcome += f", {row['tokens_per_s']:.4g} tokens/s"
        if row.get("share_of_limit"):
            outcome += f", {row['share_of_limit']:.0%} of the {row['limit']} limit"
        if row.get("reason"):
            outcome += f" ({row['reason']})"
        if self._bar is not None:
            self._bar.console.print(f"{_label(point)}: {outcome}", highlight=False)
            self._bar.update(self._task, advance=1, refresh=True)
        else:
            print(f"{_label(point)}: {outcome}", flush=True)

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _label(point: Point) -> str:
    from bench.fit import format_len

    words = [f"{format_len(point.q_len):>5}", point.op, point.pass_, point.backend]
    words += [point.model] if point.model else []
    words += [f"{point.ranks} ranks"] if point.ranks else []
    return " ".join(words) + (f" batch {point.batch}" if point.batch > 1 else "")


@dataclass
class Sweep:
    """One run: its folder, its workers, and the time that it has used."""

    arguments: argparse.Namespace
    folder: Path
    described: Row
    control: Worker
    in_process: bool
    spent_s: float
    ceiling_rounds: int = CEILING_ROUNDS
    stopping: bool = False

    def __post_init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.started = time.perf_counter()
        self.origin = rows.Origin(
            run_id=self.folder.name,
            commit=rows.git_commit(),
            versions=self.described["versions"],
        )
        self.source = Source(self.arguments.input, self.arguments.corpus, self.arguments.seed)
        device = self.arguments.device
        self.device_name = "cpu" if device == "cpu" else self.described["machine"]["device"]
        dtype = self.arguments.dtype
        self.ceilings = self.control.call(
            "ceilings", self.arguments.device, dtype, self.ceiling_rounds
        )
        self.predictor = plan.Predictor({dtype: self.ceilings})

    def used_s(self) -> float:
        """Seconds of the budget used so far, in earlier runs too."""
        return self.spent_s + time.perf_counter() - self.started

    def write_manifest(self, finished: bool) -> None:
        """Write down what was run, with what and on what."""
        settings = {
            n: str(v) if isinstance(v, Path) else v for n, v in vars(self.arguments).items()
        }
        content = self.described | {
            "argv": sys.argv[1:],
            "commit": self.origin.commit,
            "settings": settings,
            "ceilings": {self.arguments.dtype: vars(self.ceilings)},
            "finished": rows.now_utc() if finished else None,
            "budget_used_s": round(self.used_s(), 1),
        }
        rows.write_json(self.folder / "manifest.json", content)

    def run(self, points: list[list[Point]], done: dict[str, Row]) -> list[Row]:
        """Measure or skip every point that `done` has no measured row of; all rows of the plan."""
        every = list(itertools.chain.from_iterable(points))
        progress = Progress(len(every))
        collected = []
        for number, point in enumerate(every, start=1):
            if self.stopping:
                break
            key = point.key(plan.fingerprint(point.backend))
            row = done.get(key)
            if row is None or row["status"].startswith("skipped"):
                progress.begin(point)
                row = self.row_of(point, every[number:])
                rows.append_row(self.folder / "rows.jsonl", row)
                progress.finish(point, row)
            self.predictor.learn(point, row)
            collected.append(row)
        progress.stop()
        return collected

    def row_of(self, point: Point, later: list[Point]) -> Row:
        """Row of one point: skipped with a reason, or measured in the worker of its backend."""
        pred_ms, pred_bytes = self.predictor.predict(point)
        budget_s = self.arguments.point_budget
        outcome = self.predictor.skip(
            point,
            later,
            free_bytes=self.free_bytes(point),
            point_budget_s=budget_s,
            left_s=self.arguments.budget - self.used_s(),
        )
        if outcome is None:
            worker = self.workers.setdefault(_worker_name(point), Worker(self.in_process))
            task = Task(point, self.source, self.ceilings, budget_s, pred_ms)
            outcome = worker.measure(task)
        fingerprint = plan.fingerprint(point.backend)
        return self.origin.row(point, fingerprint, outcome, pred_ms=pred_ms, pred_bytes=pred_bytes)

    def free_bytes(self, point: Point) -> int:
        """Memory that the point may fill, once other workers gave back what it needs of theirs."""
        device = self.arguments.device
        free = self.control.call("free_bytes", device)
        if self.predictor.fits(point, free):
            return free
        for name, worker in self.workers.items():
            if worker.is_running and name != _worker_name(point):
                worker.call("release", device)
        return self.control.call("free_bytes", device)

    def run_units(self, done: dict[str, Row]) -> list[Row]:
        """Measure what gives several rows at once, each suite within its share of the budget."""
        arguments, found = self.arguments, []
        for suite in getattr(arguments, "suites", "").split(","):
            if suite in UNIT_SHARES:
                longest = plan.parse_length(arguments.max_len)
                units = UNITS[suite].units(longest, arguments.dtype)
                until_s = self.used_s() + UNIT_SHARES[suite] * arguments.budget
                found += run_units(self, units, done, until_s)
        return found

    def close(self) -> None:
        """End the workers."""
        for worker in (self.control, *self.workers.values()):
            worker.close()


def _worker_name(point: Point) -> str:
    return f"{point.op}.{point.backend}.{point.model}"


def execute(
    arguments: argparse.Namespace,
    planned: Callable[[argparse.Namespace, str], list[list[Point]]],
    *,
    in_process: bool = False,
    ceiling_rounds: int = CEILING_ROUNDS,
) -> int:
    """Measure what `planned` gives for a device's name, and write the report; an exit code.

    Points of a backend have a process of their own, unless all run `in_process`. The code is 0, 1 if nothing could be measured, 2 for bad input, 3 for wrong results, 130 if interrupted.
    """
    try:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("expected a CUDA device for --device cuda, got none")
        planned(arguments, "cpu")  # all that the command line can get wrong
        folder, earlier = open_folder(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    control = Worker(in_process)
    described = control.call("describe", arguments.device)
    described["started"] = rows.now_utc()
    spent_s = sum(row.get("point_s") or 0.0 for row in earlier)
    sweep = Sweep(arguments, folder, described, control, in_process, spent_s, ceiling_rounds)
    signal.signal(signal.SIGINT, lambda *_: setattr(sweep, "stopping", True))
    sweep.write_manifest(finished=False)
    done = {row["key"]: row for row in earlier}
    collected = sweep.run_units(done)
    collected += sweep.run(planned(arguments, sweep.device_name), done)
    sweep.close()
    sweep.write_manifest(finished=not sweep.stopping)
    write_report(folder)
    print(f"report: {folder / 'report.html'}")
    statuses = [row["status"] for row in collected]
    if "failed_accuracy" in statuses:
        return 3
    return 130 if sweep.stopping else 0 if "ok" in statuses else 1


def main(argv: list[str]) -> int:
    """Run the sweep; an exit code, as `execute` gives it."""
    try:
        arguments = parse_arguments(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from bench import ranks

        return ranks.run(arguments)
    return execute(arguments, plan_points)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
