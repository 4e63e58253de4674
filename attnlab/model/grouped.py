"""Grouped linear layer: each run of rows times the weight of its own group, in one op.

Legend: S rows, G groups, M output channels, K input channels.

Rows come sorted by group; group g owns rows [offsets[g-1], offsets[g]). In 16 bits on a GPU the
product is torch's grouped kernel, which never asks the device for the offsets and so can be
captured in a CUDA graph. Elsewhere it is a loop over the groups; on a GPU, where reading the
offsets would wait for the device, few rows gather their weights instead.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.custom_op import CustomOp

_FEW_ROWS = 64  # below, gathering a weight a row is cheaper than waiting for the device


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`[S, M]`: row s of `x` `[S, K]` times the transposed weight `[M, K]` of its group.

    `weight` is `[G, M, K]`; `offsets` `[G]` int32 are the ends of the groups' rows, the last one S.
    Sums are float32 for 16-bit inputs. Differentiable in x and weight. Under autocast both are
    cast first.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return _linear(x, weight, offsets)


def waits_for_device(num_rows: int, weight: Tensor) -> bool:
    """Whether `grouped_linear` of `num_rows` rows, without gradients, reads offsets off a GPU."""
    few = num_rows <= _FEW_ROWS
    return weight.is_cuda and not few and not _has_kernel(weight[0], weight.mT)


def _multiply(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return _product(x, weight.mT, offsets)


def _fake_multiply(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _differentiate(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    return _product(grad, weight, offsets), _outer(grad, x, offsets)


def _fake_differentiate(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_gradients = CustomOp("grouped_linear_backward", _differentiate, _fake_differentiate)


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_gradients(grad, *ctx.saved_tensors), None


_linear = CustomOp(
    "grouped_linear",
    _multiply,
    _fake_multiply,
    setup_context=_save_for_backward,
    backward=_autograd_backward,
)


def _product(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """`[S, N]` from `[S, K]` and a matrix `[K, N]` a group."""
    if _has_kernel(x, matrices):
        return F.grouped_mm(x, matrices, offs=offsets).contiguous()
    if x.is_cuda and x.shape[0] <= _FEW_ROWS:
        row = torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype)
        group = torch.searchsorted(offsets, row, right=True)
        return torch.bmm(x[:, None], matrices[group])[:, 0]
    output = x.new_empty(x.shape[0], matrices.shape[2])
    for number, rows in _runs(offsets):
        torch.mm(x[rows], matrices[number], out=output[rows])
    return output


def _outer(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """`[G, M, K]`: of each group, `[S, M]` transposed times `[S, K]`."""
    if _has_kernel(x, grad):
        return F.grouped_mm(grad.mT, x.contiguous(), offs=offsets).contiguous()
    output = x.new_zeros(offsets.shape[0], grad.shape[1], x.shape[1])
    for number, rows in _runs(offsets):
        torch.mm(grad[rows].mT, x[rows], out=output[number])
    return output


def _has_kernel(x: Tensor, other: Tensor) -> bool:
    """Whether torch has one kernel for all groups: bf16 on a GPU, sides of a multiple of 16 bytes."""
    sides = (x.shape[-1], other.shape[-1])
    ok = x.is_cuda and x.dtype == torch.bfloat16 and all(side % 8 == 0 for side in sides)
    return ok and x.shape[0] > 0 and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _runs(offsets: Tensor) -> list[tuple[int, slice]]:
    """Groups that have rows, and which."""
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    return [(g, slice(a, b)) for g, (a, b) in enumerate(zip(starts, ends, strict=True)) if b > a]
