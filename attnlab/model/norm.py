"""RMSNorm, alone, of a residual sum, behind an output gate, or times a scale a row.

Legend: D channels.

On a GPU it is the kernels of `kernels_triton.norm`, forward and backward; elsewhere torch's.
"""

from typing import Any

import torch
from torch import Tensor, nn

from attnlab.checks import expect
from attnlab.custom_op import CustomOp
from attnlab.model.fused import has_kernels_with

_MAX_WIDTH = 8192  # channels that the kernels hold


class RMSNorm(nn.RMSNorm):
    """weight * z * rsqrt(mean(z^2) + eps) over the channels of z, as torch's module of that name."""

    def forward(
        self,
        x: Tensor,
        *,
        plus: Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        gate: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """`[..., D]`: the norm of x, or of alpha x + beta plus, times sigmoid(gate) or scale if given.

        `x`, `plus` and `gate` are `[..., D]` of one shape; `scale` is float32 (float64 for float64)
        of that shape without D, or with 1 in its first dimension.

        Raises:
            ValueError: for a gate and a scale.
        """
        expect(gate is None or scale is None, "a gate or a scale", "both")
        assert self.eps is not None
        if x.shape[-1] <= _MAX_WIDTH and has_kernels_with(x, self.weight, plus, gate):
            numbers = float(alpha), float(beta), self.eps
            return _rms_norm(x, plus, gate, scale, self.weight, *numbers)
        normed = super().forward(x if plus is None else weighted_sum(x, plus, alpha, beta))
        if scale is not None:
            return times_scale(normed, scale)
        return normed if gate is None else torch.sigmoid(gate) * normed


def weighted_sum(x: Tensor, y: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha x + beta y, in one pass where beta is 1."""
    return torch.add(y if beta == 1.0 else beta * y, x, alpha=alpha)


def times_scale(x: Tensor, scale: Tensor) -> Tensor:
    """`[..., D]` times a scale a row, `[...]` of a wider dtype in which the product is rounded once."""
    return (x * scale[..., None]).to(x.dtype)


def _normalise(
    x: Tensor,
    plus: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    alpha: float,
    beta: float,
    eps: float,
) -> Tensor:
    from kernels_triton import norm

    optional = _contiguous(plus, gate, scale)
    return norm.rms_norm(x.contiguous(), weight, eps, **optional, alpha=alpha, beta=beta)


def _contiguous(plus: Tensor | None, gate: Tensor | None, scale: Tensor | None) -> dict[str, Any]:
    named = {"y": plus, "gate": gate, "scale": scale}
    return {name: None if z is None else z.contiguous() for name, z in named.items()}


def _fake_normalise(
    x: Tensor,
    plus: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    alpha: float,
    beta: float,
    eps: float,
) -> Tensor:
    return x.new_empty(x.shape)


def _differentiate(
    grad: Tensor,
    x: Tensor,
    plus: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    alpha: float,
    beta: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, plus, gate and scale (empty without them) and weight."""
    from kernels_triton import norm

    tensors, optional = (grad.contiguous(), x.contiguous()), _contiguous(plus, gate, scale)
    grad_x, grad_plus, grad_gate, rows, grad_weight = norm.rms_norm_backward(
        *tensors, weight, eps, **optional, alpha=alpha, beta=beta
    )
    grad_plus, grad_gate = (x.new_empty(0) if z is None else z for z in (grad_plus, grad_gate))
    grad_scale = x.new_empty(0)
    if scale is not None and rows is not None:
        grad_scale = rows.view(-1, *scale.shape).sum(0)
    return grad_x, grad_plus, grad_gate, grad_scale, grad_weight


def _fake_differentiate(
    grad: Tensor,
    x: Tensor,
    plus: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    alpha: float,
    beta: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_plus, grad_gate = (x.new_empty(0 if z is None else z.shape) for z in (plus, gate))
    grad_scale = x.new_empty(0) if scale is None else scale.new_empty(scale.shape)
    return x.new_empty(x.shape), grad_plus, grad_gate, grad_scale, weight.new_empty(weight.shape)


_gradients = CustomOp("rms_norm_backward", _differentiate, _fake_differentiate)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.numbers = inputs[5:]


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, *optional, grad_weight = _gradients(grad, *ctx.saved_tensors, *ctx.numbers)
    given = zip(ctx.saved_tensors[1:4], optional, strict=True)
    return grad_x, *(None if z is None else g for z, g in given), grad_weight, None, None, None


_rms_norm = CustomOp(
    "rms_norm", _normalise, _fake_normalise, setup_context=_save, backward=_autograd_backward
)
