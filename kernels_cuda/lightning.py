"""Scans of lightning attention on a GPU: what is launched with which tables, operands and tiles.

Legend: B batch, H heads, T tokens, K key dim, V value dim, D either; U work units, N chains.

`src/scan.cu` holds the equations. Tensors are `[B, H, T, D]` with a contiguous last dimension,
log_decay `[H]` float32, all on one device; states `[B or documents, H, K, V]` float32, contiguous.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache

import torch
from torch import Tensor

from kernels_cuda import module, tiles
from kernels_cuda.module import Instance
from kernels_cuda.tensor_map import MAP_BYTES
from kernels_cuda.tiles import Tile

ELEMENTS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
ALIGNMENT = 16  # bytes: what a copy of the kernels takes


Scan = tuple[Tensor, Tensor, Tensor, Tensor]
"""Operands a, b, c `[B, H, T, D]` of one scan and where its result goes, all as `aligned` gives them."""

States = tuple[Tensor | None, Tensor | None]
"""States `[rows, K, V]` float32 that the scans of one direction in time start from: those of the
sequences, and those of a workspace."""

NO_STATES: States = (None, None)


# Structs that kernels take, as in src/work.cuh and src/prefix.cu.
_SCAN_PARAMS = struct.Struct(
    "48q"  # address and three strides of a, b, c, out of three scans
    "2q"  # units, log_decay
    "4q"  # initial states and workspace of scans forward, and backward in time
    "q"  # final_states
    "f7i"  # scale, then counts in their order
)
_NO_SCAN = (0,) * 16
_MAPS_BYTES = 3 * 4 * MAP_BYTES
_PADDING = bytes(-_SCAN_PARAMS.size % 64)  # a struct that holds maps is aligned to 64 bytes
_PREFIX_PARAMS = struct.Struct("4q2i")


PREFIX = Instance(name="prefix", arguments="256", num_threads=256)


_hopper = True


def use_hopper(choice: bool) -> None:
    """Let calls, and backwards of earlier ones, run the kernels for Hopper where they can, or none."""
    global _hopper
    _hopper = choice


@contextmanager
def hopper_kernels(choice: bool = True) -> Iterator[None]:
    """`use_hopper` for calls inside the block."""
    before = _hopper
    use_hopper(choice)
    try:
        yield
    finally:
        use_hopper(before)


def tile_of(
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
    *,
    backward: bool = False,
    num_tokens: int = 0,
) -> Tile:
    """Tile of the scans of a call, the same for all of them so that they share a schedule.

    `num_tokens` counts those of all heads; 0 stands for many.
    """
    kind = "high" if precision == "high" else "backward" if backward else "forward"
    dims = max(key_dim, value_dim), min(key_dim, value_dim)
    return _tile_of(*dims, device, kind, _hopper, num_tokens)


@lru_cache(1024)  # packs differ in length
def _tile_of(
    large: int, small: int, device: torch.device, kind: str, hopper: bool, num_tokens: int
) -> Tile:
    capability = module.loader.capability(device)
    special = None
    if hopper and capability[0] == 9:
        special = tiles.hopper_tile(large, small, kind, num_tokens)
    return special or tiles.scan_tile(large, capability)


@cache
def instance_of(b_dim: int, dtype: torch.dtype, tile: Tile, precision: str) -> Instance:
    """The kernel that runs scans with `b_dim` columns of b."""
    make = tiles.hopper_instance if tile.consumers else tiles.scan_instance
    return make(ELEMENTS[dtype], b_dim, tile, precision == "high")


def why_not(
    key_dim: int, value_dim: int, dtype: torch.dtype, device_type: str, precision: str
) -> str | None:
    """Why the kernels of a forward can't be had (its dims and dtype being right), None if they can.

    Those of its backward are compiled when the first one comes.
    """
    device = module.current_device(device_type)
    kind = key_dim, value_dim, dtype, device, precision
    chosen = {tile_of(*kind, num_tokens=n) for n in (0, 1)}
    dims = {key_dim, value_dim}
    instances = [instance_of(n, dtype, tile, precision) for tile in chosen for n in dims]
    limit = tiles.shared_kib(module.loader.capability(device)) << 10
    needed = max(instance.shared_bytes for instance in instances)
    if needed > limit:
        return f"needs {needed} bytes of shared memory a block, and a GPU like this one has {limit}"
    return module.why_not_compiled([*instances, PREFIX], device)


def aligned(x: Tensor) -> Tensor:
    """The tensor, or a copy where its rows don't lie at different multiples of 16 bytes."""
    s_b, s_h, s_t, s_d = x.stride()
    together = x.data_ptr() | (s_b | s_h | s_t) * x.itemsize
    if together % ALIGNMENT == 0 and s_b > 0 and s_h > 0 and s_t > 0 and s_d == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def launch_scans(
    scans: list[Scan],
    units: Tensor,
    heads_per_row: int,
    log_decay: Tensor,
    tile: Tile,
    *,
    num_back: int = 0,
    num_key: int = 0,
    forward_states: States = NO_STATES,
    back_states: States = NO_STATES,
    final: Tensor | None = None,
    first_kept: int = 0,
    scale: float = 1.0,
    precision: str = "default",
    output: bool = True,
) -> None:
    """Run up to three scans of the same shape in one grid.

    `units` `[U, 9]` int32 are rows of `Unit` (src/work.cuh), the longest first; with
    `heads_per_row` > 1 a row stands for that many heads, its state rows being those of the first.
    The last `num_back` run backward in time; the first `num_key` have keys (or gradients of keys)
    as c. Scans from `first_kept` on leave their last states in `final`. Without `output` only
    states are computed, and a and out are not touched.
    """
    _, b, c, _ = scans[0]
    operands = [n for scan in scans for x in scan for n in (x.data_ptr(), *x.stride()[:3])]
    states = *forward_states, *back_states, final
    params = _SCAN_PARAMS.pack(
        *operands,
        *_NO_SCAN * (3 - len(scans)),
        units.data_ptr(),
        log_decay.data_ptr(),
        *map(_pointer, states),
        scale,
        len(scans),
        len(scans) - num_back,
        num_key,
        first_kept,
        heads_per_row,
        c.shape[3],
        output,
    )
    if tile.consumers:
        maps = b"".join(module.loader.tensor_map(x) for scan in scans for x in scan)
        params = maps.ljust(_MAPS_BYTES, b"\0") + params + _PADDING
    grid = units.shape[0] * heads_per_row * len(scans) * (c.shape[3] // tile.width)
    instance = instance_of(b.shape[3], b.dtype, tile, precision)
    module.kernel(instance, b.device)(grid, params, b.device)


def launch_prefix(
    states: Tensor, chains: Tensor, log_decay: Tensor, initial: Tensor | None, tile: Tile
) -> None:
    """Make of what segments add to the states `[rows, K V]` the states that enter them, in place.

    A row of `chains` `[N, 5]` int32: head, row of the initial states, first workspace row, number
    of workspace rows, chunks a row.
    """
    size = states.shape[1]
    pointers = map(_pointer, (states, chains, log_decay, initial))
    params = _PREFIX_PARAMS.pack(*pointers, size, tile.chunk)
    grid = chains.shape[0] * (size // PREFIX.num_threads)
    module.kernel(PREFIX, states.device)(grid, params, states.device)
