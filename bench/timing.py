"""How every number here is timed: one protocol for CPU and CUDA.

The caller has run the call once already (compilation, correctness). Then warm-up by time, then
samples until the time for them is used up. On CUDA a sample is taken with events, in a replayed
graph where a call is shorter than 50 us, and the L2 cache is flushed before each sample where the
call's data could stay in it. Calls longer than a second are timed three times, or once where the
budget allows no more. The GPU is kept busy while a call is launched, so that what is timed is the
call and not the launching. Clocks are read, never set.

Samples have pauses between them, so that most are taken at a GPU's highest clocks. Calls one behind
another soon meet its power limit: `sustained_ms` is for those.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

LONG_CALL_S = 1.0
GRAPH_BELOW_S = 50e-6
WARM_UP_S, WARM_UP_CALLS = 0.025, 3
SAMPLING_S = 0.5
MAX_SAMPLES = 200
CALLS_PER_GRAPH = 16
HELD_UP, MAX_HELD_UP = 1.5, 4  # times the expected duration; calls that may take that long
STEADY = 0.8  # of the call before: a call that takes longer than this isn't getting faster
SUSTAINED_MS = 0.2, 200.0  # shorter calls wait for the host, of longer ones there are too few
SUSTAINED_S = 2.5  # of calls without a pause: an H200's clocks keep changing for about a second
BLOCK_S = 0.05  # of calls without a pause, between two that are as long as `BUSY_CYCLES`
BUSY_CYCLES = 1_500_000  # of the GPU, about a millisecond: longer than it takes to launch a call
# Dense 16-bit products without sparsity, TFLOP/s, of NVIDIA's data sheets.
NOMINAL_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4}
CEILING_ROUNDS, CEILING_SAMPLES, CEILING_PAUSE_S = 4, 8, 1.0


@dataclass(frozen=True)
class Timing:
    """Samples in milliseconds, how they were taken ("wall", "event", "graph"), cache flushed or not."""

    samples: list[float]
    timer: str
    l2_flush: bool

    def statistics(self) -> dict[str, object]:
        """Median, quartiles and 95 % bootstrap interval of the median, named as in a row."""
        q1, median, q3 = np.percentile(self.samples, [25, 50, 75])
        draws = np.random.default_rng(0).choice(self.samples, (1000, len(self.samples)))
        low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
        values = {"median": median, "q1": q1, "q3": q3, "lo": low, "hi": high}
        return {f"ms_{name}": float(value) for name, value in values.items()} | {
            "samples": self.samples,
            "timer": self.timer,
            "l2_flush": self.l2_flush,
        }


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of the device: copy rate (bytes read plus written) and matrix products."""

    copy_gbps: float
    matmul_tflops: float

    def floor_ms(self, flops: int, num_bytes: int) -> tuple[float, str]:
        """Shortest time for the work, and which limit it meets ("memory" or "compute")."""
        memory, compute = num_bytes / self.copy_gbps / 1e6, flops / self.matmul_tflops / 1e9
        return max(memory, compute), "memory" if memory >= compute else "compute"


def min_samples(call_s: float) -> int:
    """Samples that a call is given however long they take."""
    return 10 if call_s < 0.1 else 5 if call_s < LONG_CALL_S else 1


def measure(
    call: Callable[[], object],
    *,
    device: str,
    working_set_bytes: int,
    budget_s: float,
    expected_s: float = float("inf"),
) -> Timing:
    """Time a call that has run before; takes about `budget_s` at most, but one sample always.

    A call that takes far longer than `expected_s` was held up, for instance by a virtual machine
    that fetches back idle memory: it counts as warm-up, and the samples begin after it. One that
    takes as long again is no accident, whatever was expected.
    """
    if device == "cpu":
        before = float("inf")
        for _ in range(MAX_HELD_UP):
            took = _wall_sample(call, None)
            if took < HELD_UP * expected_s or took > STEADY * before:
                break
            before = took
        return _sample(call, _wall_sample, "wall", budget_s, None)
    flush = cache_flush(working_set_bytes)
    known_long = LONG_CALL_S < expected_s < float("inf")  # not to be run just to find that out
    if not known_long and _is_short(call, flush):
        try:
            return _graph_timing(call, flush, budget_s)
        except RuntimeError:  # a call that synchronises can't be captured
            torch.cuda.synchronize()
    return _sample(call, _event_sample, "event", budget_s, flush)


def _sample(
    call: Callable[[], object],
    sample: Callable[[Callable[[], object], Callable[[], None] | None], float],
    timer: str,
    budget_s: float,
    flush: Callable[[], None] | None,
) -> Timing:
    start = time.perf_counter()
    first = sample(call, flush)
    if first > LONG_CALL_S:
        samples = [first]
        while len(samples) < 3 and time.perf_counter() - start + first < budget_s:
            samples.append(sample(call, flush))
        return Timing([s * 1e3 for s in samples], timer, flush is not None)
    warm_up, calls = first, 1
    while warm_up < WARM_UP_S or calls < WARM_UP_CALLS:
        warm_up, calls = warm_up + sample(call, flush), calls + 1
    samples, stop = [], time.perf_counter() + min(SAMPLING_S, budget_s)
    while len(samples) < MAX_SAMPLES:
        enough = len(samples) >= min_samples(first) or time.perf_counter() - start > budget_s
        if samples and enough and time.perf_counter() > stop:
            break
        samples.append(sample(call, flush))
    return Timing([s * 1e3 for s in samples], timer, flush is not None)


def _wall_sample(call: Callable[[], object], flush: Callable[[], None] | None) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _event_sample(call: Callable[[], object], flush: Callable[[], None] | None) -> float:
    if flush is not None:
        flush()
    torch.cuda._sleep(BUSY_CYCLES)  # the call is queued before the GPU gets to the first event
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def can_be_sustained(ms: float) -> bool:
    """Whether `sustained_ms` says something of calls that take so long."""
    return SUSTAINED_MS[0] < ms < SUSTAINED_MS[1]


def sustained_ms(call: Callable[[], object], seconds: float) -> float:
    """Milliseconds of a call on CUDA in the last third of so many seconds of calls without a pause."""
    calls = max(1, round(BLOCK_S / _event_sample(call, None)))

    def block() -> None:
        for _ in range(calls):
            call()

    spans, stop = [], time.perf_counter() + seconds
    while not spans or time.perf_counter() < stop:
        spans.append(_event_sample(block, None) / calls)
    return float(np.median(spans[len(spans) * 2 // 3 :])) * 1e3


def once(call: Callable[[], object], device: str) -> float:
    """Seconds of one call, as a first estimate."""
    return _event_sample(call, None) if device == "cuda" else _wall_sample(call, None)


def cache_flush(working_set_bytes: int) -> Callable[[], None] | None:
    """A function that overwrites the L2 cache, or None where the data can't stay in it anyway."""
    l2_bytes = torch.cuda.get_device_properties().L2_cache_size
    if working_set_bytes >= 4 * l2_bytes:
        return None
    buffer = torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")

    def flush() -> None:
        buffer.zero_()

    return flush


def _is_short(call: Callable[[], object], flush: Callable[[], None] | None) -> bool:
    """Whether a graph has to time the call; what holds up one launch must not make that choice."""
    for _ in range(WARM_UP_CALLS):
        took = _event_sample(call, flush)
        if took < GRAPH_BELOW_S or took > WARM_UP_S:
            break
    return took < GRAPH_BELOW_S


def _graph_timing(
    call: Callable[[], object], flush: Callable[[], None] | None, budget_s: float
) -> Timing:
    """Time a short call in a graph: replays of calls with flushes, less replays of flushes alone."""
    graphs = [_capture(call, flush)] + ([_capture(None, flush)] if flush is not None else [])
    samples, stop = [], time.perf_counter() + min(SAMPLING_S, budget_s)
    for graph in graphs:
        graph.replay()
    while len(samples) < min_samples(0.0) or (
        time.perf_counter() < stop and len(samples) < MAX_SAMPLES
    ):
        spans = [_event_sample(graph.replay, None) for graph in graphs]
        alone = spans[1] if flush is not None else 0.0
        samples.append((spans[0] - alone) * 1e3 / CALLS_PER_GRAPH)
    return Timing(samples, "graph", flush is not None)


def _capture(
    call: Callable[[], object] | None, flush: Callable[[], None] | None
) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            if flush is not None:
                flush()
            if call is not None:
                call()
    return graph


def measure_ceilings(device: str, dtype: torch.dtype, rounds: int = CEILING_ROUNDS) -> Ceilings:
    """Copy rate and square matrix product rate of the device, the best of many, right now."""
    num_bytes, size = (1 << 30, 8192) if device == "cuda" else (1 << 28, 2048)
    source = torch.randint(255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    sample = _event_sample if device == "cuda" else _wall_sample

    copies, products = [], []
    for number in range(rounds):
        time.sleep(CEILING_PAUSE_S if number else 0.0)  # what disturbs one round may spare the next
        for _ in range(CEILING_SAMPLES):
            copies.append(sample(lambda: target.copy_(source), None))
            products.append(sample(lambda: torch.mm(a, b, out=product), None))
    return Ceilings(2 * num_bytes / min(copies) / 1e9, 2 * size**3 / min(products) / 1e12)


def share_of_peak(tflops: float, device: str, dtype: str) -> float | None:
    """Share of a device's nominal peak, None where that isn't known (or not of that type)."""
    peak = NOMINAL_TFLOPS.get(device) if dtype in ("bfloat16", "float16") else None
    return tflops / peak if peak else None


def read_clocks() -> dict[str, object] | None:
    """SM and memory clock (MHz), temperature, power and throttle reasons; None without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        return {
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "mem_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "throttle": pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
        }
    except Exception:  # NVML raises its own kinds where it is missing, old or not permitted
        return None
