"""Launchers of the scans: tables of work units, operands as descriptors or pointers, tiles.

Legend: B batch, H heads, T tokens, K key dim, V value dim, D either; U work units, N chains.
"""

from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia import hopper
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels_triton.launcher import Launcher, kind_of
from kernels_triton.lightning.scan import INTERPRETED, prefix_kernel, scan_kernel
from kernels_triton.lightning.warp_scan import warp_scan_kernel
from kernels_triton.tiles import Tile, padded, scan_tile, warp_tile

Scan = tuple[Tensor, Tensor, Tensor, Tensor]
"""Operands a, b, c `[B, H, T, D]` of one scan and where its result goes, `[B, H, T, D]`."""

States = tuple[Tensor | None, Tensor | None]
"""States `[rows, K, V]` float32 that the scans of one direction in time start from: those of the
sequences, and those of a workspace."""

NO_STATES: States = (None, None)
_launch_scan, _launch_warp_scan = Launcher(scan_kernel), Launcher(warp_scan_kernel)
_launch_prefix = Launcher(prefix_kernel)


class _Descriptor(TensorDescriptor):
    """A tensor for the copy engine, not checked again for what `_fits_tma` has seen."""

    def __post_init__(self) -> None:
        pass


class _SwizzledDescriptor(hopper.TensorDescriptor):
    """The same for the warp-specialised kernel, which says how a tile lies in shared memory."""

    def __post_init__(self) -> None:
        pass


@cache
def _swizzled(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for(list(block), element)


def _swizzled_operand(x: Tensor, chunk: int, cols: int) -> object:
    block = (1, 1, chunk, cols)
    return _SwizzledDescriptor(x, x.shape, x.stride(), list(block), _swizzled(block, x.dtype))


def _operand(x: Tensor, tile: Tile, cols: int, tma: bool) -> object:
    if tma:
        return _Descriptor(x, x.shape, x.stride(), [1, 1, tile.chunk, cols])
    return x, x.stride(0), x.stride(1), x.stride(2)


def _fits_tma(x: Tensor) -> bool:
    """Whether the copy engine takes the tensor: it wants addresses in steps of 16 bytes.

    The interpreter multiplies a descriptor's strides in 32 bits, so long ones go by pointers.
    """
    s_b, s_h, s_t, s_d = x.stride()
    if INTERPRETED.value:
        longest = max(s * n for s, n in zip((s_b, s_h, s_t), x.shape, strict=False))
        if longest * x.itemsize >= 2**31:
            return False
    together = x.data_ptr() | (s_b | s_h | s_t) * x.itemsize
    return together % 16 == 0 and s_b > 0 and s_h > 0 and s_t > 0 and s_d == 1


def aligned(x: Tensor) -> Tensor:
    """The tensor as kernels take it: itself, or a copy where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


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

    It is the same for any number of tokens.
    """
    return _tile_of(key_dim, value_dim, dtype, device, precision, backward)


@cache
def _tile_of(
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
    backward: bool,
) -> Tile:
    kind = _kind(dtype, precision, backward)
    capability = _capability(device)
    specialized = None if INTERPRETED.value else warp_tile(key_dim, value_dim, kind, capability)
    return specialized or scan_tile(max(key_dim, value_dim), kind, capability)


def _kind(dtype: torch.dtype, precision: str, backward: bool) -> str:
    """Kind of arithmetic, as the tables of tiles call it."""
    kind = "float32" if dtype == torch.float32 else "16-bit"
    if precision == "high" and kind == "16-bit":
        kind = "high"
    if INTERPRETED.value and kind == "float32":
        kind = "16-bit"  # float32's small tiles serve registers, and make the interpreter slow
    if backward and kind == "16-bit":
        kind = "16-bit backward"
    return kind


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

    A row of `units` `[U, 9]` int32, the longest first: batch, head, first token, end, warm chunks,
    tokens after those, row of the initial states (-1: zero), row of the workspace (-1: zero), row
    of the final states (-1: not kept). A scan forward in time reads from the first token up, one
    backward in time from the end down. With `heads_per_row` > 1 a row stands for that many heads,
    and its state rows are those of the first.

    The last `num_back` run backward in time; the first `num_key` have keys (or gradients of keys)
    as c. Scans from `first_kept` on leave their last states in `final`. Without `output` only
    states are computed, and a and out are not touched.
    """
    _, b, c, out = scans[0]
    num_scans = len(scans)
    tma = _capability(b.device) >= 9 and all(_fits_tma(x) for scan in scans for x in scan)
    if tile.consumers and not tma:
        fallback = "16-bit backward" if num_back else "16-bit"
        tile = scan_tile(max(b.shape[3], c.shape[3]), fallback, _capability(b.device))
    block_b, width = _block(b, c, tile)
    operands = [x for scan in scans for x in _operands(scan, tile, block_b, width, tma)]
    operands += [None] * (15 - len(operands))
    states = *forward_states, *back_states, final
    rows = [stride // out.shape[3] for stride in out.stride()[:3]]
    arguments = *operands, units, log_decay, *states, scale, heads_per_row, *rows
    constants = {
        "NUM_SCANS": num_scans, "FIRST_BACK": num_scans - num_back, "NUM_KEY_SCANS": num_key,
        "FIRST_KEPT": first_kept, "DB": b.shape[3], "DC": c.shape[3], "BB": block_b,
    }  # fmt: skip
    if tile.consumers:
        launch, own = _launch_warp_scan, {"HALVES": width // 64}
        own |= {"C": tile.chunk, "STAGES": tile.num_stages, "OUTPUT": output}
    else:
        launch, own = _launch_scan, {"BC": width}
        own |= {"C": tile.chunk, "NUM_STAGES": tile.num_stages, "OUTPUT": output, "TMA": tma}
        own["PRECISION"] = "tf32" if precision == "tf32" else "ieee"
        own["SPLIT"] = precision == "high" and b.dtype.itemsize == 2
    # Without TMA the operands' strides are arguments, on whose values Triton specialises.
    kind = kind_of(b.device, out, units, log_decay, *states) if tma else None
    num_programs = units.shape[0] * heads_per_row * num_scans * -(-c.shape[3] // width)
    launch((num_programs, 1, 1), arguments, constants | own, kind, num_warps=tile.num_warps)


def _block(b: Tensor, c: Tensor, tile: Tile) -> tuple[int, int]:
    """Columns of b, padded, and of c that a program takes."""
    if not tile.consumers:
        return padded(b.shape[3]), tile.width
    return max(64, padded(b.shape[3])), min(tile.width, 64 * -(-c.shape[3] // 64))


def _operands(scan: Scan, tile: Tile, block_b: int, width: int, tma: bool) -> list[object]:
    """A scan's tensors as a kernel takes them: a consumer's tiles of c and out are 64 wide."""
    cols = (block_b, block_b, width, width)
    if tile.consumers:
        cols = (block_b, block_b, 64, 64)
        taken = [_swizzled_operand(x, tile.chunk, n) for x, n in zip(scan, cols, strict=True)]
    else:
        taken = [_operand(x, tile, n, tma) for x, n in zip(scan, cols, strict=True)]
    return [*taken, scan[3]]


def launch_prefix(
    states: Tensor, chains: Tensor, log_decay: Tensor, initial: Tensor | None, tile: Tile
) -> None:
    """Make of what segments add to the states `[rows, K V]` the states that enter them, in place.

    A row of `chains` `[N, 5]` int32: head, row of the initial states, first workspace row, number
    of workspace rows, chunks a row.
    """
    size = states.shape[1]
    block = min(1024, triton.next_power_of_2(size))
    arguments = states, chains, log_decay, initial
    constants = {"SIZE": size, "BLOCK": block, "C": tile.chunk}
    grid = chains.shape[0], triton.cdiv(size, block), 1
    _launch_prefix(grid, arguments, constants, kind_of(states.device, *arguments))
