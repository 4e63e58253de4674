"""One record per op and backend: what it needs, and how to load it. Nothing is imported here.

The order is the order of preference of a call that names no backend.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import ModuleType

import torch

from attnlab.problem import Problem
from attnlab.registry import Impl, register

LIGHTNING = ("lightning_attention", "lightning_attention_varlen")
SOFTMAX = ("softmax_attention", "softmax_attention_with_lse", "softmax_attention_varlen")

_HALF = (torch.float16, torch.bfloat16)
_HAS_TRITON = find_spec("triton") is not None
_TRITON_DIMS = (32, 64, 96, 128, 192, 256)
_CUDA_DIMS = (64, 128)


# Import statements, not importlib: a first use may happen while torch.compile traces.
def _reference() -> ModuleType:
    from attnlab import reference

    return reference


def _chunked() -> ModuleType:
    from attnlab import chunked

    return chunked


def _triton() -> ModuleType:
    from attnlab import triton_backend

    return triton_backend


def _cuda() -> ModuleType:
    from attnlab import cuda_backend

    return cuda_backend


def _triton_softmax() -> ModuleType:
    from attnlab import triton_softmax

    return triton_softmax


def _sdpa() -> ModuleType:
    from attnlab import sdpa

    return sdpa


def _fla() -> ModuleType:
    from attnlab import fla

    return fla


def _nothing(problem: Problem) -> None:
    return None


def _triton_interprets() -> bool:
    """Whether Triton made the kernels for its interpreter: they run on the CPU then, for tests."""
    from kernels_triton.lightning.scan import INTERPRETED

    return INTERPRETED.value


def _triton_needs(problem: Problem) -> str | None:
    if not _HAS_TRITON:
        return "needs the package triton"
    if problem.device != "cuda" and not _triton_interprets():
        return f"needs a CUDA device, got {problem.device}"
    if problem.dtype == torch.float64:
        return "has no float64"
    for dim in (problem.key_dim, problem.value_dim):
        if dim not in _TRITON_DIMS:
            return f"needs head dims among {', '.join(map(str, _TRITON_DIMS))}, got {dim}"
    if problem.decay_requires_grad:
        return "has no gradient of log_decay"
    return None


def _constant_to_compilers(function: Callable) -> Callable:
    """Let torch.compile call a function while it traces and keep what it returned.

    `torch.compiler.assume_constant_result` sets the same mark, but imports torch._dynamo and Triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_to_compilers
def _cuda_machine_lacks(device: str) -> str | None:
    from kernels_cuda.module import loader

    return loader.why_not(device)


@_constant_to_compilers
def _cuda_kernel_lacks(
    op: str, device: str, dtype: str, key_dim: int, value_dim: int, precision: str
) -> str | None:
    """Why a call's kernels can't be had: they are compiled for that, at the first such call."""
    from kernels_cuda import lightning, lightning_decode

    kernels = lightning_decode if op == "lightning_decode_" else lightning
    return kernels.why_not(key_dim, value_dim, getattr(torch, dtype), device, precision)


def _cuda_needs(problem: Problem) -> str | None:
    reason = _cuda_machine_lacks(problem.device)
    if reason is not None:
        return reason
    if problem.dtype not in _HALF:
        return f"needs float16 or bfloat16, got {problem.dtype}"
    dims = problem.key_dim, problem.value_dim
    for dim in dims:
        if dim not in _CUDA_DIMS:
            return f"needs head dims among {', '.join(map(str, _CUDA_DIMS))}, got {dim}"
    if problem.decay_requires_grad:
        return "has no gradient of log_decay"
    dtype = "bfloat16" if problem.dtype == torch.bfloat16 else "float16"
    return _cuda_kernel_lacks(problem.op, problem.device, dtype, *dims, problem.precision)


def _fla_needs(problem: Problem) -> str | None:
    if find_spec("fla") is None:
        return "needs the package flash-linear-attention"
    if problem.device != "cuda":
        return f"needs a CUDA device, got {problem.device}"
    if problem.decay_requires_grad:
        return "has no gradient of log_decay"
    if problem.dtype == torch.float64:
        return "has no float64"
    return None


def _sdpa_needs(problem: Problem) -> str | None:
    if problem.op == "softmax_attention_with_lse" and problem.has_mask:
        return "torch's kernels return no logsumexp with an attn_mask"
    square = not problem.is_causal or problem.q_len in (1, problem.kv_len)
    if problem.op == "softmax_attention" and square:
        return None
    if problem.op == "softmax_attention" and problem.has_mask:
        return None
    if problem.device == "cuda":
        return _kernel_needs(problem)
    return None


def _kernel_needs(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return f"needs a CUDA device, got {problem.device}"
    if problem.dtype not in _HALF:
        return f"needs float16 or bfloat16, got {problem.dtype}"
    if max(problem.key_dim, problem.value_dim) > 256:
        return f"needs head dims up to 256, got {max(problem.key_dim, problem.value_dim)}"
    if problem.has_mask:
        return "takes no attn_mask"
    return None


def _flash_needs(problem: Problem) -> str | None:
    if problem.op == "softmax_attention_varlen" and problem.key_dim != problem.value_dim:
        return f"needs equal head dims, got {problem.key_dim} and {problem.value_dim}"
    return _kernel_needs(problem)


def _cudnn_needs(problem: Problem) -> str | None:
    reason = _kernel_needs(problem)
    if reason is None and max(problem.key_dim, problem.value_dim) > 128:
        return f"needs head dims up to 128, got {max(problem.key_dim, problem.value_dim)}"
    if reason is None and problem.kv_len == 1 and problem.num_documents == 1:
        return "needs more than one key"
    if reason is None and problem.is_causal and problem.q_len > problem.kv_len:
        return f"needs a key for each query, got {problem.q_len} and {problem.kv_len}"
    unequal = problem.is_causal and problem.q_len != problem.kv_len and problem.q_len > 1
    if reason is None and problem.requires_grad and unequal and problem.num_documents == 1:
        return "adds up a query's gradient in 16 bits where keys outnumber queries; flash does not"
    return reason


def _register(
    op: str,
    backend: str,
    module: Callable[[], ModuleType],
    why_not: Callable[[Problem], str | None],
    name: str | None = None,
    measurement_only: bool = False,
    **fixed: str,
) -> None:
    def load() -> Callable:
        function = getattr(module(), name or op)
        return partial(function, **fixed) if fixed else function

    register(
        Impl(
            op=op,
            backend=backend,
            load=load,
            why_not=why_not,
            measurement_only=measurement_only,
        )
    )


for _op in (*LIGHTNING, "lightning_decode_", "lightning_state"):
    _register(_op, "triton", _triton, _triton_needs)
    _register(_op, "cuda", _cuda, _cuda_needs)
for _op in LIGHTNING:
    _register(_op, "torch", _chunked, _nothing)
    _register(_op, "reference", _reference, _nothing)
    _register(_op, "fla", _fla, _fla_needs, measurement_only=True)
for _op in ("lightning_decode_", "lightning_state"):
    # One product each: the definition is already the fast form in PyTorch.
    _register(_op, "torch", _reference, _nothing)
    _register(_op, "reference", _reference, _nothing)
for _op in SOFTMAX:
    _register(_op, "sdpa", _sdpa, _sdpa_needs, kernel="sdpa")
    _register(_op, "reference", _reference, _nothing)
_register("softmax_decode", "triton", _triton_softmax, _triton_needs)
_register("softmax_decode", "sdpa", _sdpa, _nothing)
_register("softmax_decode", "reference", _reference, _nothing)
_register("softmax_attention", "flash", _sdpa, _flash_needs, kernel="flash")
_register("softmax_attention_with_lse", "flash", _sdpa, _flash_needs, kernel="flash")
_register("softmax_attention_varlen", "flash", _sdpa, _flash_needs, name="flash_varlen")
for _op in SOFTMAX:
    _register(_op, "cudnn", _sdpa, _cudnn_needs, kernel="cudnn")
