"""Time variants of the CUDA kernels' tunables, and Triton's kernels, on one GPU, for a number of seconds.

    python bench/cuda_variants.py --compile   # fills the cache of compiled kernels first
    python bench/cuda_variants.py 90 [fwd64]  # seconds, and what the names of variants begin with

A variant: a name, the passes it matters to, a tile of the table of the kernel for Hopper. Each is timed
as `bench/h200.py` times it, twice, all others in between: with pauses, and without (`timing.sustained_ms`).
"""

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from attnlab import schedules
from attnlab.decay import minimax_log_decay
from attnlab.functional import lightning_attention, lightning_decode_
from bench import timing
from kernels_cuda import lightning, lightning_decode, module, tiles
from kernels_cuda.tiles import Tile

KINDS = ("forward", "backward", "high", "decode")
NAMES = {"forward": "fwd", "backward": "bwd"}
SHAPES = {
    128: [
        *((1, 64, 65536), (8, 16, 8192), (1, 64, 4096), (1, 64, 512)),
        *((1, 1, 1 << 22), (1, 16, 1 << 20), (256, 64, 1)),
        *((1, 16, 1 << 20, 78), (1, 1, 1 << 22, 78)),
    ],
    64: [(8, 16, 8192), (1, 64, 65536)],
}


@dataclass
class Variant:
    name: str
    dim: int
    kind: str  # one of KINDS
    tile: Tile | None = None
    hopper: bool = True
    promotion: int = 2  # of a box to L2: 0 none, 1 64 B, 2 128 B, 3 256 B
    backend: str = "cuda"


def one(stages, per_sm=1):
    return Tile(num_stages=stages, programs_per_sm=per_sm, consumers=1)


def cluster(stages):
    return Tile(num_stages=stages, programs_per_sm=1, consumers=1, cluster_size=2)


def two(stages):
    return Tile(num_stages=stages, programs_per_sm=1, consumers=2)


def named(dim, kind, name, tile, **options):
    return Variant(f"{NAMES.get(kind, kind)}{dim} {name}", dim, kind, tile, **options)


VARIANTS = [
    *(named(dim, kind, "Triton", None, backend="triton") for dim in (128, 64) for kind in KINDS),
    named(128, "forward", "1 consumer 4 stages", one(4)),
    named(128, "forward", "1 consumer 3 stages", one(3)),
    named(128, "forward", "2 consumers 3 stages", two(3)),
    named(128, "forward", "1 consumer 4 stages, clusters of 2", cluster(4)),
    named(128, "forward", "1 consumer 4 stages, boxes to L2 by 256", one(4), promotion=3),
    named(128, "forward", "portable 2 stages x2", None, hopper=False),
    named(128, "backward", "2 consumers 3 stages", two(3)),
    named(128, "backward", "1 consumer 4 stages", one(4)),
    named(128, "backward", "portable", None, hopper=False),
    named(128, "high", "2 consumers 3 stages", two(3)),
    named(128, "high", "1 consumer 4 stages", one(4)),
    named(128, "decode", "", None),
    named(64, "forward", "1 consumer 4 stages", one(4)),
    named(64, "forward", "1 consumer 5 stages", one(5)),
    named(64, "forward", "1 consumer 3 stages x2", one(3, 2)),
    named(64, "forward", "portable", None, hopper=False),
    named(64, "backward", "1 consumer 4 stages", one(4)),
    named(64, "backward", "1 consumer 5 stages", one(5)),
    named(64, "backward", "portable", None, hopper=False),
]


@contextmanager
def applied(variant):
    from kernels_cuda import tensor_map

    tile_of, promotion = tiles.hopper_tile, tensor_map._PROMOTE_128B
    if variant.tile:
        tiles.hopper_tile = lambda *_: variant.tile
    tensor_map._PROMOTE_128B = variant.promotion
    forget()
    try:
        with lightning.hopper_kernels(variant.hopper):
            yield
    finally:
        tiles.hopper_tile, tensor_map._PROMOTE_128B = tile_of, promotion
        forget()


def forget():
    from kernels_cuda import tensor_map

    for x in (
        module.kernel,
        lightning._tile_of,
        lightning.instance_of,
        tensor_map._encoded,
    ):
        x.cache_clear()
    module._failures.clear()
    schedules._schedules.clear()


def compile_one(number):
    variant = VARIANTS[number]
    if variant.backend != "cuda":
        return None
    with applied(variant):
        tile = variant.tile or tiles.scan_tile(variant.dim, (9, 0))
        precision = "high" if variant.kind == "high" else "default"
        if variant.kind == "decode":
            wanted = [lightning_decode.instance_of(128, 128, torch.bfloat16, n) for n in (1, 4)]
        else:
            scan = lightning.instance_of(variant.dim, torch.bfloat16, tile, precision)
            wanted = [lightning.PREFIX, scan]
        try:
            for instance in wanted:
                module.cubin(instance, "sm_90a")
        except Exception as error:
            return f"{variant.name}: {str(error)[:300]}"
    return None


def inputs_of(shape, dim):
    generator = torch.Generator("cuda").manual_seed(0)
    size = (*shape[:3], dim)
    made = [
        torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator)
        for _ in range(4)
    ]
    return made, minimax_log_decay(shape[1], *(shape[3:] or [0]), 80).cuda()


def call_of(variant, tensors, g):
    q, k, v, do = tensors
    flags = {
        "backend": variant.backend,
        "precision": "high" if variant.kind == "high" else "default",
    }
    if variant.kind == "decode":
        state = torch.ones(*q.shape[:2], 128, 128, device="cuda")
        return lambda: lightning_decode_(q, k, v, g, state, backend=variant.backend)
    if variant.kind != "backward":
        return lambda: lightning_attention(q, k, v, g, **flags).output
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    output = lightning_attention(*leaves, g, **flags).output
    return lambda: torch.autograd.grad(output, leaves, do, retain_graph=True)


def measure(variant, shape, tensors, g, rate, expected):
    """A line: times, shares of the floor at a copy `rate`, distance from the first variant's result."""
    with applied(variant):
        call = call_of(variant, tensors, g)
        results = call()
        results = results if isinstance(results, tuple) else (results,)
        first = expected.setdefault((shape, variant.kind), [x.clone() for x in results])
        apart = max(
            ((x.float() - y.float()).norm() / y.float().norm()).item()
            for x, y in zip(results, first, strict=True)
        )
        touched = 7 if variant.kind == "backward" else 4
        size = touched * tensors[0].numel() * 2
        if variant.kind == "decode":
            size += 2 * 4 * tensors[0].numel() * 128
        timed = timing.measure(call, device="cuda", working_set_bytes=size, budget_s=0.3)
        both = [timed.statistics()["ms_median"]]
        if timing.can_be_sustained(both[0]):
            both.append(timing.sustained_ms(call, timing.SUSTAINED_S))
    floor = size / rate / 1e6
    times = "  sustained ".join(f"{ms:9.4f} ms {floor / ms:6.1%}" for ms in both)
    return f"{times}  from the first {apart:.1e}"


def variants_of(dim, shape):
    """Those that a shape tells something of."""
    for variant in VARIANTS:
        short = shape[2] == 512 and variant.kind == "backward"
        short |= (shape[2] == 1) != (variant.kind == "decode")
        other = variant.kind == "high" and shape != (1, 64, 65536)
        if variant.dim == dim and not short and not other:
            yield variant


def main(budget, only=""):
    start, expected = time.perf_counter(), {}
    rate = timing.measure_ceilings("cuda", torch.bfloat16).copy_gbps
    print(f"{torch.cuda.get_device_name()}: copy {rate:.0f} GB/s", flush=True)
    empty = timing.measure(
        lambda: torch.cuda._sleep(0), device="cuda", working_set_bytes=0, budget_s=1.0
    )
    print(f"a kernel that does nothing: {empty.statistics()['ms_median']:.4f} ms")
    for dim, shape in [(dim, shape) for dim, shapes in SHAPES.items() for shape in shapes]:
        tensors, g = inputs_of(shape, dim)
        expected.clear()
        for variant in 2 * [v for v in variants_of(dim, shape) if v.name.startswith(only)]:
            if time.perf_counter() - start > budget:
                print("budget used up")
                return
            try:
                text = measure(variant, shape, tensors, g, rate, expected)
            except Exception as error:  # the other variants are timed all the same
                text = f"{type(error).__name__}: {str(error)[:200]}"
            name = ",".join(map(str, (*shape, dim)))
            print(f"{name:18} {variant.name:50} {text}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--compile"]:
        with ProcessPoolExecutor() as pool:
            for failure in filter(None, pool.map(compile_one, range(len(VARIANTS)))):
                print("not compiled:", failure)
    else:
        main(float(sys.argv[1]), *sys.argv[2:])
