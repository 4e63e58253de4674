"""Backends that are timed but offered to nobody: forms of others, registered for measurement.

Importing this module registers them; a run's worker processes import it with the run's main file.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from attnlab import registry
from attnlab.problem import Problem
from bench import plan

# Backends that are timed beside each other, by op; ours first.
PEERS = {
    "lightning": ("triton", "cuda", "fla", "fla-fused", "lightning_attn2"),
    "softmax": ("flash", "cudnn"),
}
OURS = ("triton", "cuda")
# Backend "cuda" with one of its two scan kernels, whichever is the default. Timed where they are named.
CUDA_KERNELS = {"cuda-portable": False, "cuda-hopper": True}


def fla_fused(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, **flags: Any) -> Any:
    """fla's one-kernel form of `chunk_simple_gla`."""
    from fla.ops.simple_gla import fused_chunk_simple_gla

    output, state = fused_chunk_simple_gla(
        *(x.transpose(1, 2) for x in (query, key, value)),
        g_gamma=log_decay,
        scale=flags["scale"],
        initial_state=flags["initial_state"],
        output_final_state=flags["return_final_state"],
    )
    return output.transpose(1, 2), state


def fla_recurrent_(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor, **flags: Any
) -> Tensor:
    """fla's decoding step; it returns a new state, whose memory `state` takes over without a copy."""
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    output, after = fused_recurrent_simple_gla(
        *(x.transpose(1, 2) for x in (query, key, value)),
        g_gamma=log_decay,
        scale=flags["scale"],
        initial_state=state,
        output_final_state=True,
    )
    state.set_(after)
    return output.transpose(1, 2)


def lightning_attn2(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, **flags: Any
) -> tuple[Tensor, None]:
    """OpenNLPLab's Triton kernels (package lightning-attn), whose slopes are negative log decays.

    Raises:
        ValueError: for a scale or a state, which they have not.
    """
    from lightning_attn.ops import lightning_attn_func

    for name, absent in (("scale", 1.0), ("initial_state", None), ("return_final_state", False)):
        if flags[name] != absent:
            raise ValueError(f"expected {name}={absent}, got {flags[name]}")
    return lightning_attn_func(query, key, value, -log_decay.float().view(-1, 1, 1)), None


def cuda_with(hopper: bool) -> Callable:
    """Backend "cuda" with the kernels for Hopper or the portable ones, until another is called."""

    def lightning_attention(*tensors: Tensor, **flags: Any) -> tuple[Tensor, Tensor | None]:
        from attnlab import cuda_backend
        from kernels_cuda import lightning

        lightning.use_hopper(hopper)  # for the backward too, which comes later
        return cuda_backend.lightning_attention(*tensors, **flags)

    return lightning_attention


def fla_needs(problem: Problem) -> str | None:
    """What the registry's own record of fla needs."""
    return registry.why_not("lightning_attention", "fla", problem)


def lightning_attn2_needs(problem: Problem) -> str | None:
    """Why OpenNLPLab's kernels can't run a call."""
    if find_spec("lightning_attn") is None:
        return "needs the package lightning-attn"
    if problem.device != "cuda":
        return f"needs a CUDA device, got {problem.device}"
    if problem.dtype not in (torch.float16, torch.bfloat16) or problem.precision != "default":
        return "multiplies in TF32, and so needs 16-bit inputs and default precision"
    if max(problem.key_dim, problem.value_dim) > 128:
        return "adds up outputs of more than 128 channels in 16 bits"
    if problem.decay_requires_grad:
        return "has no gradient of log_decay"
    return None


def cuda_needs(problem: Problem) -> str | None:
    """What backend "cuda" needs."""
    return registry.why_not("lightning_attention", "cuda", problem)


def _register(
    op: str, backend: str, function: Callable, why_not: Callable[[Problem], str | None]
) -> None:
    if backend not in registry.list_backends(op):
        registry.register(
            registry.Impl(
                op=op,
                backend=backend,
                load=lambda: function,
                why_not=why_not,
                measurement_only=True,
            )
        )


_register("lightning_attention", "fla-fused", fla_fused, fla_needs)
_register("lightning_decode_", "fla", fla_recurrent_, fla_needs)
_register("lightning_attention", "lightning_attn2", lightning_attn2, lightning_attn2_needs)
for _name, _hopper in CUDA_KERNELS.items():
    _register("lightning_attention", _name, cuda_with(_hopper), cuda_needs)
    plan.SOURCES.setdefault(_name, plan.SOURCES["cuda"])
for _name in ("fla-fused", "lightning_attn2"):
    plan.SOURCES.setdefault(_name, ["bench/peers.py"])
