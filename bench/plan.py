"""What a sweep measures, in which order, and what it may leave out because it would not fit."""

import hashlib
import importlib.util
import random
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import attnlab
from attnlab import registry
from attnlab.decay import minimax_log_decay
from bench import calls, timing
from bench.rows import Point, Row
from bench.suites import suite_of

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    "torch": ["attnlab/chunked.py", "attnlab/reference.py"],
    "reference": ["attnlab/reference.py"],
    "sdpa": ["attnlab/sdpa.py"],
    "flash": ["attnlab/sdpa.py"],
    "cudnn": ["attnlab/sdpa.py"],
    "fla": ["attnlab/fla.py"],
    "triton": ["kernels_triton", "attnlab/planner.py", "attnlab/segments.py"],
    "cuda": ["kernels_cuda", "attnlab/planner.py", "attnlab/segments.py"],
    "lasp+": ["attnlab/distributed", "attnlab/chunked.py", "kernels_triton", "attnlab/planner.py"],
    "ring": ["attnlab/distributed", "attnlab/sdpa.py"],
    "attnlab": [  # a whole model
        *(
            "attnlab/model",
            "attnlab/cache.py",
            "attnlab/inference",
            "attnlab/training/objective.py",
        ),
        *("attnlab/training/optimizer.py", "attnlab/functional.py", "attnlab/chunked.py"),
        *(
            "attnlab/sdpa.py",
            "attnlab/triton_softmax.py",
            "attnlab/planner.py",
            "attnlab/segments.py",
            "kernels_triton",
        ),
    ],
}
PEERS = ("fla", "transformers")
MARGIN = 1.3  # a prediction may be this much too low
OVERHEAD_S = 0.7  # of a point besides its calls: inputs, warm-up, samples of a short call
FIRST_SHARE = 0.05  # share of the limit assumed where nothing has been measured yet
MEMORY_SHARE = 0.75  # of the free memory that a point may take: heaps fragment
RATIO_FROM_BYTES = 1 << 20  # below, fixed buffers hide how a call's memory grows


def parse_length(text: str) -> int:
    """Tokens of "64K", "4M" (binary multiples) or "1048576".

    Raises:
        ValueError: for anything else, and for 0.
    """
    match = re.fullmatch(r"(\d+)([KMkm]?)", text.strip())
    tokens = int(match[1]) << {"": 0, "k": 10, "m": 20}[match[2].lower()] if match else 0
    if tokens < 1:
        raise ValueError(f"expected a length such as 64K, 4M or 1048576, got {text!r}")
    return tokens


def lengths(shortest: int, longest: int) -> list[int]:
    """Doublings of `shortest` up to `longest`."""
    if shortest > longest:
        raise ValueError(f"expected --min-len <= --max-len, got {shortest} > {longest}")
    return [shortest << n for n in range((longest // shortest).bit_length())]


def check_layer(text: str) -> None:
    """Raise `ValueError` unless the text names a layer whose slopes can be had, as "0/80"."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match:
        raise ValueError(f"expected a layer such as 0/80, got {text!r}")
    minimax_log_decay(1, int(match[1]), int(match[2]))


def choose_backends(op: str, names: list[str] | None, template: Point) -> list[str]:
    """Backends of an op: those named, or all that run here.

    Without names, lightning's "reference" is left out: its mask form is quadratic by design, and
    the naive softmax beside it shows that wall already.
    """
    known = attnlab.list_backends(calls.OPS[op].get(template.pass_, calls.OPS[op][None]))
    if names is not None:
        return [n for n in known if n in names]
    device = "cpu" if template.device == "cpu" else "cuda"
    problem = calls.problem_of(template, device)
    runs = [n for n in known if registry.why_not(problem.op, n, problem) is None]
    return [n for n in runs if (op, n) != ("lightning", "reference")]


def shuffled(points: list[Point], seed: int) -> list[Point]:
    """The points of one length in a seeded order, so that no backend always comes first."""
    order = list(points)
    random.Random(seed * 1_000_003 + points[0].q_len).shuffle(order)
    return order


def fingerprint(backend: str) -> str:
    """Hash of the sources that a backend runs: a changed kernel is another point."""
    digest = hashlib.sha256()
    for name in SOURCES.get(backend, []):
        path = ROOT / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in (f for f in files if f.suffix in (".py", ".cu", ".cuh")):
            digest.update(file.read_bytes())
    if backend in PEERS and (spec := importlib.util.find_spec(backend)):
        digest.update(str(spec.origin).encode())
    return digest.hexdigest()[:12]


@dataclass
class Predictor:
    """Predicts a point's time and memory from the last shorter one measured, and decides on it."""

    floors: dict[str, timing.Ceilings]  # by dtype
    measured: dict[tuple, list[tuple[Point, Row]]] = field(default_factory=dict)
    wall: dict[tuple, Row] = field(default_factory=dict)  # series that ran out of memory

    def learn(self, point: Point, row: Row) -> None:
        """Take note of a finished point."""
        series = self._series(point)
        if row["status"] == "ok":
            self.measured.setdefault(series, []).append((point, row))
        elif row["status"] in ("out_of_memory", "skipped_dominated"):
            self.wall[series] = row

    def predict(self, point: Point) -> tuple[float, int]:
        """Milliseconds and bytes, by the counted work, from the last points measured.

        The time is the median of what the last three would give: one that a busy machine disturbed
        must not make the longer ones look too dear.
        """
        flops, num_bytes = _work(point)
        needed = suite_of(point).needed_bytes(point)
        series = self.measured.get(self._series(point), [])
        if not series:
            floor_ms, _ = self.floors[point.dtype].floor_ms(flops, num_bytes)
            return 1.0 + floor_ms / FIRST_SHARE, needed
        times = []
        for before, row in series[-3:]:
            flops_before, bytes_before = _work(before)
            by_memory = row.get("limit") == "memory"
            ratio = num_bytes / bytes_before if by_memory else flops / flops_before
            times.append(row["ms_median"] * max(1.0, ratio))
        before, row = series[-1]
        peak, needed_before = row.get("peak_bytes"), suite_of(before).needed_bytes(before)
        if peak and needed_before >= RATIO_FROM_BYTES:
            needed = int(needed * max(1.0, peak / needed_before))
        return statistics.median(times), needed

    def fits(self, point: Point, free_bytes: int) -> bool:
        """Whether the point's predicted memory leaves some of the free memory free."""
        return self.predict(point)[1] <= MEMORY_SHARE * free_bytes

    def calls_s(self, point: Point) -> float:
        """Seconds that a point's calls take at least: the check, a warm-up, and the samples."""
        call_s = MARGIN * self.predict(point)[0] / 1e3
        return (2 + timing.min_samples(call_s)) * call_s

    def cost_s(self, point: Point) -> float:
        """Seconds that a point takes at least in all."""
        return OVERHEAD_S + self.calls_s(point)

    def skip(
        self,
        point: Point,
        later: list[Point],
        *,
        free_bytes: int,
        point_budget_s: float,
        left_s: float,
    ) -> Row | None:
        """Status and reason if the point should not run, with the predictions; None if it may.

        The budget goes to the cheapest points first, so that a point must leave enough for the
        cheaper ones among those that come later.
        """
        pred_ms, pred_bytes = self.predict(point)
        predicted = {"pred_ms": pred_ms, "pred_bytes": pred_bytes}
        wall = self.wall.get(self._series(point))
        if wall is not None:
            reason = f"out of memory at {wall['q_len']} tokens already"
            return predicted | {"status": "skipped_dominated", "reason": reason}
        if not self.fits(point, free_bytes):
            reason = (
                f"would take {pred_bytes / 2**30:.1f} GiB, "
                f"{MEMORY_SHARE:.0%} of the {free_bytes / 2**30:.1f} GiB free is allowed"
            )
            return predicted | {"status": "skipped_memory", "reason": reason}
        calls_s, cost_s = self.calls_s(point), self.cost_s(point)
        if calls_s > point_budget_s:
            reason = f"would take {calls_s:.3g} s, the point budget is {point_budget_s:.3g} s"
            return predicted | {"status": "skipped_budget", "reason": reason}
        reserved_s = sum(cost for cost in map(self.cost_s, later) if cost < cost_s)
        if cost_s > left_s - reserved_s:
            reason = (
                f"would take {cost_s:.3g} s of the {max(0.0, left_s):.3g} s left, "
                f"of which cheaper points need {reserved_s:.3g} s"
            )
            return predicted | {"status": "skipped_budget", "reason": reason}
        return None

    @staticmethod
    def _series(point: Point) -> tuple:
        return point.op, point.backend, point.pass_, point.model, point.batch


def _work(point: Point) -> tuple[int, int]:
    problem = suite_of(point).problem_of(point, "cpu")
    counted = "fwd" if point.pass_ == "decode" else point.pass_
    return problem.flops(counted), problem.min_bytes(counted)
