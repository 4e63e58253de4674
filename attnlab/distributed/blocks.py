"""Softmax attention of one block of keys, in a form that blocks can be merged and taken back.

Legend: H query heads, G key heads, R = H / G query heads a key head, L queries, S keys, K key dim,
V value dim.

A block gives its output o_b and the logsumexp l_b of its scores. Blocks merge to
l' = log(e^l + e^l_b) and o' = e^(l-l') o + e^(l_b-l') o_b; given the merged l and o, a block's
share of the gradients is that of one softmax over all blocks (FlashAttention, arXiv 2205.14135;
Ring Attention, arXiv 2310.01889). A block is a rectangle of which all is seen, or the square of a
document with itself; so no query is without a key, and no difference of infinities arises.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from attnlab import sdpa
from attnlab.checks import expect

KERNELS = ("torch", "cpu", "flash", "cudnn")
_TILE = 512  # keys at once in the PyTorch form: bounds the scores' memory


class Block(Protocol):
    """Forward and backward of a block `[1, H, L, K]` by `[1, G, S, K]`."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output `[1, H, L, V]` and logsumexp `[1, H, L]` of the block alone."""

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, given output and logsumexp of all blocks."""


def block_of(kernel: str | None, query: Tensor) -> Block:
    """The named form; without a name FlashAttention in 16 bits on a GPU, else PyTorch.

    Raises:
        ValueError: for a name that is not among `KERNELS`.
    """
    if kernel is None:
        half = query.is_cuda and query.dtype.itemsize == 2
        kernel = "flash" if half else "torch"
    expect(kernel in KERNELS, f"a kernel among {', '.join(KERNELS)}", repr(kernel))
    return TorchBlock() if kernel == "torch" else KernelBlock(kernel)


def merge(output: Tensor, lse: Tensor, new: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of two sets of keys, in the precision of `output`; `lse` may be -inf."""
    total = torch.logaddexp(lse, new_lse.to(lse))
    old, share = (x[..., None] for x in ((lse - total).exp(), (new_lse.to(lse) - total).exp()))
    return old * output + share * new.to(output), total


class TorchBlock:
    """PyTorch in float32 (float64 for float64), tile by tile of keys, on any device."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Block`."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        output = q.new_zeros(*q.shape[:3], v.shape[3], dtype=dtype)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=dtype)
        for keys, rows in _tiles(k.shape[2], causal):
            scores = _scores(q[:, :, rows], k[:, :, keys], causal, scale)  # [1, G, R, l, s]
            tile_lse = scores.logsumexp(-1)  # [1, G, R, l]
            weights = torch.exp(scores - tile_lse[..., None])
            part = weights @ v[:, :, None, keys].to(dtype)  # [1, G, R, l, V]
            parts = part.flatten(1, 2), tile_lse.flatten(1, 2)
            merged = merge(output[:, :, rows], lse[:, :, rows], *parts)
            output[:, :, rows], lse[:, :, rows] = merged
        return output, lse

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Block`."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        delta = (do.to(dtype) * o.to(dtype)).sum(-1, keepdim=True)  # [1, H, L, 1]
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
        for keys, rows in _tiles(k.shape[2], causal):
            scores = _scores(q[:, :, rows], k[:, :, keys], causal, scale)  # [1, G, R, l, s]
            groups = scores.shape[1]
            whole = lse[:, :, rows, None].unflatten(1, (groups, -1))
            grad, share, query = (
                x[:, :, rows].unflatten(1, (groups, -1)).to(dtype) for x in (do, delta, q)
            )
            weights = torch.exp(scores - whole)
            dv[:, :, keys] += (weights.mT @ grad).sum(2)
            steps = weights * (grad @ v[:, :, None, keys].mT.to(dtype) - share) * scale
            dq[:, :, rows] += (steps @ k[:, :, None, keys].to(dtype)).flatten(1, 2)
            dk[:, :, keys] += (steps.mT @ query).sum(2)
        return dq, dk, dv


class KernelBlock:
    """torch's fused kernels."""

    def __init__(self, kernel: str) -> None:
        """Take "cpu", "flash" or "cudnn"."""
        self.kernel = kernel

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Block`."""
        return sdpa.part_forward(q, k, v, causal, scale, self.kernel)

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Block`."""
        wide_k, wide_v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        output = o.to(q.dtype)
        grads = sdpa.part_backward(
            do, None, q, wide_k, wide_v, output, lse, causal, scale, self.kernel
        )
        dq, dk, dv = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in grads)
        dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
        return dq, dk, dv


def _tiles(num_keys: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Tiles of keys, and the queries that see any of them."""
    for start in range(0, num_keys, _TILE):
        stop = min(start + _TILE, num_keys)
        yield slice(start, stop), slice(start if causal else 0, None)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """`[1, G, R, L, S]`; with a causal mask query n is the first that sees key n."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (k.shape[1], -1)).to(dtype)
    scores = (grouped @ k[:, :, None].mT.to(dtype)) * scale
    if causal:
        row = torch.arange(q.shape[2], device=q.device)[:, None]
        hidden = torch.arange(k.shape[2], device=q.device) > row
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores
