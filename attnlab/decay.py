"""Decay rates of MiniMax-01's lightning layers, and how far a head with such a rate remembers."""

import torch
from torch import Tensor


def _slopes(num_heads: int) -> list[float]:
    """Slopes 2^(-8h/H), h = 1..H; between powers of two those of the lower power come first,
    then every other one of the doubled power (ALiBi, arXiv 2108.12409)."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * h / power) for h in range(1, power + 1)]
    doubled = [2.0 ** (-4.0 * h / power) for h in range(1, 2 * power + 1, 2)]
    return slopes + doubled[: num_heads - power]


def minimax_log_decay(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """Natural log of the decay of each head, `[num_heads]` float32, negative.

    log_decay = -slope_h * (1 - layer / (num_layers - 1) + 1e-5), layers counted from 0 over all
    layers, softmax ones included; with a single layer the factor is 1 + 1e-5. Source: MiniMax-01
    (arXiv 2501.08313) and its released modelling code.

    Raises:
        ValueError: if there are no heads, or no such layer.
    """
    if num_heads < 1:
        raise ValueError(f"expected num_heads >= 1, got {num_heads}")
    if not 0 <= layer < num_layers:
        raise ValueError(f"expected 0 <= layer < num_layers = {num_layers}, got layer = {layer}")
    factor = 1.0 - layer / (num_layers - 1) + 1e-5 if num_layers > 1 else 1.0 + 1e-5
    return -torch.tensor(_slopes(num_heads), dtype=torch.float32) * factor


def decay_horizon(log_decay: Tensor, remaining: float = 2.0**-24) -> Tensor:
    """Tokens after which a write has decayed to `remaining` of its size; inf without decay.

    The default, float32's rounding, gives 16.6 / slope tokens.
    """
    return -torch.log(torch.tensor(remaining, dtype=torch.float64)) / log_decay.double().abs()
