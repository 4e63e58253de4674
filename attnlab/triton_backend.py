"""Backend "triton": plans the work of the kernels in `kernels_triton` and makes them custom ops.

Legend: B batch, H heads, T tokens, K key dim, V value dim, N documents, U work units.

A call is planned from its lengths and decays (`attnlab.planner`). The plan's table on the device is
remembered, so a repeated call costs no planning, no copy and no synchronisation. Values that only
a synchronisation could tell (under torch.compile; while a CUDA graph is captured, if they were not
seen before) count as unknown: the plan is then one that is right for all values.
"""

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from attnlab.checks import host_copy
from attnlab.planner import Machine, Plan, Unit, plan
from kernels_triton import lightning, lightning_decode

MAX_REMEMBERED = 256

_schedules: OrderedDict[tuple, lightning.Schedule] = OrderedDict()
_values: dict[int, tuple[weakref.ref, int, tuple]] = {}
_forced: dict[str, Any] = {}


@contextmanager
def forced_plan(mode: str, num_segments: int | None = None) -> Iterator[None]:
    """Let calls inside the block be planned in one mode, cut into `num_segments` (for tests)."""
    _forced.update(mode=mode, num_segments=num_segments)
    try:
        yield
    finally:
        _forced.clear()


@dataclass(frozen=True)
class _Call:
    """What a plan depends on."""

    key: Tensor
    value: Tensor
    log_decay: Tensor
    cu_seqlens: Tensor | None
    precision: str
    may_read: bool  # whether values may be read at the cost of a synchronisation

    def schedule(
        self, num_scans: int, *, states_only: bool = False, backward: bool = False
    ) -> lightning.Schedule:
        """Table of work units for scans that share a grid, from memory where it was made before."""
        batch, heads, num_tokens = self.key.shape[:3]
        dims = self.key.shape[3], self.value.shape[3]
        tile = lightning.tile_of(
            *dims, self.key.dtype, self.key.device, self.precision, backward=backward
        )
        programs = num_scans * -(-max(dims) // tile.width)
        slots = tile.programs_per_sm * _num_multiprocessors(self.key.device)
        machine = Machine(slots=slots, programs_per_unit=programs, chunk=tile.chunk)
        decays = _read(self.log_decay, self.may_read)
        bounds: tuple | None = (0, num_tokens)
        if self.cu_seqlens is not None:
            bounds = _read(self.cu_seqlens, self.may_read)
        key = self.key.device, batch, heads, bounds, decays, machine, states_only, *_forced.values()
        found = _schedules.get(key)
        if found is not None:
            _schedules.move_to_end(key)
            return found
        if bounds is None or _is_capturing(self.key.device):
            return self._whole_sequences()
        lengths = [b - a for a, b in itertools.pairwise(bounds)] * batch
        planned = plan(lengths, decays or [0.0] * heads, machine, **_forced)
        ranges = [
            (b, start, stop) for b in range(batch) for start, stop in itertools.pairwise(bounds)
        ]
        _schedules[key] = _on_device(
            planned, ranges, heads, tile.chunk, self.key.device, states_only
        )
        if len(_schedules) > MAX_REMEMBERED:
            _schedules.popitem(last=False)
        return _schedules[key]

    def _whole_sequences(self) -> lightning.Schedule:
        """Whole sequences in order, made on the device from bounds that the host doesn't know."""
        batch, heads, num_tokens = self.key.shape[:3]
        device = self.key.device
        if self.cu_seqlens is None:
            row = torch.arange(batch, device=device)
            start, end = torch.zeros_like(row), torch.full_like(row, num_tokens)
        else:
            start, end = self.cu_seqlens[:-1].to(device), self.cu_seqlens[1:].to(device)
            row = torch.zeros_like(start)
        zero, state = torch.zeros_like(row), torch.arange(len(row), device=device) * heads
        columns = row, zero, start, end, zero, end - start, state, zero - 1, state
        return lightning.Schedule(torch.stack(columns, 1).to(torch.int32), heads)


def _read(x: Tensor, may_read: bool) -> tuple | None:
    """Values of a small tensor, remembered while it lives unchanged; None if they can't be read."""
    if x.device.type == "cpu":
        return tuple(x.tolist())
    found = _values.get(id(x))
    if found is not None and found[0]() is x and found[1] == x._version:
        return found[2]
    if not may_read or _is_capturing(x.device):
        return None
    values = tuple(host_copy(x).tolist())
    if not x.is_inference():
        key = id(x)
        alive = weakref.ref(x, lambda _: _values.pop(key, None))
        _values[key] = (alive, x._version, values)
    return values


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on_device(
    planned: Plan,
    ranges: Sequence[tuple[int, int, int]],
    heads: int,
    chunk: int,
    device: torch.device,
    states_only: bool,
) -> lightning.Schedule:
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
        return lightning.Schedule(main, planned.heads_per_unit)
    chains = [
        (c.head, c.sequence * heads + c.head, c.first_row, c.num_rows, c.chunks_per_row)
        for c in planned.chains
    ]
    first_pass = table([row(u, True) for u in planned.state_units])
    return lightning.Schedule(main, 1, first_pass, table(chains), planned.num_workspace_rows)


def _decay_of(log_decay: Tensor, like: Tensor) -> Tensor:
    if log_decay.device == like.device:
        return log_decay.float()
    return _uploaded(tuple(log_decay.tolist()), like.device)


@lru_cache(MAX_REMEMBERED)
def _uploaded(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _contiguous_last(x: Tensor) -> Tensor:
    """The tensor itself, or a copy where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("attnlab::lightning_triton", mutates_args=())
def _lightning_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    return_final_state: bool,
    precision: str,
    may_read: bool,
) -> tuple[Tensor, Tensor]:
    """Output, and final states (empty unless asked for)."""
    query, key, value = (_contiguous_last(x) for x in (query, key, value))
    schedule = _Call(key, value, log_decay, cu_seqlens, precision, may_read).schedule(1)
    state = _empty_state(key, value, cu_seqlens, return_final_state)
    output = lightning.forward(
        query, key, value, _decay_of(log_decay, key), schedule,
        scale=scale,
        initial_state=None if initial_state is None else initial_state.float().contiguous(),
        final_state=state if return_final_state else None,
        precision=precision,
    )  # fmt: skip
    return output, state


def _empty_state(key: Tensor, value: Tensor, cu_seqlens: Tensor | None, needed: bool) -> Tensor:
    rows = key.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (rows, key.shape[1], key.shape[3], value.shape[3]) if needed else (0,)
    return key.new_empty(shape, dtype=torch.float32)


@_lightning_triton.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    return_final_state: bool,
    precision: str,
    may_read: bool,
) -> tuple[Tensor, Tensor]:
    output = query.new_empty(*query.shape[:3], value.shape[3])
    return output, _empty_state(key, value, cu_seqlens, return_final_state)


@torch.library.custom_op("attnlab::lightning_triton_backward", mutates_args=())
def _lightning_triton_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    grad_output: Tensor,
    grad_final_state: Tensor | None,
    scale: float,
    precision: str,
    may_read: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and initial state (empty without one)."""
    tensors = query, key, value, grad_output
    query, key, value, grad_output = (_contiguous_last(x) for x in tensors)
    num_scans = lightning.scans_of_backward(key.shape[3], value.shape[3])
    call = _Call(key, value, log_decay, cu_seqlens, precision, may_read)
    schedule = call.schedule(num_scans, backward=True)
    grad_state = _empty_state(key, value, cu_seqlens, initial_state is not None)
    grads = lightning.backward(
        query, key, value, _decay_of(log_decay, key), schedule, grad_output,
        None if grad_final_state is None else grad_final_state.contiguous(),
        scale=scale,
        initial_state=None if initial_state is None else initial_state.float().contiguous(),
        grad_initial_state=None if initial_state is None else grad_state,
        precision=precision,
    )  # fmt: skip
    return *grads, grad_state


@_lightning_triton_backward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    grad_output: Tensor,
    grad_final_state: Tensor | None,
    scale: float,
    precision: str,
    may_read: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    dq, dk, dv = (torch.empty_like(x, memory_format=contiguous) for x in (query, key, value))
    return dq, dk, dv, _empty_state(key, value, cu_seqlens, initial_state is not None)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.scale, _, ctx.precision, ctx.may_read = inputs[6:]
    ctx.set_materialize_grads(False)


def _autograd_backward(
    ctx: Any, grad_output: Tensor | None, grad_final_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    query, key, value, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
    if grad_output is None:
        grad_output = query.new_zeros(*query.shape[:3], value.shape[3])
    if grad_final_state is not None and grad_final_state.numel() == 0:
        grad_final_state = None
    dq, dk, dv, grad_state = torch.ops.attnlab.lightning_triton_backward(
        query, key, value, log_decay, initial_state, cu_seqlens, grad_output, grad_final_state,
        ctx.scale, ctx.precision, ctx.may_read,
    )  # fmt: skip
    no_more = (None,) * 5
    return dq, dk, dv, None, grad_state if initial_state is not None else None, *no_more


_lightning_triton.register_autograd(_autograd_backward, setup_context=_save_for_backward)


def lightning_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    precision: str = "default",
) -> tuple[Tensor, Tensor | None]:
    """Output `[B, H, T, V]` and final states (float32, `[B or documents, H, K, V]`) or None."""
    may_read = not torch.compiler.is_compiling()
    output, state = torch.ops.attnlab.lightning_triton(
        query, key, value, log_decay, initial_state, cu_seqlens,
        scale, return_final_state, precision, may_read,
    )  # fmt: skip
    return output, state if return_final_state else None


def lightning_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, cu_seqlens: Tensor, **flags: Any
) -> tuple[Tensor, Tensor | None]:
    """`lightning_attention` over packed documents."""
    return lightning_attention(query, key, value, log_decay, cu_seqlens=cu_seqlens, **flags)


@torch.library.custom_op("attnlab::lightning_state_triton", mutates_args=())
def _lightning_state_triton(
    key: Tensor, value: Tensor, log_decay: Tensor, initial_state: Tensor | None, may_read: bool
) -> Tensor:
    key, value = _contiguous_last(key), _contiguous_last(value)
    schedule = _Call(key, value, log_decay, None, "default", may_read).schedule(1, states_only=True)
    initial = None if initial_state is None else initial_state.float().contiguous()
    return lightning.final_states(
        key, value, _decay_of(log_decay, key), schedule, initial_state=initial
    )


@_lightning_state_triton.register_fake
def _(
    key: Tensor, value: Tensor, log_decay: Tensor, initial_state: Tensor | None, may_read: bool
) -> Tensor:
    return _empty_state(key, value, None, True)


def _save_for_state_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.may_read = inputs[4]


def _autograd_state_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of attention whose output has none: queries don't matter then."""
    key, value, log_decay, initial_state = ctx.saved_tensors
    nothing = torch.zeros_like(value)
    _, dk, dv, grad_state = torch.ops.attnlab.lightning_triton_backward(
        key, key, value, log_decay, initial_state, None, nothing, grad, 1.0, "default", ctx.may_read
    )
    return dk, dv, None, grad_state if initial_state is not None else None, None


_lightning_state_triton.register_autograd(
    _autograd_state_backward, setup_context=_save_for_state_backward
)


def lightning_state(
    key: Tensor, value: Tensor, log_decay: Tensor, *, initial_state: Tensor | None = None
) -> Tensor:
    """State `[B, H, K, V]` float32 after all tokens."""
    may_read = not torch.compiler.is_compiling()
    return torch.ops.attnlab.lightning_state_triton(key, value, log_decay, initial_state, may_read)


@torch.library.custom_op("attnlab::lightning_decode_triton_", mutates_args=("state",))
def _lightning_decode_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    state: Tensor,
    slots: Tensor | None,
    scale: float,
) -> Tensor:
    query, key, value = (_contiguous_last(x) for x in (query, key, value))
    decay = _decay_of(log_decay, query)
    return lightning_decode.decode_(query, key, value, decay, state, slots=slots, scale=scale)


@_lightning_decode_triton.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    state: Tensor,
    slots: Tensor | None,
    scale: float,
) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


def lightning_decode_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    scale: float = 1.0,
    precision: str = "default",
) -> Tensor:
    """Output `[B, H, 1, V]` of one token; `state` (any strides, values contiguous) is updated.

    Every precision is met, since all arithmetic is float32.

    Raises:
        ValueError: for a state whose last dimension is not contiguous.
    """
    if state.stride(3) != 1:
        raise ValueError(
            f"expected a state with a contiguous last dim, got stride {state.stride(3)}"
        )
    return torch.ops.attnlab.lightning_decode_triton_(
        query, key, value, log_decay, state, slots, scale
    )
