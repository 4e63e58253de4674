"""Collectives with gradients that run beside other work, in the backward as in the forward.

`begin` starts one and `end` waits for it; what stands between the two is hidden behind it. Autograd
runs the nodes of a graph latest first, so the backward of `end` comes first and starts the gradient's
collective, then runs what stood between, and the backward of `begin` waits. The order in which the
backward starts collectives is thus the reverse of that in which the forward waits for them, on all
ranks alike.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnlab.distributed.comm import Pending

Start = Callable[[Tensor], Pending]


class Transit:
    """One collective under way: how it starts, and how its gradient's does."""

    def __init__(self, x: Tensor, forward: Start, backward: Start) -> None:
        """Start it."""
        self.starts = forward, backward
        self.pending: Pending | None = None
        self._ticket: Tensor | None = _Begin.apply(x, self)

    def end(self) -> Tensor:
        """Its result; called once."""
        ticket, self._ticket = self._ticket, None  # its graph holds this object
        assert ticket is not None
        return _End.apply(ticket, self)


def begin(x: Tensor, forward: Start, backward: Start) -> Transit:
    """Start `forward(x)`; `backward` maps the result's gradient to that of `x`."""
    return Transit(x, forward, backward)


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, transit: Transit) -> Tensor:
        ctx.transit = transit
        transit.pending = transit.starts[0](x.detach())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _waited(ctx.transit), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, transit: Transit) -> Tensor:
        ctx.transit, ctx.shape = transit, ticket.shape
        return _waited(transit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.transit.pending = ctx.transit.starts[1](grad.contiguous())
        return grad.new_zeros(()).expand(ctx.shape), None  # never read: `_Begin` has the gradient


def _waited(transit: Transit) -> Tensor:
    assert transit.pending is not None
    result, transit.pending = transit.pending.wait(), None
    return result
