"""Where the tokens of one call belong: which sequence, which position, after how many others.

Legend: B rows, T tokens, N packed sequences.

A call comes as rows of equal length ("dense"), or as sequences packed end to end in one row. A
batch with left padding is packed first, so that no layer ever sees padding.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.cache import ModelCache
from attnlab.checks import (
    check_cu_seqlens,
    check_cu_seqlens_values,
    expect,
    remembered,
    values_of,
)


@dataclass(frozen=True, eq=False)
class Placement:
    """Positions and bounds of a call's tokens.

    `positions` `[B or 1, T]` int64 count from the start of each sequence. `cu_seqlens` `[N+1]` and
    `sequence` `[1, T]`, the number of each token's sequence, are None for dense rows. With a cache,
    `past` and `counts` are the tokens of each sequence before this call and in it, known on the
    host, and `rows` `[B or 1, T]` the cache rows of the tokens; without one they are None.
    """

    positions: Tensor
    cu_seqlens: Tensor | None = None
    sequence: Tensor | None = None
    past: tuple[int, ...] | None = None
    counts: tuple[int, ...] | None = None
    rows: Tensor | None = None
    span: int | None = None

    @property
    def is_step(self) -> bool:
        """Whether this is one more token for every row of a cache."""
        return self.past is not None and self.cu_seqlens is None and self.positions.shape[1] == 1

    @property
    def has_past(self) -> bool:
        """Whether any sequence has tokens before this call."""
        return self.past is not None and any(self.past)

    @property
    def start(self) -> int | None:
        """Past length that all rows of a dense call share, None where they have no common one."""
        if self.past is None or self.cu_seqlens is not None or len(set(self.past)) > 1:
            return None
        return self.past[0]

    def pieces(self) -> list[tuple[int, slice, slice, int]]:
        """Each sequence that has new tokens: cache row, batch rows, tokens, and its new length."""
        assert self.past is not None and self.counts is not None
        stops = list(itertools.accumulate(self.counts))
        found = []
        for row, (old, new, stop) in enumerate(zip(self.past, self.counts, stops, strict=True)):
            whole, part = slice(row, row + 1), slice(stop - new, stop)
            place = (whole, slice(None)) if self.cu_seqlens is None else (slice(None), part)
            if new:
                found.append((row, *place, old + new))
        return found


def dense(input_ids: Tensor, cache: ModelCache | None) -> Placement:
    """Placement of `[B, T]` tokens without padding."""
    batch, num_tokens = input_ids.shape
    device = input_ids.device
    steps = torch.arange(num_tokens, device=device)[None]  # [1, T]
    if cache is None:
        return Placement(positions=steps)
    counts = (num_tokens,) * batch
    cache.check_room(counts)
    positions = steps + cache.lengths[:, None]  # [B, T]
    rows = torch.arange(batch, device=device)[:, None].expand(batch, num_tokens)
    past, span = tuple(cache.host_lengths), _span(cache) if num_tokens == 1 else None
    return Placement(positions=positions, past=past, counts=counts, rows=rows, span=span)


def packed(num_tokens: int, cu_seqlens: Tensor, cache: ModelCache | None) -> Placement:
    """Placement of sequences packed end to end; with a cache, sequence n goes to its row n."""
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1  # [T]
    positions = token - cu_seqlens[sequence]
    if cache is None:
        return Placement(positions=positions[None], cu_seqlens=cu_seqlens, sequence=sequence[None])
    bounds = remembered(cu_seqlens, values_of)
    counts = tuple(stop - start for start, stop in itertools.pairwise(bounds))
    cache.check_room(counts)
    return Placement(
        positions=(positions + cache.lengths[sequence])[None],
        cu_seqlens=cu_seqlens,
        sequence=sequence[None],
        past=tuple(cache.host_lengths),
        counts=counts,
        rows=sequence[None],
    )


def check_bounds(input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The bounds on the tokens' device, once they are seen to fit `[1, T]` packed tokens."""
    expect(input_ids.shape[0] == 1, "packed tokens of batch 1", input_ids.shape[0])
    check_cu_seqlens(cu_seqlens, "cu_seqlens", input_ids.device)
    if not torch.compiler.is_compiling():
        check_cu_seqlens_values(cu_seqlens, "cu_seqlens", input_ids.shape[1])
    return cu_seqlens.to(input_ids.device)


def left_padding(attention_mask: Tensor, input_ids: Tensor) -> list[int] | None:
    """Tokens of each row of a left-padded batch, None if there is no padding.

    Raises:
        ValueError: for a mask of another shape, with other values than 0 and 1, or with padding
            after a token.
    """
    shape = list(input_ids.shape)
    expect(list(attention_mask.shape) == shape, f"attention_mask {shape}", attention_mask.shape)
    mask = attention_mask.detach().cpu()
    expect(bool(((mask == 0) | (mask == 1)).all()), "attention_mask of 0 and 1", mask.unique())
    mask = mask.bool()
    gaps = (mask[:, :-1] & ~mask[:, 1:]).any(1).nonzero().flatten().tolist()
    expect(not gaps, "padding on the left", f"padding after a token in rows {gaps[:4]}")
    counts = mask.sum(1).tolist()
    expect(sum(counts) > 0, "at least one token", "padding alone")
    return None if min(counts) == input_ids.shape[1] else counts


def _span(cache: ModelCache) -> int:
    """Slots that a decoding step looks at."""
    needed, fixed = cache.max_len + 1, cache.fixed_span
    expect(fixed is None or needed <= fixed, f"a fixed span of at least {needed}", fixed)
    return fixed or needed
