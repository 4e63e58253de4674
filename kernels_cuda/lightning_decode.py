"""One decoding step of lightning attention, the states updated in place: launches `src/decode.cu`.

Legend: B sequences, H heads, P rows of the state pool, K key dim, V value dim.
"""

import struct
from functools import cache

import torch
from torch import Tensor

from kernels_cuda import module
from kernels_cuda.lightning import ELEMENTS
from kernels_cuda.module import Instance

NUM_THREADS, MAX_WIDTH = 512, 64  # of a block: it takes so many values of a head at most


# `DecodeParams` of src/decode.cu.
_DECODE_PARAMS = struct.Struct(
    "6q"  # q, k, v, out, log_decay, state
    "2q"  # slots of 32 and of 64 bits, of which one at most is there
    "9q"  # strides: two each of q, k, v, three of the state
    "fi"  # scale, heads
)


@cache
def instance_of(key_dim: int, value_dim: int, dtype: torch.dtype, vector: int) -> Instance:
    """The kernel that loads `vector` values of a state at once (4, or 1 where it isn't aligned)."""
    width = min(MAX_WIDTH, value_dim)
    rows = NUM_THREADS * vector // width
    return Instance(
        name="decode",
        arguments=f"{ELEMENTS[dtype]}, {key_dim}, {value_dim}, {vector}",
        num_threads=NUM_THREADS,
        shared_bytes=4 * (2 * key_dim + rows * width),
    )


def why_not(
    key_dim: int, value_dim: int, dtype: torch.dtype, device_type: str, precision: str
) -> str | None:
    """Why the kernels of a step can't be had (its dims and dtype being right), None if they can."""
    instances = [instance_of(key_dim, value_dim, dtype, vector) for vector in (1, 4)]
    return module.why_not_compiled(instances, module.current_device(device_type))


def decode_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Output `[B, H, 1, V]`; the rows `slots` (default: the first B) of `state` are overwritten.

    Args:
        query, key, value: `[B, H, 1, D]` with a contiguous last dimension.
        log_decay: `[H]` float32 on the same device.
        state: `[P, H, K, V]` float32 with a contiguous last dimension.
        slots: `[B]` int32 or int64, each row once.
    """
    batch, heads = query.shape[:2]
    output = query.new_empty(batch, heads, 1, value.shape[3])
    slots = None if slots is None else slots.contiguous()
    by_width = {} if slots is None else {slots.dtype: slots.data_ptr()}
    strides = state.stride()[:3]
    params = _DECODE_PARAMS.pack(
        *(x.data_ptr() for x in (query, key, value, output, log_decay, state)),
        by_width.get(torch.int32, 0), by_width.get(torch.int64, 0),
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *strides,
        scale, heads,
    )  # fmt: skip
    together = state.data_ptr() // 4 | strides[0] | strides[1] | strides[2]
    vector = 4 if together % 4 == 0 else 1
    instance = instance_of(key.shape[3], value.shape[3], query.dtype, vector)
    num_blocks = batch * heads * -(-value.shape[3] // MAX_WIDTH)
    module.kernel(instance, state.device)(num_blocks, params, state.device)
    return output
