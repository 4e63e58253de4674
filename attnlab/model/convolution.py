"""A short causal depthwise convolution of a mixer's input.

Legend: B batch (1 if packed), T tokens, D channels, W taps, N sequences.

y_t = sum over w < W of weight[:, W-1-w] * x_{t-w}, with zeros before the start of a sequence. What
continues a sequence are its last W-1 inputs, which the layer's cache keeps.

On a GPU it is the kernels of `kernels_triton.convolution`, but for packed sequences that continue
others; elsewhere torch's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cache import LayerCache
from attnlab.custom_op import CustomOp
from attnlab.model.fused import has_kernels_with
from attnlab.model.placement import Placement


class ShortConvolution(nn.Module):
    """Convolution over W tokens of each of D channels."""

    def __init__(self, channels: int, width: int, **factory: Any) -> None:
        """Make a weight `[D, W]`."""
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, width, **factory))

    def forward(self, x: Tensor, place: Placement, cache: LayerCache | None) -> Tensor:
        """Convolve `[B, T, D]`; a cache's inputs come before those of the call, and are renewed."""
        before = None if cache is None else cache.conv_inputs
        if place.cu_seqlens is None or place.sequence is None:
            return self._dense(x, before)
        return self._packed(x, place.sequence[0], place.cu_seqlens, before)

    def _dense(self, x: Tensor, before: Tensor | None) -> Tensor:
        if has_kernels_with(x, self.weight):
            output = _convolution(x, self.weight, None, before)
            if before is not None:
                gap = self.width - 1
                before.copy_(torch.cat([before.to(x.dtype), x[:, -gap:]], 1)[:, -gap:])
            return output
        if before is None:
            return self._taps(F.pad(x, (0, 0, self.width - 1, 0)))
        joined = torch.cat([before.to(x.dtype), x], 1)  # [B, W-1+T, D]
        before.copy_(joined[:, x.shape[1] :])
        return self._taps(joined)

    def _packed(self, x: Tensor, sequence: Tensor, bounds: Tensor, before: Tensor | None) -> Tensor:
        """Put W-1 inputs before each sequence, so that none reaches into another."""
        if before is None and has_kernels_with(x, self.weight):
            return _convolution(x, self.weight, sequence, None)
        num_tokens, channels = x.shape[1:]
        gap, num_sequences = self.width - 1, bounds.shape[0] - 1
        token = torch.arange(num_tokens, device=x.device)
        index = token + (sequence + 1) * gap  # where each token goes
        joined = x.new_zeros(num_tokens + num_sequences * gap, channels).index_copy(0, index, x[0])
        if before is not None:
            number = torch.arange(num_sequences, device=x.device)[:, None]
            offset = torch.arange(gap, device=x.device)
            head = (bounds[:-1, None] + number * gap + offset).flatten()  # the gap before each
            joined = joined.index_copy(0, head, before.flatten(0, 1).to(x.dtype))
            last = bounds[1:, None] + number * gap + offset  # [N, W-1], the end of each
            before.copy_(joined[last])
        return self._taps(joined[None])[:, index - gap]

    def _taps(self, joined: Tensor) -> Tensor:
        """`[B, T, D]` from `[B, W-1+T, D]`."""
        weight = self.weight[:, None]  # [D, 1, W]
        return F.conv1d(joined.mT, weight, groups=weight.shape[0]).mT


def _convolve(x: Tensor, weight: Tensor, sequence: Tensor | None, before: Tensor | None) -> Tensor:
    from kernels_triton import convolution

    before = None if before is None else before.contiguous()
    return convolution.convolution(x.contiguous(), weight.contiguous(), sequence, before)


def _fake_convolve(
    x: Tensor, weight: Tensor, sequence: Tensor | None, before: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape)


def _differentiate(
    grad: Tensor, x: Tensor, weight: Tensor, sequence: Tensor | None
) -> tuple[Tensor, Tensor]:
    from kernels_triton import convolution

    tensors = grad.contiguous(), x.contiguous(), weight.contiguous()
    return convolution.convolution_backward(*tensors, sequence)


def _fake_differentiate(
    grad: Tensor, x: Tensor, weight: Tensor, sequence: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_gradients = CustomOp("short_convolution_backward", _differentiate, _fake_differentiate)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    assert inputs[3] is None, "a call that continues sequences has no gradient"
    ctx.save_for_backward(*inputs[:3])


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return *_gradients(grad, *ctx.saved_tensors), None, None


_convolution = CustomOp(
    "short_convolution", _convolve, _fake_convolve, setup_context=_save, backward=_autograd_backward
)
