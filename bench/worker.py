"""A process that measures the points of one backend, so that its crash costs one row.

The sweep sends points through a pipe and gets back the measured fields of a row.
"""

import gc
import itertools
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench import calls, timing
from bench.inputs import Source
from bench.rows import Point, Row
from bench.suites import suite_of

WARM_UP_LEN = 256
KEPT_BYTES = 1 << 30  # that a worker may hold beside twice what its last point took
ENVIRONMENT = {
    # Keep freed memory for the next call, as torch does on CUDA: fresh pages cost a fault each, and
    # on some virtual machines those take longer than the call. The action "release" gives it back.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 60),
    "KINETO_LOG_LEVEL": "99",  # or the profiler prints two lines at each use
}
PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "cupy-cuda13x", "flash-linear-attention"),
    "lightning-attn",
)


@dataclass(frozen=True)
class Task:
    """One point to measure: with what inputs, against which ceilings, within how many seconds."""

    point: Point
    source: Source
    ceilings: timing.Ceilings | None
    budget_s: float
    expected_ms: float = float("inf")
    sustained_s: float = 0.0  # of calls without a pause on CUDA, once they have been timed


def measure_point(task: Task) -> Row:
    """Check a point, then time it; the fields of its row that say how that went."""
    point, device = task.point, "cpu" if task.point.device == "cpu" else "cuda"
    reason = suite_of(point).why_not(point, device)
    if reason is not None:
        return {"status": "unsupported", "reason": reason}
    start = time.perf_counter()
    try:
        row = _measured(task, device, start)
    except torch.OutOfMemoryError as error:
        row = _failure("out_of_memory", error)
    except RuntimeError as error:
        status = "out_of_memory" if "allocate memory" in str(error) else "error"
        row = _failure(status, error)
    except Exception as error:  # a peer's kernel may raise anything; it becomes this row
        row = _failure("error", error)
    if device == "cuda" or holds_too_much(row.get("peak_bytes") or 0):
        calls.release_memory(device)
    return row | {"point_s": round(time.perf_counter() - start, 3)}


def measure_unit(unit: Any, device: str) -> tuple[list[Row], float]:
    """Rows of a unit (see `bench.units`), and the seconds that they took."""
    start = time.perf_counter()
    found = unit.measure(device)
    calls.release_memory(device)
    return found, time.perf_counter() - start


def _failure(status: str, error: Exception) -> Row:
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return {"status": status, "reason": f"{type(error).__name__}: {first_line[:300]}"}


def _measured(task: Task, device: str, start: float) -> Row:
    point = task.point
    first_call_ms = _first_call_ms(task, device)
    call = suite_of(point).prepare(point, task.source, device)
    results, peak_bytes = compute_and_measure(call, device)
    verdict = call.judge(results)
    del results
    accuracy = {
        "error_ratio": verdict.worst.ratio,
        "error_rms": verdict.worst.rms,
        "error_max": verdict.worst.max,
    }
    if not verdict.worst.ratio <= 1:
        finite = {n: x if x < float("inf") else None for n, x in accuracy.items()}
        reason = f"{verdict.name}: error is {verdict.worst.ratio:.3g} x its budget"
        return finite | {"status": "failed_accuracy", "reason": reason}
    gc.collect()
    if point.pass_ == "bwd":
        call.run()  # makes the graph whose backward is timed
    problem = suite_of(point).problem_of(point, device)
    left = max(0.0, task.budget_s - (time.perf_counter() - start))
    timed = timing.measure(
        call.run,
        device=device,
        working_set_bytes=problem.min_bytes(_counted(point)),
        budget_s=left,
        expected_s=task.expected_ms / 1e3,
    )
    row = {"status": "ok", "reason": None, "first_call_ms": first_call_ms} | timed.statistics()
    row |= accuracy | {"peak_bytes": peak_bytes}
    row["clocks"] = timing.read_clocks() if device == "cuda" else None
    if device == "cuda" and task.sustained_s and timing.can_be_sustained(row["ms_median"]):
        row["ms_sustained"] = timing.sustained_ms(call.run, task.sustained_s)
        row["clocks_sustained"] = timing.read_clocks()
    return row | call.notes | shares_of(point, problem, row["ms_median"], task.ceilings)


def _first_call_ms(task: Task, device: str) -> float:
    """Time of a first short call, in which a backend compiles what it has to."""
    short = replace(task.point, q_len=min(WARM_UP_LEN, task.point.q_len))
    call = suite_of(short).prepare(short, replace(task.source, kind="random"), device)
    start = time.perf_counter()
    call.run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def _counted(point: Point) -> str:
    return "fwd" if point.pass_ == "decode" else point.pass_


def shares_of(point: Point, problem: Any, ms: float, ceilings: timing.Ceilings | None) -> Row:
    """Fields that set the time beside the counted work and the device's limits."""
    flops, num_bytes = problem.flops(_counted(point)), problem.min_bytes(_counted(point))
    steps = 1 if point.pass_ == "decode" else point.q_len
    row = {
        "flops": flops,
        "min_bytes": num_bytes,
        "tokens_per_s": point.batch * steps / ms * 1e3,
        "mfu": timing.share_of_peak(flops / ms / 1e9, point.device, point.dtype),
    }
    if ceilings is None:
        return row
    floor_ms, limit = ceilings.floor_ms(flops, num_bytes)
    return row | {
        "floor_ms": floor_ms,
        "limit": limit,
        "share_of_limit": floor_ms / ms,
        "ceilings": {
            "copy_gbps": ceilings.copy_gbps,
            "matmul_tflops": ceilings.matmul_tflops,
        },
    }


def compute_and_measure(call: calls.Call, device: str) -> tuple[calls.Results, int]:
    """Results of a call, and the peak of what it and its inputs allocate, in bytes."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated() - call.input_bytes
        torch.cuda.reset_peak_memory_stats()
        results = call.compute()
        return results, torch.cuda.max_memory_allocated() - before
    results, sizes = trace_allocations(call.compute)
    return results, call.input_bytes + peak_bytes(sizes)


def trace_allocations(compute: Callable[[], Any]) -> tuple[Any, list[int]]:
    """Result of a function on the CPU, and what it allocates in order of time, in bytes.

    What is freed counts as negative. From the profiler's record, since a process's size also counts
    what it has freed.
    """
    with torch.profiler.profile(profile_memory=True) as profile:
        result = compute()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return result, [size for _, size in changes]


def peak_bytes(sizes: list[int]) -> int:
    """Most that is held at once, of what `trace_allocations` found."""
    return max(itertools.accumulate(sizes, initial=0))


def describe_machine(device: str) -> Row:
    """Device name, its properties and the versions of everything that matters."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    machine: Row = {
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        versions["cuda"] = torch.version.cuda
        machine |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    return {"machine": machine, "versions": versions}


def holds_too_much(peak_bytes: int) -> bool:
    """Whether this process keeps far more than its last point took, or a third of the machine's."""
    import psutil

    limit = min(2 * peak_bytes + KEPT_BYTES, psutil.virtual_memory().total // 3)
    return psutil.Process().memory_info().rss > limit


def free_bytes(device: str) -> int:
    """Memory that a point may fill."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available


ACTIONS: dict[str, Callable[..., Any]] = {
    "measure": measure_point,
    "ceilings": lambda device, dtype, *rounds: timing.measure_ceilings(
        device, getattr(torch, dtype), *rounds
    ),
    "describe": describe_machine,
    "free_bytes": free_bytes,
    "release": calls.release_memory,
    "unit": measure_unit,
}


class WorkerDied(RuntimeError):
    """The worker process ended before it answered; `exitcode` is negative for a signal."""

    def __init__(self, exitcode: int | None) -> None:
        super().__init__(f"the worker process died with exit code {exitcode}")
        self.exitcode = exitcode


class Worker:
    """A process of its own that runs the actions above; started at the first call."""

    def __init__(self, in_process: bool = False) -> None:
        self._in_process = in_process
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def call(self, action: str, *args: object) -> Any:
        """Result of an action; `WorkerDied` if the process ends, after which a new one starts."""
        if self._in_process:
            return ACTIONS[action](*args)
        if self._process is None:
            os.environ.update(ENVIRONMENT)
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        assert self._pipe is not None
        try:
            self._pipe.send((action, args))
            return self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            exitcode, self._process = self._process.exitcode, None
            raise WorkerDied(exitcode) from None

    def measure(self, task: Task) -> Row:
        """Measured fields of a point's row, or what became of the process."""
        start = time.perf_counter()
        try:
            row = self.call("measure", task)
        except WorkerDied as death:
            killed = death.exitcode == -signal.SIGKILL
            row = {
                "status": "out_of_memory" if killed else "error",
                "reason": f"{death}, most likely for want of memory" if killed else str(death),
                "point_s": time.perf_counter() - start,
            }
        if row["status"] == "error":
            self.close()  # a CUDA context may be unusable now; the next point gets a new one
        return row

    @property
    def is_running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.terminate()
            self._process.join()
            self._process = None


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the sweep's to handle
    parent = os.getppid()
    while True:
        try:
            if not pipe.poll(1.0):
                if os.getppid() != parent:  # the sweep was killed
                    return
                continue
            action, args = pipe.recv()
            pipe.send(ACTIONS[action](*args))
        except (EOFError, BrokenPipeError):
            sys.exit(0)
