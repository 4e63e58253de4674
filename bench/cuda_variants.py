"""Time variants of the CUDA kernels' tunables, and Triton's kernels, on one GPU, for a number of seconds.

    python bench/cuda_variants.py --compile   # fills the cache of compiled kernels first
    python bench/cuda_variants.py 90

A variant: a name, the passes it matters to, a tile of the table of the kernels for Hopper.
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
from attnlab.functional import lightning_attention
from kernels_cuda import lightning, module, tiles
from kernels_cuda.tiles import Tile

KINDS = ("forward", "backward", "high")
SHAPES = {
    128: [
        *((1, 64, 65536), (8, 16, 8192), (1, 64, 4096), (1, 64, 512)),
        *((1, 1, 1 << 22), (1, 16, 1 << 20)),
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
    promotion: int = 3  # of a box to L2: 0 none, 1 64 B, 2 128 B, 3 256 B
    backend: str = "cuda"


def one(stages, per_sm=1):
    return Tile(num_stages=stages, programs_per_sm=per_sm, consumers=1)


def cluster(stages):
    return Tile(num_stages=stages, programs_per_sm=1, consumers=1, cluster_size=2)


def two(stages):
    return Tile(num_stages=stages, programs_per_sm=1, consumers=2, width=128)


def turns(stages):
    return Tile(num_stages=stages, programs_per_sm=1, consumers=2)


def paired(stages, per_sm=3, width=128):
    return Tile(num_stages=stages, programs_per_sm=per_sm, consumers=2, width=width, paired=True)


VARIANTS = [
    *(
        Variant(f"{kind} Triton", dim, kind, backend="triton")
        for dim in (128, 64)
        for kind in KINDS
    ),
    Variant("fwd128 1 consumer 4 stages", 128, "forward", one(4)),
    Variant("fwd128 1 consumer 4 stages, clusters of 2", 128, "forward", cluster(4)),
    Variant("fwd128 1 consumer 3 stages, clusters of 2", 128, "forward", cluster(3)),
    Variant("fwd128 1 consumer 3 stages", 128, "forward", one(3)),
    Variant("fwd128 1 consumer 4 stages, boxes to L2 by 128", 128, "forward", one(4), promotion=2),
    Variant("fwd128 2 consumers 3 stages", 128, "forward", two(3)),
    Variant("fwd128 2 consumers 2 stages", 128, "forward", two(2)),
    Variant("fwd128 2 consumers in turn, 4 stages", 128, "forward", turns(4)),
    Variant("fwd128 portable 2 stages x2", 128, "forward", hopper=False),
    Variant("bwd128 paired 3 stages", 128, "backward", paired(3)),
    Variant("bwd128 paired 3 stages, planned as 2 slots a SM", 128, "backward", paired(3, 2)),
    Variant("bwd128 paired 2 stages", 128, "backward", paired(2)),
    Variant("bwd128 apart 2 consumers 3 stages", 128, "backward", two(3)),
    Variant("bwd128 apart 1 consumer 4 stages", 128, "backward", one(4)),
    Variant("bwd128 portable", 128, "backward", hopper=False),
    Variant("high128 2 consumers 3 stages", 128, "high", two(3)),
    Variant("high128 1 consumer 4 stages", 128, "high", one(4)),
    Variant("fwd64 in turn 6 stages", 64, "forward", turns(6)),
    Variant("fwd64 in turn 5 stages", 64, "forward", turns(5)),
    Variant("fwd64 1 consumer 3 stages x2", 64, "forward", one(3, 2)),
    Variant("fwd64 1 consumer 6 stages", 64, "forward", one(6)),
    Variant("fwd64 portable", 64, "forward", hopper=False),
    Variant("bwd64 paired 5 stages", 64, "backward", paired(5, width=64)),
    Variant("bwd64 paired 5 stages, 2 slots a SM", 64, "backward", paired(5, 2, width=64)),
    Variant("bwd64 paired 4 stages", 64, "backward", paired(4, width=64)),
    Variant("bwd64 in turn 6 stages", 64, "backward", turns(6)),
    Variant("bwd64 1 consumer 3 stages x2", 64, "backward", one(3, 2)),
    Variant("bwd64 1 consumer 6 stages", 64, "backward", one(6)),
    Variant("bwd64 portable", 64, "backward", hopper=False),
]


@contextmanager
def applied(variant):
    from kernels_cuda import tensor_map

    before, promotion = dict(tiles.HOPPER_SCAN), tensor_map._PROMOTE_256B
    if variant.tile:
        tiles.HOPPER_SCAN[variant.dim, variant.kind] = variant.tile
    tensor_map._PROMOTE_256B = variant.promotion
    forget()
    try:
        with lightning.hopper_kernels(variant.hopper):
            yield
    finally:
        tiles.HOPPER_SCAN.clear()
        tiles.HOPPER_SCAN.update(before)
        tensor_map._PROMOTE_256B = promotion


def forget():
    from kernels_cuda import tensor_map

    for x in (
        module.kernel,
        lightning._tile_of,
        lightning.instance_of,
        lightning.grads_of,
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
        wanted = [lightning.instance_of(variant.dim, torch.bfloat16, tile, precision)]
        if tile.paired:
            wanted.append(lightning.grads_of(variant.dim, torch.bfloat16, tile))
        try:
            for instance in wanted:
                module.cubin(instance, "sm_90a")
        except Exception as error:
            return f"{variant.name}: {str(error)[:300]}"
    return None


def inputs_of(shape, dim):
    generator = torch.Generator("cuda").manual_seed(0)
    size = (*shape, dim)
    made = [
        torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator)
        for _ in range(4)
    ]
    return made, minimax_log_decay(shape[1], 0, 80).cuda()


def call_of(variant, tensors, g):
    q, k, v, do = tensors
    flags = {
        "backend": variant.backend,
        "precision": "high" if variant.kind == "high" else "default",
    }
    if variant.kind != "backward":
        return lambda: lightning_attention(q, k, v, g, **flags).output
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    output = lightning_attention(*leaves, g, **flags).output
    return lambda: torch.autograd.grad(output, leaves, do, retain_graph=True)


def milliseconds(call):
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(call, rep=40, return_mode="median")


def copy_gbps():
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / milliseconds(lambda: y.copy_(x)) / 1e6


def measure(variant, shape, tensors, g, rate, expected):
    """A line: time, share of the floor at a copy `rate`, distance from the first variant's result."""
    with applied(variant):
        call = call_of(variant, tensors, g)
        results = call()
        results = results if isinstance(results, tuple) else (results,)
        first = expected.setdefault((shape, variant.kind), [x.clone() for x in results])
        apart = max(
            ((x.float() - y.float()).norm() / y.float().norm()).item()
            for x, y in zip(results, first, strict=True)
        )
        ms = milliseconds(call)
    touched = 7 if variant.kind == "backward" else 4
    floor = touched * tensors[0].numel() * 2 / rate / 1e6
    return f"{ms:9.4f} ms {floor / ms:6.1%}  from the first {apart:.1e}"


def variants_of(dim, shape):
    """Those that a shape tells something of."""
    for variant in VARIANTS:
        short = shape[2] == 512 and variant.kind == "backward"
        other = variant.kind == "high" and shape != (1, 64, 65536)
        if variant.dim == dim and not short and not other:
            yield variant


def main(budget):
    start, rate, expected = time.perf_counter(), copy_gbps(), {}
    print(f"{torch.cuda.get_device_name()}: copy {rate:.0f} GB/s", flush=True)
    for dim, shape in [(dim, shape) for dim, shapes in SHAPES.items() for shape in shapes]:
        tensors, g = inputs_of(shape, dim)
        expected.clear()
        for variant in variants_of(dim, shape):
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
        main(float(sys.argv[1]))
