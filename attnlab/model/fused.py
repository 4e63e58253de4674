"""Which calls the Triton kernels around a model's mixers and experts take; torch has the others."""

from importlib.util import find_spec

import torch
from torch import Tensor

_HAS_TRITON = find_spec("triton") is not None
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def has_kernels(x: Tensor) -> bool:
    """Whether `x` is on a GPU, in a dtype of the kernels, where Triton is installed."""
    return x.is_cuda and _HAS_TRITON and x.dtype in _DTYPES


def has_kernels_with(x: Tensor, *others: Tensor | None) -> bool:
    """As `has_kernels`, and torch would cast none of the tensors first: of one dtype, no autocast."""
    alike = all(y is None or y.dtype == x.dtype for y in others)
    return has_kernels(x) and alike and not torch.is_autocast_enabled("cuda")
