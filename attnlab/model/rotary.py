"""Rotary positions: pairs of channels of a head turned by angles that grow with the position.

Legend: B batch, H heads, T tokens, D head dim, R channels that are rotated, D >= R.

Channel i < R/2 and channel i + R/2 form a pair, turned by position * theta^(-2i/R) (RoFormer,
arXiv 2104.09864, in the order of GPT-NeoX); channels from R on pass through. Angles are computed
from the positions of each call: a table for 10M positions would take gigabytes.
"""

import torch
from torch import Tensor


def rotary_angles(
    positions: Tensor, rotary_dim: int, theta: float, *, float64: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[B, 1, T, R/2]` of the angles at positions `[B, T]`.

    Angles are float32 as in the released model, whose product is off by 0.07 rad at position 4M;
    with `float64` they are exact, and so are cosine and sine.
    """
    dtype = torch.float64 if float64 else torch.float32
    exponent = torch.arange(0, rotary_dim, 2, dtype=dtype, device=positions.device) / rotary_dim
    angles = positions.to(dtype)[:, None, :, None] * (1.0 / theta**exponent)  # [B, 1, T, R/2]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[B, H, T, D]` with its first R channels rotated, computed in float32 or x's wider dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(dtype), sin.to(dtype)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*(part.to(x.dtype) for part in rotated), rest], -1)
