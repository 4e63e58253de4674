"""Backend "triton" of `softmax_decode`: the kernels of `kernels_triton.softmax_decode` as a custom op.

Legend: B batch, H query heads, G key heads, C slots of the cache, K key dim, V value dim.
"""

from torch import Tensor

from attnlab.custom_op import CustomOp
from attnlab.schedules import num_multiprocessors
from kernels_triton.softmax_decode import attend


def _attend(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Tensor:
    query, keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (query, keys, values))
    count = num_multiprocessors(query.device)
    return attend(query, keys, values, lengths, scale=scale, num_multiprocessors=count)


def _fake_attend(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    return query.new_empty(*query.shape[:3], values.shape[3])


_attention = CustomOp("softmax_decode_triton", _attend, _fake_attend)


def softmax_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    span: int | None = None,
) -> Tensor:
    """Output `[B, H, 1, V]`; each row costs what its length asks for, so `span` is of no use."""
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    return _attention(query, keys, values, lengths, scale)
