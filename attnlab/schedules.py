"""Schedules of the lightning kernels: a call's plan, as tables on its device, made once and remembered.

Legend: B batch, H heads, T tokens, K key dim, V value dim, N documents.

A call is planned from its lengths and decays (`attnlab.planner`). The tables that come of it are
remembered, so a repeated call costs no planning, no copy and no synchronisation. Values that only
a synchronisation could tell (under torch.compile; while a CUDA graph is captured, if they were not
seen before) count as unknown: the plan is then one that is right for all values.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from attnlab.checks import recall, remembered, values_of
from attnlab.planner import Machine, Plan, Unit, plan

MAX_REMEMBERED = 256


class Tile(Protocol):
    """How kernels cut a call: tokens a chunk, columns a program, programs a multiprocessor holds."""

    @property
    def chunk(self) -> int: ...  # noqa: D102
    @property
    def width(self) -> int: ...  # noqa: D102
    @property
    def programs_per_sm(self) -> int: ...  # noqa: D102


class Schedule(NamedTuple):
    """Tables int32 of work units on a device, as `launch_scans` and `launch_prefix` of kernels read them."""

    units: Tensor  # [U, 9]
    heads_per_row: int
    state_units: Tensor | None = None  # [U, 9]
    chains: Tensor | None = None  # [N, 5]
    num_workspace_rows: int = 0


_schedules: OrderedDict[tuple, Schedule] = OrderedDict()
_forced: tuple[str | None, int | None] = (None, None)  # mode, segments


@contextmanager
def forced_plan(mode: str, num_segments: int | None = None) -> Iterator[None]:
    """Let calls inside the block be planned in one mode, cut into `num_segments` (for tests)."""
    global _forced
    before, _forced = _forced, (mode, num_segments)
    try:
        yield
    finally:
        _forced = before


class Call(NamedTuple):
    """What a plan depends on: the tensors of a call, and how its scans share the machine."""

    key: Tensor  # [B, H, T, K]
    value: Tensor  # [B, H, T, V]
    log_decay: Tensor  # [H]
    cu_seqlens: Tensor | None  # [N + 1]
    tile: Tile
    may_read: bool  # whether values may be read at the cost of a synchronisation
    num_scans: int = 1  # that share a grid
    states_only: bool = False


def schedule_of(call: Call) -> Schedule:
    """Table of a call's work units, from memory where it was made before."""
    decays = _known_values(call.log_decay, call.may_read)
    bounds: tuple | None = (0, call.key.shape[2])
    if call.cu_seqlens is not None:
        bounds = _known_values(call.cu_seqlens, call.may_read)
    key, value = call.key, call.value
    remembered_as = (
        key.device, key.dtype, key.shape, value.shape[3], call[4], call[6:], bounds, decays, _forced
    )  # fmt: skip
    found = _schedules.get(remembered_as)
    if found is not None:
        _schedules.move_to_end(remembered_as)
        return found
    if bounds is None or is_capturing(key):
        return whole_sequences(call)
    _schedules[remembered_as] = planned_schedule(call, bounds, decays)
    if len(_schedules) > MAX_REMEMBERED:
        _schedules.popitem(last=False)
    return _schedules[remembered_as]


def planned_schedule(call: Call, bounds: tuple, decays: tuple | None) -> Schedule:
    """Plan a call whose bounds are known, and write its tables; unknown decays count as none."""
    batch, heads, device = call.key.shape[0], call.key.shape[1], call.key.device
    dims, tile = (call.key.shape[3], call.value.shape[3]), call.tile
    machine = Machine(
        slots=tile.programs_per_sm * num_multiprocessors(device),
        programs_per_unit=call.num_scans * -(-max(dims) // tile.width),
        chunk=tile.chunk,
        num_scans=call.num_scans,
    )
    mode, num_segments = _forced
    documents = list(itertools.pairwise(bounds))
    lengths = [stop - start for start, stop in documents] * batch
    planned = plan(lengths, decays or [0.0] * heads, machine, mode=mode, num_segments=num_segments)
    ranges = [(b, start, stop) for b in range(batch) for start, stop in documents]
    return on_device(planned, ranges, heads, tile.chunk, device, call.states_only)


def whole_sequences(call: Call) -> Schedule:
    """Whole sequences in order, made on the device from bounds that the host doesn't know."""
    batch, heads, num_tokens = call.key.shape[:3]
    device = call.key.device
    if call.cu_seqlens is None:
        row = torch.arange(batch, device=device)
        start, end = torch.zeros_like(row), torch.full_like(row, num_tokens)
    else:
        start, end = call.cu_seqlens[:-1].to(device), call.cu_seqlens[1:].to(device)
        row = torch.zeros_like(start)
    zero, state = torch.zeros_like(row), torch.arange(len(row), device=device) * heads
    columns = row, zero, start, end, zero, end - start, state, zero - 1, state
    return Schedule(torch.stack(columns, 1).to(torch.int32), heads)


def on_device(
    planned: Plan,
    ranges: Sequence[tuple[int, int, int]],
    heads: int,
    chunk: int,
    device: torch.device,
    states_only: bool,
) -> Schedule:
    """Write a plan as the table that the kernels read; `ranges` are batch, start, stop."""

    def row(unit: Unit, first_pass: bool) -> tuple[int, ...]:
        batch, start, stop = ranges[unit.sequence]
        state = unit.sequence * heads + unit.head
        warm, tokens = unit.warm, unit.tokens
        if states_only:
            warm, tokens = 0, unit.warm * chunk + unit.tokens
        place = batch, unit.head, start + unit.start, stop - unit.start, warm, tokens
        if first_pass:
            return *place, -1, -1, unit.workspace_row
        initial, final = state if unit.from_initial else -1, state if unit.is_last else -1
        return *place, initial, unit.workspace_row, final

    def table(rows: Sequence[tuple[int, ...]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32, device=device)

    units = [u for u in planned.units if u.is_last] if states_only else planned.units
    main = table([row(u, False) for u in units])
    if not planned.chains:
        return Schedule(main, planned.heads_per_unit)
    chains = [
        (c.head, c.sequence * heads + c.head, c.first_row, c.num_rows, c.chunks_per_row)
        for c in planned.chains
    ]
    first_pass = table([row(u, True) for u in planned.state_units])
    return Schedule(main, 1, first_pass, table(chains), planned.num_workspace_rows)


def is_capturing(x: Tensor) -> bool:
    """Whether what is done with a tensor now goes into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU, where programs of the interpreter run in turn."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _known_values(x: Tensor, may_read: bool) -> tuple | None:
    """Values of a small tensor; None if they can't be read."""
    known = recall(x, values_of)
    if known is None and may_read and not is_capturing(x):
        return remembered(x, values_of)
    return known
