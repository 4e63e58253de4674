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
    """How a scan is cut: tokens a chunk, stages of the ring of chunks.

    `programs_per_sm` is how many a multiprocessor holds at once; the planner fills that many slots. With
    `consumers` the tile is one of the kernel for Hopper: so many warpgroups take 64 columns each. Both
    programs of a cluster of two share their copies of a and b.
    """

    num_stages: int
    programs_per_sm: int
    chunk: int = CHUNK
    consumers: int = 0
    cluster_size: int = 1

    @property
    def width(self) -> int:
        """Columns of c a program."""
        return WIDTH * max(1, self.consumers)


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
    scores, strips = 2 * CHUNK * CHUNK * (1 + split), 2 * CHUNK * WIDTH
    weights = 4 * 4 * CHUNK
    return Instance(
        name="scan",
        arguments=f"{element}, {b_dim}, {tile.num_stages}, {str(split).lower()}",
        num_threads=2 * WIDTH,
        shared_bytes=tile.num_stages * stage + scores + strips + weights,
    )


COMMON_BYTES = 4 * 4 * CHUNK + 72  # `Common` of src/hopper_consumer.cuh

# Of the kernel for Hopper, by the larger head dim. At 128 a "wide" scan's two consumers share their
# copies and scores; of a "narrow" one two blocks share copies in L2, and half as many segments are
# needed. "cluster" is another way to share copies, which nothing asks for unless it is put in
# another's place. All by the times in NOTES.md.
HOPPER_SCAN = {
    (64, "narrow"): Tile(num_stages=4, programs_per_sm=1, consumers=1),
    (64, "high"): Tile(num_stages=3, programs_per_sm=2, consumers=1),
    (128, "narrow"): Tile(num_stages=4, programs_per_sm=1, consumers=1),
    (128, "wide"): Tile(num_stages=3, programs_per_sm=1, consumers=2),
    (128, "cluster"): Tile(num_stages=4, programs_per_sm=1, consumers=1, cluster_size=2),
    (128, "high"): Tile(num_stages=3, programs_per_sm=1, consumers=2),
}
SHORT = 16 << 20  # tokens of all heads up to which a forward is narrow


def hopper_tile(large: int, small: int, kind: str, num_tokens: int) -> Tile | None:
    """Tile of the kernel for Hopper; `kind` and tokens are those of `kernels_cuda.lightning.tile_of`."""
    if kind == "high":
        return HOPPER_SCAN[large, "high"] if large == small else None
    if large == 64 or large != small:
        return HOPPER_SCAN[large, "narrow"]
    short = kind == "forward" and 0 < num_tokens <= SHORT
    return HOPPER_SCAN[128, "narrow" if short else "wide"]


def hopper_instance(element: str, b_dim: int, tile: Tile, split: bool) -> Instance:
    """The scan kernel for Hopper, for 16-bit elements and a dim of b; `split` as above."""
    box = 2 * CHUNK * 64
    stage = box * (2 * b_dim // 64 + tile.consumers)
    scores_and_out = box * (2 + tile.consumers * (2 - split))
    sizes = map(str, (b_dim, tile.consumers, tile.num_stages))
    barriers = 2 * 8 * tile.num_stages
    return Instance(
        name="hopper_scan",
        arguments=", ".join([element, *sizes, str(split).lower()]),
        num_threads=160 if tile.consumers == 1 else 384,
        cluster_size=tile.cluster_size,
        shared_bytes=tile.num_stages * stage + scores_and_out + COMMON_BYTES + barriers,
    )
