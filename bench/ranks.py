"""Points whose sequence is spread over ranks: `torchrun --nproc-per-node N bench/sweep.py`.

All ranks do the same in step (`bench.rank_calls`); rank 0 decides what is measured and writes the
rows. Then the job ends, and rank 0 alone goes on with the sweep of one process in the same folder.
"""

import argparse
import itertools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from attnlab.distributed.comm import Group
from attnlab.distributed.launch import Job, job
from bench import calls, plan, rows, sweep, timing
from bench.gate import Verdict
from bench.inputs import Source
from bench.rank_calls import METHODS, prepare
from bench.report import write_report
from bench.rows import Point, Row
from bench.worker import ENVIRONMENT, compute_and_measure, describe_machine, free_bytes, shares_of

BUDGET_SHARE = 0.4  # of the sweep's
WARM_UP_CALLS = 2


def run(arguments: argparse.Namespace) -> int:
    """This rank's part of a sweep, and on rank 0 the rest of it; an exit code as `sweep.execute`'s."""
    os.environ.update(ENVIRONMENT)
    with job(arguments.device) as joined:
        leads = joined.leads
        spread = _Spread(arguments, joined)
        found = spread.run()
    if not leads:
        return 0
    if spread.stopping:
        write_report(spread.folder)
        return 130
    calls.release_memory(arguments.device)
    arguments.out, arguments.resume = spread.folder, True
    code = sweep.execute(arguments, sweep.plan_points)
    return 3 if "failed_accuracy" in [row["status"] for row in found] else code


def points_of(arguments: argparse.Namespace, device_name: str, ranks: int) -> list[list[Point]]:
    """Points on ranks, a list a length: one for each op and pass, whatever its backends are."""
    if arguments.batch != 1:
        raise ValueError(f"expected --batch 1 on ranks, got {arguments.batch}")
    if plan.parse_length(arguments.min_len) < 2 * ranks:
        raise ValueError(f"expected --min-len of at least {2 * ranks}, got {arguments.min_len}")
    found = []
    for of_length in sweep.plan_points(arguments, device_name):
        ops = [p for p in of_length if p.suite == "ops" and p.pass_ != "decode"]
        kinds = {(point.op, point.pass_): point for point in ops}
        spread = [replace(p, backend=METHODS[p.op], ranks=ranks) for p in kinds.values()]
        found += [plan.shuffled(spread, arguments.seed)] if spread else []
    return found


class _Spread:
    """The points on ranks: what is left to measure, and the time that it may take."""

    def __init__(self, arguments: argparse.Namespace, joined: Job) -> None:
        self.arguments, self.job, self.stopping = arguments, joined, False
        self.group = Group(dist.group.WORLD)
        self.device = arguments.device
        points_of(arguments, "cpu", self.group.size)  # all that the command line can get wrong
        self.described = describe_machine(self.device)
        name = "cpu" if self.device == "cpu" else self.described["machine"]["device"]
        self.points = points_of(arguments, name, self.group.size)
        self.source = Source(arguments.input, arguments.corpus, arguments.seed)
        if joined.leads:
            self.folder, earlier = sweep.open_folder(arguments)
            self.done = {row["key"]: row for row in earlier}
            self.spent_s = sum(row.get("point_s") or 0.0 for row in earlier)
            self._prepare_to_lead()

    def _prepare_to_lead(self) -> None:
        dtype, ranks = self.arguments.dtype, self.group.size
        one = timing.measure_ceilings(self.device, getattr(torch, dtype))
        self.ceilings = timing.Ceilings(one.copy_gbps * ranks, one.matmul_tflops * ranks)
        self.predictor = plan.Predictor({dtype: self.ceilings})
        self.origin = rows.Origin(
            run_id=self.folder.name,
            commit=rows.git_commit(),
            versions=self.described["versions"],
        )

    def run(self) -> list[Row]:
        """Measure or skip all points; their rows, on rank 0."""
        signal.signal(signal.SIGINT, lambda *_: setattr(self, "stopping", True))
        every = list(itertools.chain.from_iterable(self.points))
        leads, found = self.job.leads, []
        progress = sweep.Progress(len(every)) if leads else None
        for number, point in enumerate(every, start=1):
            decided = self.job.of_first(self._decide(point, every[number:]) if leads else None)
            if decided == "stop":
                break
            if progress is not None:
                progress.begin(point)
            row = self._measure(point) if decided == "measure" else decided
            if progress is not None:
                found.append(self._keep(point, row))
                progress.finish(point, found[-1])
        if progress is not None:
            progress.stop()
        return found

    def _decide(self, point: Point, later: list[Point]) -> Row | str:
        """What rank 0 says: stop, measure, or the row of a point that is done or skipped."""
        if self.stopping:
            return "stop"
        row = self.done.get(point.key(plan.fingerprint(point.backend)))
        if row is not None and not row["status"].startswith("skipped"):
            return row
        free = free_bytes(self.device) * (1 if self.device == "cpu" else self.group.size)
        budgets = {"point_budget_s": self.arguments.point_budget}
        budgets["left_s"] = BUDGET_SHARE * self.arguments.budget - self.spent_s
        skipped = self.predictor.skip(point, later, free_bytes=free, **budgets)
        return skipped or "measure"

    def _keep(self, point: Point, outcome: Row) -> Row:
        """Write a row that is new, and learn from it."""
        if "key" in outcome:
            self.predictor.learn(point, outcome)
            return outcome
        pred_ms, pred_bytes = self.predictor.predict(point)
        fingerprint = plan.fingerprint(point.backend)
        row = self.origin.row(point, fingerprint, outcome, pred_ms=pred_ms, pred_bytes=pred_bytes)
        rows.append_row(self.folder / "rows.jsonl", row)
        self.spent_s += row.get("point_s") or 0.0
        self.predictor.learn(point, row)
        return row

    def _measure(self, point: Point) -> Row:
        """Check a point on all ranks, then time it; rank 0 gets the row's fields, others a part."""
        start = time.perf_counter()
        call = prepare(point, self.source, self.group, self.device)
        row = self._judge(call)
        if row["status"] == "ok":
            left_s = self.arguments.point_budget - (time.perf_counter() - start)
            timed = measure(call.run, self.group, self.device, left_s)
            row |= timed.statistics()
            if self.group.rank == 0:
                problem = calls.problem_of(point, self.device)
                row |= shares_of(point, problem, row["ms_median"], self.ceilings)
                row["mfu"] = row["mfu"] and row["mfu"] / self.group.size
        calls.release_memory(self.device)
        return row | {"point_s": round(time.perf_counter() - start, 3)}

    def _judge(self, call: calls.Call) -> Row:
        """Status, errors and memory, those of the rank that has most; the same on all ranks."""
        results, peak = compute_and_measure(call, self.device)
        try:
            own: Verdict | str = call.judge(results)
        except ValueError as error:  # these inputs can't tell right from wrong
            own = str(error)
        parts: list[tuple[Verdict | str, int]] = [(own, peak)] * self.group.size
        dist.all_gather_object(parts, (own, peak))
        for verdict, _ in parts:
            if isinstance(verdict, str):
                return {"status": "error", "reason": verdict}
        judged = max((verdict for verdict, _ in parts), key=lambda v: v.worst.ratio)
        worst = judged.worst
        row = {"error_ratio": worst.ratio, "error_rms": worst.rms, "error_max": worst.max}
        if not worst.ratio <= 1:
            finite = {n: x if x < float("inf") else None for n, x in row.items()}
            reason = f"{judged.name}: error is {worst.ratio:.3g} x its budget"
            return finite | {"status": "failed_accuracy", "reason": reason}
        return row | {"status": "ok", "reason": None, "peak_bytes": max(p for _, p in parts)}


def measure(run: Callable[[], object], group: Group, device: str, budget_s: float) -> timing.Timing:
    """Time a call that all ranks make together, between barriers: the slowest rank's time counts.

    Every rank counts the same times, so that all of them stop after the same call.
    """
    samples: list[float] = []
    budget_s = _slowest(-budget_s, group) * -1
    for number in itertools.count():
        _slowest(0.0, group)  # a barrier
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        took = _slowest(time.perf_counter() - start, group)
        if number < WARM_UP_CALLS and took < timing.LONG_CALL_S:
            continue
        samples.append(took)
        enough = len(samples) >= timing.min_samples(took)
        if len(samples) == timing.MAX_SAMPLES or (enough and sum(samples) > timing.SAMPLING_S):
            break
        if sum(samples) > budget_s:
            break
    return timing.Timing([s * 1e3 for s in samples], "wall", False)


def _slowest(seconds: float, group: Group) -> float:
    """The largest of all ranks' numbers, on each of them; also a barrier."""
    own = torch.tensor([seconds], dtype=torch.float64, device=group.device)
    return group.all_gather(own).wait().max().item()
