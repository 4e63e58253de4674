"""Peers that are timed but offered to nobody: fla's other forms, registered for measurement.

Importing this module registers them; a run's worker processes import it with the run's main file.
"""

from typing import Any

from torch import Tensor

from attnlab import registry
from attnlab.problem import Problem
from bench import plan

# Backends that are timed beside each other, by op; ours first.
PEERS = {
    "lightning": ("triton", "fla", "fla-fused"),
    "softmax": ("flash", "cudnn"),
}


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


def fla_needs(problem: Problem) -> str | None:
    """What the registry's own record of fla needs."""
    return registry.why_not("lightning_attention", "fla", problem)


for _op, _backend, _function in (
    ("lightning_attention", "fla-fused", fla_fused),
    ("lightning_decode_", "fla", fla_recurrent_),
):
    if _backend not in registry.list_backends(_op):
        registry.register(
            registry.Impl(
                op=_op,
                backend=_backend,
                load=lambda function=_function: function,
                why_not=fla_needs,
                measurement_only=True,
            )
        )
plan.SOURCES.setdefault("fla-fused", ["bench/peers.py"])
