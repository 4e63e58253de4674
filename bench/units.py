"""Work of a sweep that gives several rows at once: recall of the probe, retrieval of a model.

A unit runs in a worker process, as points do, and its rows are appended together. Each row says how
many rows its unit has, so that a unit that a kill cut short is done again when the run is resumed.
"""

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch

from bench import rows
from bench.plan import MEMORY_SHARE, ROOT
from bench.rows import Row
from bench.worker import Worker, WorkerDied

FIELDS = (  # of every row, null where a suite has no use for them
    *("suite", "op", "backend", "pass", "batch", "heads", "kv_heads", "q_len", "head_dim"),
    *("value_dim", "dtype", "device", "model", "layer", "precision", "input"),
)
MARGIN = 1.3  # a prediction may be this much too low


class Bench(Protocol):
    """The run that units belong to: a sweep, or an evaluation of trained models."""

    arguments: argparse.Namespace  # of which `device` is used, "cpu" or "cuda"
    folder: Path
    device_name: str
    in_process: bool
    origin: rows.Origin
    stopping: bool

    def used_s(self) -> float:
        """Seconds of the budget used so far."""


class Unit(Protocol):
    """What can be measured, skipped, and found again among the rows of an earlier run."""

    suite: str

    def title(self) -> str:
        """A few words for the progress display."""

    def identity(self) -> Row:
        """All that makes it this unit, as JSON."""

    def sources(self) -> tuple[str, ...]:
        """Files and folders that it runs, from the repository's root."""

    def version(self) -> str:
        """What else makes it another measurement when it changes: a hash of weights, or ""."""

    def work(self) -> float:
        """Operations, up to a factor that units of one `series` share."""

    def series(self) -> str:
        """Units whose times follow from one another by their work."""

    def memory_bytes(self, device: str) -> int:
        """Bytes that it needs at most."""

    def measure(self, device: str) -> list[Row]:
        """The rows' own fields, measured on "cpu" or "cuda"."""

    def blank(self) -> list[Row]:
        """The same rows without what is measured, for a unit that is skipped."""


def fingerprint(unit: Unit) -> str:
    """Hash of a unit's sources and version: when they change it is measured again."""
    digest = hashlib.sha256(unit.version().encode())
    for name in unit.sources():
        path = ROOT / name
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _hash(*parts: object) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_units(
    sweep: Bench, units: Iterable[Unit], done: dict[str, Row], until_s: float
) -> list[Row]:
    """Rows of all units; those that `done` has no measured rows of are measured or skipped.

    `until_s` is the use of the sweep's budget at which this has to have ended: what would take longer
    is skipped with its prediction.
    """
    earlier: dict[tuple[str, str], list[Row]] = {}
    for row in done.values():
        if row.get("unit") and row["status"] == "ok":
            earlier.setdefault((row["unit"], row["fingerprint"]), []).append(row)
    collected: list[Row] = []
    seconds: dict[str, list[tuple[float, float]]] = {}  # by series: work and seconds
    worker, num_skipped = Worker(sweep.in_process), 0
    for unit in units:
        mark = fingerprint(unit)
        name = _hash(unit.identity(), sweep.device_name)
        old = earlier.get((name, mark), [])
        if old and len(old) == old[0]["unit_rows"]:
            collected += old
            continue
        if sweep.stopping:
            break
        predicted = predicted_s(unit, seconds.get(unit.series(), []))
        skip = _skip(unit, worker, sweep.arguments.device, predicted, until_s - sweep.used_s())
        if skip is not None:
            found, num_skipped = [row | skip for row in unit.blank()], num_skipped + 1
        else:
            print(f"{unit.title()}: ", end="", flush=True)
            found, taken = _measured(worker, unit, sweep.arguments.device)
            if found[0]["status"] == "ok":
                seconds.setdefault(unit.series(), []).append((unit.work(), taken))
            found[0]["point_s"] = round(taken, 3)
            print(_outcome(found), flush=True)
        pred_ms = None if predicted is None else predicted * 1e3
        whole = [_whole(sweep, row, mark, name, len(found)) | {"pred_ms": pred_ms} for row in found]
        rows.append_row(sweep.folder / "rows.jsonl", *whole)
        collected += whole
    worker.close()
    if num_skipped:
        print(f"{num_skipped} more would take too long or too much memory; their rows say how much")
    return collected


def settled(found: list[Row]) -> list[Row]:
    """Rows without those of units that have newer ones: of other sources, or skipped before."""
    last: dict[str, Row] = {row["unit"]: row for row in found if row.get("unit")}
    measured = {
        (row["unit"], row.get("fingerprint"))
        for row in found
        if row.get("unit") and row["status"] == "ok"
    }

    def holds(row: Row) -> bool:
        if not row.get("unit"):
            return True
        mark = last[row["unit"]].get("fingerprint")
        current = row.get("fingerprint") == mark
        return current and (row["status"] == "ok" or (row["unit"], mark) not in measured)

    return [row for row in found if holds(row)]


def _skip(
    unit: Unit, worker: Worker, device: str, predicted: float | None, left_s: float
) -> Row | None:
    """Status and reason if a unit should not run; None if it may."""
    if left_s <= 0 or (predicted is not None and MARGIN * predicted > left_s):
        guess = "an unknown time" if predicted is None else f"{predicted:.3g} s"
        reason = f"would take {guess}, of the suite's time {max(left_s, 0):.3g} s are left"
        return {"status": "skipped_budget", "reason": reason}
    needed, free = unit.memory_bytes(device), worker.call("free_bytes", device)
    if needed > MEMORY_SHARE * free:
        reason = (
            f"would take {needed / 2**30:.1f} GiB, "
            f"{MEMORY_SHARE:.0%} of the {free / 2**30:.1f} GiB free is allowed"
        )
        return {"status": "skipped_memory", "reason": reason, "pred_bytes": needed}
    return None


def predicted_s(unit: Unit, earlier: list[tuple[float, float]]) -> float | None:
    """Seconds by the work of the series' last three units, None where there is none.

    The median, so that one which a busy machine disturbed doesn't make all others look too dear.
    """
    if not earlier:
        return None
    guesses = [seconds * max(unit.work() / work, 0.05) for work, seconds in earlier[-3:]]
    return statistics.median_low(guesses)


def _measured(worker: Worker, unit: Unit, device: str) -> tuple[list[Row], float]:
    """Rows of a unit and their seconds, or what became of it."""
    start = time.perf_counter()
    try:
        return worker.call("unit", unit, device)
    except WorkerDied as death:
        status, reason = "error", f"{death}; a process without memory dies so"
    except torch.OutOfMemoryError as error:
        status, reason = "out_of_memory", str(error).splitlines()[0]
    lost = [row | {"status": status, "reason": reason} for row in unit.blank()]
    return lost, time.perf_counter() - start


def _whole(sweep: Bench, row: Row, mark: str, unit: str, count: int) -> Row:
    base = {
        "schema": rows.SCHEMA,
        "run_id": sweep.folder.name,
        "key": _hash(
            unit, mark, {k: row.get(k) for k in ("op", "q_len", "distance", "depth", "cell")}
        ),
        "fingerprint": mark,
        **dict.fromkeys(FIELDS),
        "commit": sweep.origin.commit,
        "unit": unit,
        "unit_rows": count,
        "device": sweep.device_name,
        "reason": None,
    }
    return base | row | {"ts_utc": rows.now_utc()}


def _outcome(found: list[Row]) -> str:
    if found[0]["status"] != "ok":
        return f"{found[0]['status']} ({found[0]['reason']})"
    n, correct = (sum(row[name] for row in found) for name in ("n", "correct"))
    return f"{correct} of {n} recalled, {found[0]['point_s']:.3g} s"
