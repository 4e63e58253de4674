"""Where the tokens of one call belong: which sequence, which position, after how many others.

Legend: B rows, T tokens, N packed sequences.

A call comes as rows of equal length ("dense"), or as sequences packed end to end in one row. A
batch with left padding is packed first, so that no layer ever sees padding.
"""

import itertools
from dataclasses import dataclass, replace

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
    host, and `rows` `[B or 1, T]` the cache rows of the tokens; without one they are None. A single
    step has the tokens of each row with the new one, `lengths` `[B]` int64, and a `span` of slots
    that holds them all.
    """

    positions: Tensor
    cu_seqlens: Tensor | None = None
    sequence: Tensor | None = None
    past: tuple[int, ...] | None = None
    counts: tuple[int, ...] | None = None
    rows: Tensor | None = None
    lengths: Tensor | None = None
    span: int = 0

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
    place = Placement(positions=positions, past=tuple(cache.host_lengths), counts=counts, rows=rows)
    if num_tokens > 1:
        return place
    return replace(place, lengths=cache.lengths + 1, span=cache.span)


def packed(input_ids: Tensor, cu_seqlens: Tensor, cache: ModelCache | None) -> Placement:
    """Placement of `[1, T]` tokens of sequences packed end to end, number n for cache row n.

    Raises:
        ValueError: for a batch of more than one row, or bounds that don't fit it.
    """
    expect(input_ids.shape[0] == 1, "packed tokens of batch 1", input_ids.shape[0])
    check_cu_seqlens(cu_seqlens, "cu_seqlens", input_ids.device)
    if not torch.compiler.is_compiling():
        check_cu_seqlens_values(cu_seqlens, "cu_seqlens", input_ids.shape[1])
    bounds = cu_seqlens.to(input_ids.device)
    token = torch.arange(input_ids.shape[1], device=input_ids.device)
    sequence = torch.searchsorted(bounds, token, right=True) - 1  # [T]
    positions = token - bounds[sequence]
    if cache is None:
        return Placement(positions=positions[None], cu_seqlens=bounds, sequence=sequence[None])
    stops = remembered(cu_seqlens, values_of)
    counts = tuple(stop - start for start, stop in itertools.pairwise(stops))
    cache.check_room(counts)
    return Placement(
        positions=(positions + cache.lengths[sequence])[None],
        cu_seqlens=bounds,
        sequence=sequence[None],
        past=tuple(cache.host_lengths),
        counts=counts,
        rows=sequence[None],
    )


def left_padding(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """Mask on the CPU, `[B, T]` bool, of a batch that has padding on the left; None without any.

    Raises:
        ValueError: for a mask of another shape, with other values than 0 and 1, or with padding
            after a token.
    """
    if attention_mask is None:
        return None
    got, shape = list(attention_mask.shape), list(input_ids.shape)
    expect(got == shape, f"attention_mask of shape {shape}", got)
    mask = attention_mask.detach().cpu()
    binary = bool(((mask == 0) | (mask == 1)).all())
    expect(binary, "attention_mask of 0 and 1", mask.unique().tolist()[:4])
    mask = mask.bool()
    gaps = (mask[:, :-1] & ~mask[:, 1:]).any(1).nonzero().flatten().tolist()
    expect(not gaps, "padding on the left", f"padding after a token in rows {gaps[:4]}")
    expect(bool(mask.any()), "at least one token", "padding alone")
    return None if mask.all() else mask


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raise `ValueError` unless ids are `[B, T]` integers in the vocabulary, at least one.

    The values of single steps on a device are taken on trust: reading them would wait for it.
    """
    integer = input_ids.dtype in (torch.int32, torch.int64)
    got = f"{list(input_ids.shape)} {input_ids.dtype}"
    expect(input_ids.ndim == 2 and integer, "input_ids [B, T] of int32 or int64", got)
    expect(input_ids.numel() > 0, "at least one token", got)
    if input_ids.is_meta or torch.compiler.is_compiling():
        return
    if input_ids.is_cuda and (input_ids.shape[1] == 1 or torch.cuda.is_current_stream_capturing()):
        return
    low, high = (int(x) for x in input_ids.aminmax())
    expect(low >= 0 and high < vocab_size, f"ids in [0, {vocab_size})", f"{low} to {high}")
