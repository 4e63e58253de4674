"""Lightning attention on a GPU: forward, backward and final states, from planned tables of work.

`src/scan.cu` holds the equations and `launch` what starts them. Tensors are `[B, H, T, D]` with a
contiguous last dimension, log_decay `[H]` float32, all on one device; states
`[B or documents, H, K, V]` float32, contiguous.
"""

import torch
from torch import Tensor

from kernels_cuda.launch import (
    Scan,
    Schedule,
    States,
    aligned,
    entering_states,
    hopper_kernels,
    launch_scans,
    tile_of,
    why_not,
)

__all__ = [
    "backward",
    "empty_output",
    "final_states",
    "forward",
    "hopper_kernels",
    "scans_of_backward",
    "tile_of",
    "why_not",
]


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
    query, key, value, grad_output = (aligned(x) for x in (query, key, value, grad_output))
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
