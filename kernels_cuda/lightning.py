"""Lightning attention on a GPU: forward, backward and final states, from planned tables of work.

Legend: B batch, H heads, T tokens, K key dim, V value dim, D either; U work units, N chains.

`src/scan.cu` holds the equations. Tensors are `[B, H, T, D]` with a contiguous last dimension,
log_decay `[H]` float32, all on one device; states `[B or documents, H, K, V]` float32, contiguous.
"""

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels_cuda import module, tiles
from kernels_cuda.module import Instance
from kernels_cuda.tiles import Tile

ELEMENTS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
ALIGNMENT = 16  # bytes: what a copy of the kernels takes


class Schedule(Protocol):
    """Work units on the device, int32, and what they share; the longest come first.

    A row of `units` or `state_units` `[U, 9]`: batch, head, first token, end, warm chunks, tokens
    after those, row of the initial states (-1: zero), row of the workspace (-1: zero), row of the
    final states (-1: not kept). With `heads_per_row` > 1 a row stands for that many heads, and its
    state rows are those of the first. `state_units` are the first pass: their final states go to
    the workspace. A row of `chains` `[N, 5]`: head, row of the initial states, first workspace row,
    number of workspace rows, chunks a row.
    """

    units: Tensor
    heads_per_row: int
    state_units: Tensor | None
    chains: Tensor | None
    num_workspace_rows: int


class Scan(NamedTuple):
    """Operands `[B, H, T, D]` of one scan and where its result goes, rows at multiples of 16 bytes."""

    a: Tensor
    b: Tensor
    c: Tensor
    out: Tensor


class States(NamedTuple):
    """States `[rows, K, V]` float32 that the scans of one direction in time start from."""

    initial: Tensor | None = None
    workspace: Tensor | None = None


NO_STATES = States()


class _Operand(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("strides", c_int64 * 3))


class _ScanOperands(ctypes.Structure):
    _fields_ = (("a", _Operand), ("b", _Operand), ("c", _Operand), ("out", _Operand))


class _States(ctypes.Structure):
    _fields_ = (("initial", c_void_p), ("workspace", c_void_p))


class _ScanParams(ctypes.Structure):
    """`ScanParams` of src/work.cuh."""

    _fields_ = (
        ("scans", _ScanOperands * 3),
        ("units", c_void_p),
        ("log_decay", c_void_p),
        ("entering", _States * 2),
        ("final_states", c_void_p),
        ("scale", c_float),
        ("num_scans", c_int),
        ("first_back", c_int),
        ("num_key_scans", c_int),
        ("first_kept", c_int),
        ("heads_per_row", c_int),
        ("c_dim", c_int),
        ("with_output", c_int),
    )


class _PrefixParams(ctypes.Structure):
    """`PrefixParams` of src/prefix.cu."""

    _fields_ = (
        ("states", c_void_p),
        ("chains", c_void_p),
        ("log_decay", c_void_p),
        ("initial", c_void_p),
        ("size", c_int),
        ("chunk", c_int),
    )


PREFIX = Instance(name="prefix", arguments="256", num_threads=256)


@cache
def tile_of(
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
    *,
    backward: bool = False,
) -> Tile:
    """Tile of the scans of a call, the same for all of them so that they share a schedule."""
    return tiles.scan_tile(max(key_dim, value_dim), module.loader.capability(device))


@cache
def instance_of(b_dim: int, dtype: torch.dtype, tile: Tile, precision: str) -> Instance:
    """The kernel that runs scans with `b_dim` columns of b."""
    return tiles.scan_instance(ELEMENTS[dtype], b_dim, tile, precision == "high")


def why_not(
    key_dim: int, value_dim: int, dtype: torch.dtype, device_type: str, precision: str
) -> str | None:
    """Why the kernels of a call can't be had (its dims and dtype being right), None if they can."""
    device = module.current_device(device_type)
    tile = tile_of(key_dim, value_dim, dtype, device, precision)
    instances = [instance_of(dim, dtype, tile, precision) for dim in {key_dim, value_dim}]
    limit = tiles.shared_kib(module.loader.capability(device)) << 10
    needed = max(instance.shared_bytes for instance in instances)
    if needed > limit:
        return f"needs {needed} bytes of shared memory a block, and a GPU like this one has {limit}"
    return module.why_not_compiled([*instances, PREFIX], device)


def _aligned(x: Tensor) -> Tensor:
    """The tensor, or a copy where its rows don't start at multiples of 16 bytes."""
    together = x.data_ptr() | (x.stride(0) | x.stride(1) | x.stride(2)) * x.itemsize
    return (
        x
        if together % ALIGNMENT == 0 and x.stride(3) == 1
        else x.clone(memory_format=torch.contiguous_format)
    )


def _operand(x: Tensor) -> _Operand:
    return _Operand(x.data_ptr(), x.stride()[:3])


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


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

    The last `num_back` run backward in time; the first `num_key` have keys (or gradients of keys)
    as c. Scans from `first_kept` on leave their last states in `final`. Without `output` only
    states are computed, and a and out are not touched.
    """
    _, b, c, _ = scans[0]
    kept = [Scan(*(_aligned(x) for x in scan[:3]), scan.out) for scan in scans]
    operands = [_ScanOperands(*map(_operand, scan)) for scan in kept]
    params = _ScanParams(
        (_ScanOperands * 3)(*operands),
        units.data_ptr(),
        log_decay.data_ptr(),
        (_States * 2)(*(_States(*map(_pointer, s)) for s in (forward_states, back_states))),
        _pointer(final),
        scale,
        len(scans),
        len(scans) - num_back,
        num_key,
        first_kept,
        heads_per_row,
        c.shape[3],
        output,
    )
    grid = units.shape[0] * heads_per_row * len(scans) * (c.shape[3] // tile.width)
    instance = instance_of(b.shape[3], b.dtype, tile, precision)
    module.kernel(instance, b.device)(grid, params, b.device)


def entering_states(
    scan: Scan,
    log_decay: Tensor,
    schedule: Schedule,
    tile: Tile,
    initial: Tensor | None,
    *,
    back: bool,
    scale: float,
    precision: str,
) -> Tensor | None:
    """First of two passes: states `[rows, K, V]` that enter the segments, None where unneeded."""
    if schedule.state_units is None or schedule.chains is None:
        return None
    size = scan.b.shape[3] * scan.c.shape[3]
    states = log_decay.new_empty(schedule.num_workspace_rows, size)
    launch_scans(
        [scan], schedule.state_units, 1, log_decay, tile,
        num_back=int(back), final=states, scale=scale, precision=precision, output=False,
    )  # fmt: skip
    params = _PrefixParams(
        states.data_ptr(),
        schedule.chains.data_ptr(),
        log_decay.data_ptr(),
        _pointer(initial),
        size,
        tile.chunk,
    )
    grid = schedule.chains.shape[0] * (size // PREFIX.num_threads)
    module.kernel(PREFIX, states.device)(grid, params, states.device)
    return states


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    schedule: Schedule,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    final_state: Tensor | None = None,
    precision: str = "default",
) -> Tensor:
    """Output `[B, H, T, V]`; the states after the last tokens go to `final_state`, if given."""
    tile = tile_of(key.shape[3], value.shape[3], key.dtype, key.device, precision)
    scan = Scan(query, key, value, empty_output(query, value))
    flags = {"scale": scale, "precision": precision}
    workspace = entering_states(scan, log_decay, schedule, tile, initial_state, back=False, **flags)
    launch_scans(
        [scan], schedule.units, schedule.heads_per_row, log_decay, tile,
        forward_states=States(initial_state, workspace), final=final_state, **flags,
    )  # fmt: skip
    return scan.out


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """`[B, H, T, V]`, tokens before heads in memory where the queries have them so.

    A model that splits `[B, T, H K]` into heads can put them together again without a copy.
    """
    batch, heads, num_tokens, _ = query.shape
    if query.stride(2) > query.stride(1):
        return query.new_empty(batch, num_tokens, heads, value.shape[3]).transpose(1, 2)
    return query.new_empty(batch, heads, num_tokens, value.shape[3])


def scans_of_backward(key_dim: int, value_dim: int) -> int:
    """Scans of a backward that share a grid: all three, or those of dq and dk where K is not V."""
    return 3 if key_dim == value_dim else 2


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    schedule: Schedule,
    grad_output: Tensor,
    grad_final_state: Tensor | None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    grad_initial_state: Tensor | None = None,
    precision: str = "default",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; that of the initial state goes to `grad_initial_state`.

    The gradients are contiguous. Deterministic: no atomics.
    """
    dims = key.shape[3], value.shape[3]
    tile = tile_of(*dims, key.dtype, key.device, precision, backward=True)
    query, key, value, grad_output = (_aligned(x) for x in (query, key, value, grad_output))
    contiguous = torch.contiguous_format
    dq, dk, dv = (torch.empty_like(x, memory_format=contiguous) for x in (query, key, value))
    scan_dq = Scan(grad_output, value, key, dq)
    scan_dk = Scan(value, grad_output, query, dk)
    scan_dv = Scan(key, query, grad_output, dv)
    flags = {"scale": scale, "precision": precision}
    forward_workspace, back_workspace = (
        entering_states(scan, log_decay, schedule, tile, initial, back=back, **flags)
        for scan, initial, back in (
            (Scan(query, key, value, value), initial_state, False),
            (scan_dv, grad_final_state, True),
        )
    )
    states = {
        "forward_states": States(initial_state, forward_workspace),
        "back_states": States(grad_final_state, back_workspace),
        "final": grad_initial_state,
    }
    args = schedule.units, schedule.heads_per_row, log_decay, tile
    if scans_of_backward(*dims) == 3:
        scans = [scan_dq, scan_dk, scan_dv]
        launch_scans(scans, *args, num_back=2, num_key=2, first_kept=2, **states, **flags)
    else:
        scans = [scan_dq, scan_dk]
        launch_scans(scans, *args, num_back=1, num_key=2, first_kept=2, **states, **flags)
        launch_scans([scan_dv], *args, num_back=1, **states, **flags)
    return dq, dk, dv


def final_states(
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    schedule: Schedule,
    *,
    initial_state: Tensor | None = None,
) -> Tensor:
    """States `[B, H, K, V]` float32 after the last tokens, without the outputs."""
    tile = tile_of(key.shape[3], value.shape[3], key.dtype, key.device, "default")
    states = log_decay.new_empty(*key.shape[:2], key.shape[3], value.shape[3])
    scan = Scan(key, key, value, value)  # of which a and out are not touched
    workspace = entering_states(
        scan, log_decay, schedule, tile, initial_state, back=False, scale=1.0, precision="default"
    )
    launch_scans(
        [scan], schedule.units, schedule.heads_per_row, log_decay, tile,
        forward_states=States(initial_state, workspace), final=states, output=False,
    )  # fmt: skip
    return states
