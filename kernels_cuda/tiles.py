"""Instances of the scan kernel by head dim and architecture: a fixed table, no tuning.

`tests/test_cuda_compile.py` compiles every entry and looks at registers, spills and shared memory.
"""

from dataclasses import dataclass

from kernels_cuda.module import Instance

CHUNK = 64  # tokens
WIDTH = 64  # columns of c that a block takes, with four warps
DIMS = (64, 128)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How a scan is cut: tokens a chunk, columns of c a program, stages of the ring of chunks.

    `programs_per_sm` is how many a multiprocessor holds at once; the planner fills that many slots.
    """

    num_stages: int
    programs_per_sm: int
    chunk: int = CHUNK
    width: int = WIDTH


# By the shared memory of a multiprocessor in KiB, which tells architectures apart here, and by the
# larger head dim.
SCAN = {
    (227, 64): Tile(num_stages=3, programs_per_sm=2),
    (227, 128): Tile(num_stages=2, programs_per_sm=2),
    (163, 64): Tile(num_stages=2, programs_per_sm=2),
    (163, 128): Tile(num_stages=3, programs_per_sm=1),
    (99, 64): Tile(num_stages=3, programs_per_sm=1),
    (99, 128): Tile(num_stages=2, programs_per_sm=1),
}


def shared_kib(capability: tuple[int, int]) -> int:
    """KiB of shared memory that a block can have: 227 on Hopper and data centre Blackwell."""
    if capability in ((8, 0), (8, 7)):
        return 163
    return 227 if capability[0] in (9, 10) else 99


def scan_tile(dim: int, capability: tuple[int, int]) -> Tile:
    """Tile of scans of which `dim` is the larger head dim."""
    return SCAN[shared_kib(capability), dim]


def scan_instance(element: str, b_dim: int, tile: Tile, split: bool) -> Instance:
    """The scan kernel for 16-bit elements ("bfloat16", "float16") and a dim of b.

    `split` lets every rounded operand enter as two halves.
    """
    stage = 2 * CHUNK * (2 * b_dim + WIDTH)
    scores, strips, weights = (
        2 * CHUNK * CHUNK * (1 + split),
        2 * CHUNK * WIDTH,
        4 * (3 * CHUNK + 1),
    )
    return Instance(
        name="scan",
        arguments=f"{element}, {b_dim}, {tile.num_stages}, {str(split).lower()}",
        num_threads=2 * WIDTH,
        shared_bytes=tile.num_stages * stage + scores + strips + weights,
    )
