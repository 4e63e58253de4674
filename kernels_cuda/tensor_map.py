"""Tensor maps: what the copy engine of Hopper wants to know of a tensor, made by the CUDA driver.

Legend: B batch, H heads, T tokens, D head dim.
"""

import ctypes
from ctypes import c_uint32, c_uint64
from functools import cache, lru_cache

from torch import Tensor

MAP_BYTES = 128
ELEMENT_BYTES = 2
BOX = 64  # tokens and columns that are copied at once
RANK = 4
# Values of the driver's enums (cuda.h).
_UINT16, _NOT_INTERLEAVED, _SWIZZLE_128B, _PROMOTE_128B, _FILL_ZEROS = 1, 0, 3, 2, 0


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def layout(
    shape: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of D, T, H, B, and bytes from one token, head and batch row to the next.

    A dimension of size 1 has no next: what stands there must only be a stride that is allowed.
    """
    size_b, size_h, size_t, size_d = shape
    strides = [
        ELEMENT_BYTES * (s if n > 1 else size_d) for s, n in zip(stride, shape[:3], strict=False)
    ]
    return (size_d, size_t, size_h, size_b), tuple(reversed(strides))


def tensor_map(x: Tensor) -> bytes:
    """Map of a `[B, H, T, D]` tensor of 16-bit elements, in swizzled boxes of 64 tokens and columns.

    Rows must begin at multiples of 16 bytes. Outside of the tensor a box holds zeros.
    """
    return _encoded(x.data_ptr(), x.shape, x.stride())


@lru_cache(1024)
def _encoded(address: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    sizes, strides = layout(shape, stride)
    storage = ctypes.create_string_buffer(2 * MAP_BYTES)
    offset = -ctypes.addressof(storage) % 64  # the driver writes to multiples of 64
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(storage) + offset), _UINT16, RANK, ctypes.c_void_p(address),
        (c_uint64 * RANK)(*sizes), (c_uint64 * (RANK - 1))(*strides),
        (c_uint32 * RANK)(BOX, BOX, 1, 1), (c_uint32 * RANK)(1, 1, 1, 1),
        _NOT_INTERLEAVED, _SWIZZLE_128B, _PROMOTE_128B, _FILL_ZEROS,
    )  # fmt: skip
    if code != 0:
        raise ValueError(
            f"expected a tensor that fits a tensor map, got {sizes}, {strides}: {code}"
        )
    return storage.raw[offset : offset + MAP_BYTES]
