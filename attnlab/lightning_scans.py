"""Forward, backward and final states of lightning attention as scans, whoever's kernels run them.

Legend: B batch, H heads, T tokens, D either head dim; K key dim, V value dim; N documents.

A scan takes operands a, b, c and carries a state, the decayed sum of c b^T, which a reads. The output
is a scan forward in time of (q, k, v), dq one of (do, v, k); dk and dv are scans backward in time of
(v, do, q) and (k, q, do).

A package of kernels offers `tile_of`, `aligned`, `launch_scans` and `launch_prefix`, as
`kernels_triton.lightning.launch` describes them. Tensors are `[B, H, T, D]` as `aligned` gives them,
log_decay `[H]` float32, all on one device; states `[B or N, H, K, V]` float32, contiguous.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnlab.schedules import Schedule, Tile


class Scan(NamedTuple):
    """Operands of one scan, and where its result goes."""

    a: Tensor
    b: Tensor
    c: Tensor
    out: Tensor


class States(NamedTuple):
    """States `[rows, K, V]` float32 that the scans of one direction in time start from."""

    initial: Tensor | None = None
    workspace: Tensor | None = None


def forward(
    kernels: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    schedule: Schedule,
    tile: Tile,
    output: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    final_state: Tensor | None = None,
    precision: str = "default",
) -> None:
    """Fill `output` `[B, H, T, V]`; the states after the last tokens go to `final_state`, if given."""
    scan = Scan(query, key, value, output)
    flags: dict[str, Any] = {"scale": scale, "precision": precision}
    prepared = log_decay, schedule, tile
    workspace = _entering_states(kernels, scan, *prepared, initial_state, back=False, **flags)
    kernels.launch_scans(
        [scan], schedule.units, schedule.heads_per_row, log_decay, tile,
        forward_states=States(initial_state, workspace), final=final_state, **flags,
    )  # fmt: skip


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
    kernels: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    schedule: Schedule,
    tile: Tile,
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
    contiguous = torch.contiguous_format
    dq, dk, dv = (torch.empty_like(x, memory_format=contiguous) for x in (query, key, value))
    scan_dq = Scan(grad_output, value, key, dq)
    scan_dk = Scan(value, grad_output, query, dk)
    scan_dv = Scan(key, query, grad_output, dv)
    flags: dict[str, Any] = {"scale": scale, "precision": precision}
    forward_workspace, back_workspace = (
        _entering_states(kernels, scan, log_decay, schedule, tile, initial, back=back, **flags)
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
    launch, args = kernels.launch_scans, (schedule.units, schedule.heads_per_row, log_decay, tile)
    if scans_of_backward(key.shape[3], value.shape[3]) == 3:
        scans = [scan_dq, scan_dk, scan_dv]
        launch(scans, *args, num_back=2, num_key=2, first_kept=2, **states, **flags)
    else:
        scans = [scan_dq, scan_dk]
        launch(scans, *args, num_back=1, num_key=2, first_kept=2, **states, **flags)
        launch([scan_dv], *args, num_back=1, **states, **flags)
    return dq, dk, dv


def final_states(
    kernels: ModuleType,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    schedule: Schedule,
    tile: Tile,
    *,
    initial_state: Tensor | None = None,
) -> Tensor:
    """States `[B, H, K, V]` float32 after the last tokens, without the outputs."""
    states = log_decay.new_empty(*key.shape[:2], key.shape[3], value.shape[3])
    scan = Scan(key, key, value, value)  # of which a and out are not touched
    flags: dict[str, Any] = {"scale": 1.0, "precision": "default"}
    prepared = log_decay, schedule, tile
    workspace = _entering_states(kernels, scan, *prepared, initial_state, back=False, **flags)
    kernels.launch_scans(
        [scan], schedule.units, schedule.heads_per_row, log_decay, tile,
        forward_states=States(initial_state, workspace), final=states, output=False,
    )  # fmt: skip
    return states


def _entering_states(
    kernels: ModuleType,
    scan: Scan,
    log_decay: Tensor,
    schedule: Schedule,
    tile: Tile,
    initial: Tensor | None,
    *,
    back: bool,
    **flags: Any,
) -> Tensor | None:
    """First of two passes: states `[rows, K V]` that enter the segments, None where unneeded."""
    if schedule.state_units is None or schedule.chains is None:
        return None
    size = scan.b.shape[3] * scan.c.shape[3]
    states = log_decay.new_empty(schedule.num_workspace_rows, size)
    kernels.launch_scans(
        [scan], schedule.state_units, 1, log_decay, tile,
        num_back=int(back), final=states, output=False, **flags,
    )  # fmt: skip
    kernels.launch_prefix(states, schedule.chains, log_decay, initial, tile)
    return states
