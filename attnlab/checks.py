"""Checks of an op's arguments: each raises a `ValueError` that says what was expected and came.

Shapes, dtypes and devices are checked on every call. Values (decay signs, document bounds) need a
host copy: what was read of a tensor on a device is remembered until the tensor changes or dies, so
a loop that calls an op with the same decays synchronises once.
"""

import itertools
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)
_PRECISIONS = ("default", "high", "tf32")
_MAX_CHECKED = 256  # vectors whose values are known to be right

T = TypeVar("T")


class _Memory(NamedTuple):
    """What was read of a tensor, and of which version of it."""

    alive: weakref.ref
    version: int
    values: dict[Callable, Any]


_memories: dict[int, _Memory] = {}


def remembered(tensor: Tensor, read: Callable[[Tensor], T]) -> T:
    """`read` of a small tensor's host copy, remembered by the tensor's identity and version.

    A tensor on the CPU is read anew, since it may share its memory with what changes it unseen; so
    is an inference tensor, which has no version.
    """
    if tensor.is_cpu:
        return read(tensor.detach())
    found = recall(tensor, read)
    if found is not None:
        return found
    value = read(tensor.detach().cpu())
    if not tensor.is_inference():
        key, memory = id(tensor), _memories.get(id(tensor))
        if memory is None or memory.alive() is not tensor or memory.version != tensor._version:
            alive = weakref.ref(tensor, lambda _: _memories.pop(key, None))
            memory = _memories[key] = _Memory(alive, tensor._version, {})
        memory.values[read] = value
    return value


def recall(tensor: Tensor, read: Callable[[Tensor], T]) -> T | None:
    """What `remembered` returns, if it needs no copy from a device; else None."""
    if tensor.is_cpu:
        return read(tensor.detach())
    memory = _memories.get(id(tensor))
    if memory is None or memory.alive() is not tensor or memory.version != tensor._version:
        return None
    return memory.values.get(read)


def values_of(host_copy: Tensor) -> tuple:
    """Numbers of a vector on the host, as `read` for `remembered`."""
    return tuple(host_copy.tolist())


def mismatch(expected: str, got: object) -> ValueError:
    """The error to raise where something else came than was expected."""
    return ValueError(f"expected {expected}, got {got}")


def expect(condition: bool, expected: str, got: object) -> None:
    """Raise `ValueError` unless the condition holds.

    The words are made on every call; where an op's every call comes by, `raise mismatch` saves that.
    """
    if not condition:
        raise mismatch(expected, got)


def check_qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Query, key, value are `[B, H, T, D]` of one dtype and device, fit for each other."""
    dtype, device = query.dtype, query.device
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise mismatch(f"{name} of shape [B, H, T, D]", f"shape {list(x.shape)}")
        if x.dtype not in _FLOATS:
            raise mismatch(f"{name} of a floating dtype", x.dtype)
        if x.dtype != dtype:
            raise mismatch(f"{name} of query's dtype {dtype}", x.dtype)
        if x.device != device:
            raise mismatch(f"{name} on query's device {device}", x.device)
    batch, _, _, key_dim = query.shape
    for name, x in (("key", key), ("value", value)):
        if x.shape[0] != batch:
            raise mismatch(f"{name} with batch {batch}", x.shape[0])
    if key.shape[3] != key_dim:
        raise mismatch(f"key dim {key_dim} as query", key.shape[3])
    if key_dim == 0 or value.shape[3] == 0:
        raise mismatch("head dims > 0", list(value.shape))
    if key.shape[1:3] != value.shape[1:3]:
        expected = f"value with key's heads and tokens {list(key.shape[1:3])}"
        raise mismatch(expected, list(value.shape[1:3]))


def check_log_decay(log_decay: Tensor, key: Tensor) -> None:
    """log_decay is `[H]` float32 (float64 beside float64 inputs), on key's device or the CPU."""
    heads = key.shape[1]
    if log_decay.shape != (heads,) or log_decay.dtype not in (torch.float32, torch.float64):
        raise mismatch(f"log_decay of shape [{heads}] in float32", _described(log_decay))
    if not log_decay.is_cpu and log_decay.device != key.device:
        raise mismatch(f"log_decay on {key.device} or the CPU", _described(log_decay))


def check_log_decay_values(log_decay: Tensor) -> None:
    """Natural logs of decays in (0, 1]: all <= 0, none NaN."""
    _check_decays(remembered(log_decay, values_of))


@lru_cache(_MAX_CHECKED)
def _check_decays(values: tuple[float, ...]) -> None:
    wrong = [x for x in values if not x <= 0]  # NaN compares false
    expect(not wrong, "log_decay <= 0 and not NaN", wrong[:4])


def check_state(state: Tensor | None, name: str, shape: tuple[int, ...], like: Tensor) -> None:
    """A state is `[*, H, K, V]` float32 (float64 beside float64 inputs) on the inputs' device."""
    if state is None:
        return
    if state.shape != shape:
        raise mismatch(f"{name} of shape {list(shape)}", list(state.shape))
    dtype = torch.promote_types(like.dtype, torch.float32)
    if state.dtype not in (torch.float32, dtype):
        raise mismatch(f"{name} in {dtype}", state.dtype)
    if state.device != like.device:
        raise mismatch(f"{name} on {like.device}", state.device)


def check_precision(precision: str, dtype: torch.dtype) -> None:
    """One of the three precisions; "tf32" for float32 inputs alone."""
    if precision not in _PRECISIONS:
        raise mismatch(f"precision among {', '.join(_PRECISIONS)}", repr(precision))
    if precision == "tf32" and dtype != torch.float32:
        raise mismatch("float32 inputs with precision 'tf32'", dtype)


def check_cu_seqlens(cu_seqlens: Tensor, name: str, device: torch.device) -> None:
    """Bounds of packed documents are `[N+1]` int32 or int64, on the inputs' device or the CPU."""
    shape_ok = cu_seqlens.ndim == 1 and cu_seqlens.shape[0] >= 2
    if not shape_ok or cu_seqlens.dtype not in _INTEGERS:
        expected = f"{name} of shape [documents + 1] in int32 or int64"
        raise mismatch(expected, _described(cu_seqlens))
    if not cu_seqlens.is_cpu and cu_seqlens.device != device:
        raise mismatch(f"{name} on {device} or the CPU", _described(cu_seqlens))


def check_cu_seqlens_values(cu_seqlens: Tensor, name: str, num_tokens: int) -> None:
    """Bounds start at 0, never fall, and end at the number of packed tokens."""
    _check_bounds(remembered(cu_seqlens, values_of), name, num_tokens)


@lru_cache(_MAX_CHECKED)
def _check_bounds(bounds: tuple[int, ...], name: str, num_tokens: int) -> None:
    expect(bounds[0] == 0, f"{name} to start at 0", bounds[0])
    falls = [n for n, (start, stop) in enumerate(itertools.pairwise(bounds)) if stop < start]
    expect(not falls, f"{name} sorted", f"a fall after entry {falls[0] if falls else None}")
    expect(bounds[-1] == num_tokens, f"{name} to end at the {num_tokens} tokens", bounds[-1])


def check_slots(slots: Tensor | None, batch: int, device: torch.device) -> None:
    """Slots are `[B]` integers on the inputs' device."""
    if slots is None:
        return
    if slots.shape != (batch,) or slots.dtype not in _INTEGERS or slots.device != device:
        expected = f"slots of shape [{batch}] in int32 or int64 on {device}"
        raise mismatch(expected, _described(slots))


def check_lengths(lengths: Tensor, batch: int, device: torch.device) -> None:
    """Lengths are `[B]` integers on the inputs' device."""
    if lengths.shape != (batch,) or lengths.dtype not in _INTEGERS or lengths.device != device:
        expected = f"lengths of shape [{batch}] in int32 or int64 on {device}"
        raise mismatch(expected, _described(lengths))


def check_length_values(lengths: Tensor, span: int) -> None:
    """Lengths on the CPU lie within the slots that are looked at; a device is not waited for."""
    if lengths.is_cpu and lengths.numel():
        low, high = (int(x) for x in lengths.aminmax())
        if low < 0 or high > span:
            raise mismatch(f"lengths in [0, {span}]", f"{low} to {high}")


def check_slot_values(slots: Tensor | None, num_slots: int) -> None:
    """Slots are rows of the state pool, none twice (two sequences would share a state)."""
    if slots is not None:
        _check_rows(remembered(slots, values_of), num_slots)


@lru_cache(_MAX_CHECKED)
def _check_rows(slots: tuple[int, ...], num_slots: int) -> None:
    outside = [n for n in slots if not 0 <= n < num_slots]
    expect(not outside, f"slots in [0, {num_slots})", outside[:4])
    expect(len(set(slots)) == len(slots), "distinct slots", list(slots[:8]))


def _described(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype} on {x.device}"
