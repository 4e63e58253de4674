"""Train small models on retrieval tasks and evaluate them to 4M tokens: `python bench/retrieval.py`.

Two stages, each of which goes on where it was interrupted: the runs of a plan (see
`attnlab.retrieval.plans`), then their cells, a model, task and length at a time, with a report at the
end. All of it lies in one folder. On a GPU, for a run of so many minutes in all:

    python bench/retrieval.py --plan full --jobs 3 --minutes 18 --evaluate-minutes 9 --out DIR
"""

import argparse
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attnlab.retrieval.command import table
from attnlab.retrieval.plans import PLANS, Session, run_plan
from bench import plan, retrieval_suite, rows, sweep
from bench.report import write_report
from bench.rows import Row
from bench.units import run_units
from bench.worker import Worker

DEFAULTS = {
    "cpu": {"plan": "small", "evaluate_minutes": 5.0, "max_len": "64K"},
    "cuda": {"plan": "full", "evaluate_minutes": 9.0, "max_len": "4M"},
}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Options of the command line; those that depend on the device are filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/retrieval"), help="folder (%(default)s)")
    add("--plan", help=f"{', '.join(PLANS)}, or none (default: small; full on CUDA)")
    add(
        "--minutes",
        type=float,
        default=float("inf"),
        help="for training; then it saves and goes on",
    )
    add("--jobs", type=int, default=1, help="processes that train (%(default)s)")
    add("--steps", type=int, help="of each run; without it, the plan's")
    add("--evaluate-minutes", type=float, help="0 for none (default: 5; 9 on CUDA)")
    add("--max-len", help="longest sequence (default: 64K; 4M on CUDA)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    arguments = parser.parse_args(argv)
    sweep.fill_in(arguments, DEFAULTS)
    return arguments


@dataclass
class Evaluation:
    """What `bench.units` needs to know of the run that units belong to."""

    arguments: argparse.Namespace
    folder: Path
    described: Row
    in_process: bool = False
    stopping: bool = False
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        machine = self.described["machine"]
        self.device_name = "cpu" if self.arguments.device == "cpu" else machine["device"]
        self.origin = rows.Origin(
            run_id=self.folder.name,
            commit=rows.git_commit(),
            versions=self.described["versions"],
        )

    def used_s(self) -> float:
        """Seconds since the evaluation began."""
        return time.perf_counter() - self.started


def evaluate(arguments: argparse.Namespace, *, in_process: bool) -> list[Row]:
    """Rows of all units of the trained models, measured or skipped, and their report.

    A worker process measures them, unless all runs `in_process`.
    """
    folder = arguments.out
    file = folder / "rows.jsonl"
    file.touch()
    rows.mend_last_line(file)
    worker = Worker(in_process)
    described = worker.call("describe", arguments.device)
    run = Evaluation(arguments, folder, described, in_process)
    worker.close()
    signal.signal(signal.SIGINT, lambda *_: setattr(run, "stopping", True))
    rows.write_json(
        folder / "manifest.json",
        run.described | {"argv": sys.argv[1:], "commit": run.origin.commit},
    )
    done = {row["key"]: row for row in rows.load_rows(file)}
    longest = plan.parse_length(arguments.max_len)
    units = retrieval_suite.units(longest, "", folder)
    found = run_units(run, units, done, 60 * arguments.evaluate_minutes)
    write_report(folder)
    print(f"report: {folder / 'report.html'}")
    return found


def main(argv: list[str], *, in_process: bool = False) -> int:
    """Train and evaluate; 0, 1 if nothing was measured, 2 for bad input, 130 if training isn't done."""
    try:
        arguments = parse_arguments(argv)
        sweep.check_positive(arguments, "minutes", "jobs")
        plan.parse_length(arguments.max_len)
        arguments.out.mkdir(parents=True, exist_ok=True)
        done = arguments.plan == "none" or run_plan(
            Session(
                plan=arguments.plan,
                out=str(arguments.out),
                device=arguments.device,
                deadline=time.time() + 60 * arguments.minutes,
                jobs=arguments.jobs,
                steps=arguments.steps,
            )
        )
        print(table(arguments.out))
        if arguments.evaluate_minutes <= 0:
            return 0 if done else 130
        found = evaluate(arguments, in_process=in_process)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not any(row["status"] == "ok" for row in found):
        return 1
    return 0 if done else 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
