"""pytest-benchmark suite over the registry: `pytest --benchmark-only`, one group per op, pass, length.

These guard against regressions of whole calls; the sweep is where kernels are compared. Each call
is checked against float64 before it is timed. On a GPU the timer is CUDA events, and the L2 cache
is flushed outside the timed region.
"""

from typing import Self

import pytest
import torch

import attnlab
from attnlab import registry
from bench import calls, timing
from bench.inputs import Source
from bench.rows import Point

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1024, 8192) if DEVICE == "cpu" else (1024, 8192, 65536)
SHAPE = {"cpu": (1, 64, "float32"), "cuda": (16, 128, "bfloat16")}[DEVICE]
ROUNDS_S = 1.0


class CudaStamp:
    """A point in the GPU's time; the difference of two is seconds between them."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Self) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def points() -> list[Point]:
    """All backends that run here, at all lengths and passes, the naive form at the shortest."""
    heads, dim, dtype = SHAPE
    found = []
    for op, pass_, length in (
        (op, pass_, length)
        for op in calls.OPS
        for pass_ in ("fwd", "fwd+bwd", "decode")
        for length in LENGTHS
    ):
        for backend in attnlab.list_backends(calls.OPS[op][None]):
            point = Point(
                suite="ops",
                op=op,
                backend=backend,
                pass_=pass_,
                batch=1,
                heads=heads,
                kv_heads=heads,
                q_len=length,
                head_dim=dim,
                value_dim=dim,
                dtype=dtype,
                device=DEVICE,
                layer="0/80",
                precision="default",
                input="random",
            )
            problem = calls.problem_of(point, DEVICE)
            quadratic_memory = backend == "reference" and length > LENGTHS[0]
            if not quadratic_memory and registry.why_not(problem.op, backend, problem) is None:
                found.append(point)
    return found


@pytest.fixture(scope="session")
def ceilings() -> timing.Ceilings:
    return timing.measure_ceilings(DEVICE, getattr(torch, SHAPE[2]))


@pytest.mark.parametrize("point", points(), ids=lambda p: f"{p.op}-{p.backend}-{p.pass_}-{p.q_len}")
def test_speed(benchmark, point, ceilings):
    call = calls.prepare(point, Source("random"), DEVICE)
    assert call.check().worst.ratio <= 1
    benchmark.group = f"{point.op}-{point.pass_}-{point.q_len}"
    problem = calls.problem_of(point, DEVICE)
    flush = timing.cache_flush(problem.min_bytes()) if DEVICE == "cuda" else None
    seconds = timing.once(call.run, DEVICE)
    benchmark.pedantic(
        call.run,
        setup=flush,
        warmup_rounds=3,
        rounds=max(5, min(100, int(ROUNDS_S / seconds))),
    )
    if benchmark.stats is None:  # --benchmark-disable: run once, as a test
        return
    median = float(benchmark.stats.stats.median)
    counted = "fwd" if point.pass_ == "decode" else point.pass_
    floor_ms, limit = ceilings.floor_ms(problem.flops(counted), problem.min_bytes(counted))
    tokens = 1 if point.pass_ == "decode" else point.q_len
    benchmark.extra_info["tokens_per_s"] = tokens / median
    benchmark.extra_info["share_of_limit"] = floor_ms / 1e3 / median
    benchmark.extra_info["limit"] = limit
