"""Tile shapes and launch parameters by head dim, dtype and architecture: a fixed table, no tuning.

The numbers come from compiler reports and sweeps on a GPU (NOTES.md); `tests/test_triton.py`
compiles every entry for each architecture and looks at registers, spills and shared memory.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How a scan is cut: tokens a chunk, columns of c a program, and the launch's parameters.

    `programs_per_sm` is how many programs a multiprocessor holds at once, by registers and shared
    memory; the planner fills that many slots. With `consumers` the tile is one of the
    warp-specialised kernel: that many warpgroups take 64 columns each, and `num_stages` is the length
    of its ring.
    """

    chunk: int
    width: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    consumers: int = 0


def padded(dim: int) -> int:
    """Columns of the block that holds a head dim: the next power of two, 32 at least."""
    return max(32, 1 << (dim - 1).bit_length())


def _tile(chunk: int, width: int, num_warps: int, num_stages: int, programs_per_sm: int) -> Tile:
    return Tile(
        chunk=chunk,
        width=width,
        num_warps=num_warps,
        num_stages=num_stages,
        programs_per_sm=programs_per_sm,
    )


# Kinds of arithmetic: 16-bit products, products of 16-bit halves ("high"), float32 without tensor
# cores, whose operands lie in registers (so the tiles are small, and 256 columns spill).
FLOAT32 = {
    ("float32", 32): _tile(16, 32, 8, 1, 1),
    ("float32", 64): _tile(16, 32, 8, 1, 1),
    ("float32", 128): _tile(16, 32, 8, 1, 1),
    ("float32", 256): _tile(16, 16, 8, 1, 1),
}
HOPPER = FLOAT32 | {
    ("16-bit", 32): _tile(64, 64, 4, 3, 2),
    ("16-bit", 64): _tile(64, 64, 4, 4, 2),
    ("16-bit", 128): _tile(64, 128, 8, 3, 1),
    ("16-bit", 256): _tile(64, 64, 8, 2, 1),
    ("16-bit backward", 32): _tile(64, 64, 4, 3, 2),
    ("16-bit backward", 64): _tile(64, 64, 4, 3, 2),
    ("16-bit backward", 128): _tile(64, 64, 4, 4, 1),
    ("16-bit backward", 256): _tile(64, 64, 8, 2, 1),
    ("high", 32): _tile(64, 64, 4, 3, 2),
    ("high", 64): _tile(64, 64, 4, 3, 2),
    ("high", 128): _tile(64, 64, 8, 2, 1),
    ("high", 256): _tile(64, 64, 8, 2, 1),
}
AMPERE = FLOAT32 | {
    ("16-bit", 32): _tile(64, 32, 4, 2, 2),
    ("16-bit", 64): _tile(64, 64, 4, 2, 2),
    ("16-bit", 128): _tile(64, 64, 8, 2, 1),
    ("16-bit", 256): _tile(32, 32, 4, 2, 2),
    ("high", 32): _tile(64, 32, 4, 2, 2),
    ("high", 64): _tile(64, 64, 4, 2, 2),
    ("high", 128): _tile(64, 64, 8, 2, 1),
    ("high", 256): _tile(32, 32, 8, 2, 1),
}


def _warp_tile(consumers: int, num_stages: int) -> Tile:
    return Tile(
        chunk=64,
        width=64 * consumers,
        num_warps=4,
        num_stages=num_stages,
        programs_per_sm=1,
        consumers=consumers,
    )


# Of the warp-specialised kernel, which the architecture of one GPU generation alone can run.
WARP_SPECIALIZED = {
    ("16-bit", 64): _warp_tile(1, 4),
    ("16-bit", 128): _warp_tile(1, 4),
    ("16-bit backward", 64): _warp_tile(1, 4),
    ("16-bit backward", 128): _warp_tile(2, 3),
}

for _dim in (32, 64, 128, 256):
    AMPERE["16-bit backward", _dim] = AMPERE["16-bit", _dim]


def warp_tile(key_dim: int, value_dim: int, kind: str, capability: int) -> Tile | None:
    """Tile of the warp-specialised kernel, None where it doesn't take such a call."""
    dims = padded(key_dim), padded(value_dim)
    return WARP_SPECIALIZED.get((kind, max(dims))) if capability == 9 and min(dims) >= 64 else None


def scan_tile(dim: int, kind: str, capability: int) -> Tile:
    """Tile of plain scans over `dim` columns: a kind of arithmetic, a device's major capability."""
    table = HOPPER if capability >= 9 else AMPERE
    return table[kind, padded(dim)]


def decode_width(block_k: int) -> int:
    """Values a program of a decoding step takes: 32 KiB of state, 64 registers a thread."""
    return 8192 // block_k
