"""Checks of an op's arguments: each raises a `ValueError` that says what was expected and came.

Shapes, dtypes and devices are checked on every call. Values (decay signs, document bounds) need a
host copy: one is kept for each tensor until the tensor changes or dies, so a loop that calls an op
with the same decays synchronises once.
"""

import weakref

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)
_PRECISIONS = ("default", "high", "tf32")
_host_copies: dict[int, tuple[weakref.ref, int, Tensor]] = {}


def host_copy(tensor: Tensor) -> Tensor:
    """CPU copy of a small tensor, remembered by identity and version."""
    if tensor.device.type == "cpu":
        return tensor.detach()
    if tensor.is_inference():  # has no version, so a change would go unseen
        return tensor.cpu()
    found = _host_copies.get(id(tensor))
    if found is not None and found[0]() is tensor and found[1] == tensor._version:
        return found[2]
    copy, key = tensor.detach().cpu(), id(tensor)
    alive = weakref.ref(tensor, lambda _: _host_copies.pop(key, None))
    _host_copies[key] = (alive, tensor._version, copy)
    return copy


def expect(condition: bool, expected: str, got: object) -> None:
    """Raise `ValueError` unless the condition holds."""
    if not condition:
        raise ValueError(f"expected {expected}, got {got}")


def check_qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Query, key, value are `[B, H, T, D]` of one dtype and device, fit for each other."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        expect(x.ndim == 4, f"{name} of shape [B, H, T, D]", f"shape {list(x.shape)}")
        expect(x.dtype in _FLOATS, f"{name} of a floating dtype", x.dtype)
        expect(x.dtype == query.dtype, f"{name} of query's dtype {query.dtype}", x.dtype)
        expect(x.device == query.device, f"{name} on query's device {query.device}", x.device)
        expect(x.shape[0] == query.shape[0], f"{name} with batch {query.shape[0]}", x.shape[0])
    expect(key.shape[3] == query.shape[3], f"key dim {query.shape[3]} as query", key.shape[3])
    expect(query.shape[3] > 0 and value.shape[3] > 0, "head dims > 0", list(value.shape))
    expect(
        key.shape[1:3] == value.shape[1:3],
        f"value with key's heads and tokens {list(key.shape[1:3])}",
        list(value.shape[1:3]),
    )


def check_log_decay(log_decay: Tensor, key: Tensor) -> None:
    """log_decay is `[H]` float32 (float64 beside float64 inputs), on key's device or the CPU."""
    heads = key.shape[1]
    got = f"{list(log_decay.shape)} {log_decay.dtype} on {log_decay.device}"
    allowed = (torch.float32, torch.float64)
    shape_ok = log_decay.shape == (heads,) and log_decay.dtype in allowed
    expect(shape_ok, f"log_decay of shape [{heads}] in float32", got)
    place_ok = log_decay.device in (key.device, torch.device("cpu"))
    expect(place_ok, f"log_decay on {key.device} or the CPU", got)


def check_log_decay_values(log_decay: Tensor) -> None:
    """Natural logs of decays in (0, 1]: all <= 0, none NaN."""
    values = host_copy(log_decay)
    wrong = values[~(values <= 0)]  # NaN compares false
    expect(wrong.numel() == 0, "log_decay <= 0 and not NaN", wrong[:4].tolist())


def check_state(state: Tensor | None, name: str, shape: tuple[int, ...], like: Tensor) -> None:
    """A state is `[*, H, K, V]` float32 (float64 beside float64 inputs) on the inputs' device."""
    if state is None:
        return
    dtype = torch.promote_types(like.dtype, torch.float32)
    expect(tuple(state.shape) == shape, f"{name} of shape {list(shape)}", list(state.shape))
    expect(state.dtype in (torch.float32, dtype), f"{name} in {dtype}", state.dtype)
    expect(state.device == like.device, f"{name} on {like.device}", state.device)


def check_precision(precision: str, dtype: torch.dtype) -> None:
    """One of the three precisions; "tf32" for float32 inputs alone."""
    expect(precision in _PRECISIONS, f"precision among {', '.join(_PRECISIONS)}", repr(precision))
    ok = precision != "tf32" or dtype == torch.float32
    expect(ok, "float32 inputs with precision 'tf32'", dtype)


def check_cu_seqlens(cu_seqlens: Tensor, name: str, device: torch.device) -> None:
    """Bounds of packed documents are `[N+1]` int32 or int64, on the inputs' device or the CPU."""
    got = f"{list(cu_seqlens.shape)} {cu_seqlens.dtype} on {cu_seqlens.device}"
    ok = cu_seqlens.ndim == 1 and cu_seqlens.shape[0] >= 2 and cu_seqlens.dtype in _INTEGERS
    expect(ok, f"{name} of shape [documents + 1] in int32 or int64", got)
    expect(
        cu_seqlens.device in (device, torch.device("cpu")), f"{name} on {device} or the CPU", got
    )


def check_cu_seqlens_values(cu_seqlens: Tensor, name: str, num_tokens: int) -> None:
    """Bounds start at 0, never fall, and end at the number of packed tokens."""
    bounds = host_copy(cu_seqlens)
    expect(int(bounds[0]) == 0, f"{name} to start at 0", int(bounds[0]))
    falls = (bounds.diff() < 0).nonzero().flatten().tolist()
    expect(not falls, f"{name} sorted", f"a fall after entry {falls[0] if falls else None}")
    expect(
        int(bounds[-1]) == num_tokens, f"{name} to end at the {num_tokens} tokens", int(bounds[-1])
    )


def check_slots(slots: Tensor | None, batch: int, device: torch.device) -> None:
    """Slots are `[B]` integers on the inputs' device."""
    if slots is None:
        return
    got = f"{list(slots.shape)} {slots.dtype} on {slots.device}"
    ok = slots.shape == (batch,) and slots.dtype in _INTEGERS and slots.device == device
    expect(ok, f"slots of shape [{batch}] in int32 or int64 on {device}", got)


def check_slot_values(slots: Tensor | None, num_slots: int) -> None:
    """Slots are rows of the state pool, none twice (two sequences would share a state)."""
    if slots is None:
        return
    values = host_copy(slots)
    outside = values[(values < 0) | (values >= num_slots)].tolist()
    expect(not outside, f"slots in [0, {num_slots})", outside[:4])
    expect(values.unique().numel() == values.numel(), "distinct slots", values.tolist()[:8])
