"""Which tokens of a packed stream lie on which rank, and what that makes the ranks exchange.

Legend: T tokens of the pack, N documents, W ranks, C chunks, H heads; i, j number chunks.

The stream's T tokens are cut into C chunks in their order; each has an owner, and a rank holds its
chunks end to end in that order. Contiguous sharding has one chunk a rank, zigzag two. A chunk's
fragments are its parts of different documents: only its first can go on with a document that began
before it, and only its last can be gone on with. All of this is plain Python on the host, computed
alike on every rank, so that no rank ever waits for a message that another doesn't send.

Lightning attention's state decays by exp(g) a token, so what enters chunk i is a sum over earlier
chunks j of exp(g distance_ij) times the state that j's last fragment leaves when it starts from
zero: `distances` is the matrix of these exponents (LASP+, arXiv 2501.08313, section 3.2.2).
"""

import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from attnlab.checks import expect

UNREACHED = -1
"""Entry of `PackPlan.distances` for chunks between which no document runs."""


class Span(NamedTuple):
    """Tokens [start, stop)."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


class Rectangle(NamedTuple):
    """Local queries of one rank that see local keys of another, all of them or up to themselves."""

    queries: Span
    keys: Span
    is_causal: bool


@dataclass(frozen=True)
class PackPlan:
    """A pack of documents spread over ranks.

    `cu_seqlens` are the documents' bounds, from 0 to T; `bounds` `[C+1]` those of the chunks, which
    may be empty; `owners` `[C]` their ranks.

    Raises:
        ValueError: for bounds that don't rise from 0 to T, or owners that are no ranks.
    """

    cu_seqlens: tuple[int, ...]
    bounds: tuple[int, ...]
    owners: tuple[int, ...]
    world_size: int

    def __post_init__(self) -> None:
        """Check that the parts fit each other."""
        _check_rising("cu_seqlens", self.cu_seqlens)
        _check_rising("chunk bounds", self.bounds)
        total = self.cu_seqlens[-1]
        expect(self.bounds[-1] == total, f"chunks that end at the {total} tokens", self.bounds[-1])
        chunks = len(self.bounds) - 1
        expect(len(self.owners) == chunks, f"{chunks} owners, one a chunk", len(self.owners))
        wrong = [rank for rank in self.owners if not 0 <= rank < self.world_size]
        expect(not wrong, f"owners in [0, {self.world_size})", wrong[:4])

    @classmethod
    def contiguous(cls, cu_seqlens: Sequence[int], world_size: int) -> "PackPlan":
        """One chunk a rank, of equal lengths but for one token.

        Raises:
            ValueError: for fewer tokens than ranks.
        """
        return cls.contiguous_with(cu_seqlens, _even(cu_seqlens[-1], world_size, "ranks"))

    @classmethod
    def contiguous_with(cls, cu_seqlens: Sequence[int], lengths: Sequence[int]) -> "PackPlan":
        """One chunk of each of `lengths` tokens, one a rank; a rank may have none."""
        bounds = (0, *itertools.accumulate(lengths))
        return cls(tuple(cu_seqlens), bounds, tuple(range(len(lengths))), len(lengths))

    @classmethod
    def zigzag(cls, cu_seqlens: Sequence[int], world_size: int) -> "PackPlan":
        """Two chunks a rank, number r and its mirror: causal attention costs all ranks alike.

        Raises:
            ValueError: for fewer tokens than chunks.
        """
        lengths = _even(cu_seqlens[-1], 2 * world_size, "chunks")
        bounds = (0, *itertools.accumulate(lengths))
        last = 2 * world_size - 1
        owners = tuple(min(i, last - i) for i in range(2 * world_size))
        return cls(tuple(cu_seqlens), bounds, owners, world_size)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole pack."""
        return self.cu_seqlens[-1]

    @property
    def num_chunks(self) -> int:
        """Chunks of all ranks."""
        return len(self.owners)

    @cached_property
    def max_chunks(self) -> int:
        """Chunks of the rank that has the most."""
        return max((len(chunks) for chunks in self._owned), default=0)

    @cached_property
    def _owned(self) -> tuple[tuple[int, ...], ...]:
        owned: list[list[int]] = [[] for _ in range(self.world_size)]
        for chunk, rank in enumerate(self.owners):
            owned[rank].append(chunk)
        return tuple(tuple(chunks) for chunks in owned)

    def chunks(self, rank: int) -> tuple[int, ...]:
        """Numbers of a rank's chunks, in the order of their tokens."""
        return self._owned[rank]

    def span(self, chunk: int) -> Span:
        """Tokens of a chunk."""
        return Span(self.bounds[chunk], self.bounds[chunk + 1])

    def local_len(self, rank: int) -> int:
        """Tokens that a rank holds."""
        return sum(self.span(chunk).length for chunk in self.chunks(rank))

    @cached_property
    def _offsets(self) -> tuple[int, ...]:
        """Where each chunk starts among its owner's tokens."""
        filled, offsets = [0] * self.world_size, []
        for chunk, rank in enumerate(self.owners):
            offsets.append(filled[rank])
            filled[rank] += self.span(chunk).length
        return tuple(offsets)

    def local(self, chunk: int, span: Span) -> Span:
        """Tokens of a chunk as positions among its owner's."""
        shift = self._offsets[chunk] - self.bounds[chunk]
        return Span(span.start + shift, span.stop + shift)

    def places(self, rank: int, local: Span) -> list[Span]:
        """Spans of the pack that tokens of a rank are, in their order, none empty."""
        found = []
        for chunk in self.chunks(rank):
            lo, hi = self.span(chunk)
            shift = self.bounds[chunk] - self._offsets[chunk]
            found.append(Span(max(lo, local.start + shift), min(hi, local.stop + shift)))
        return [span for span in found if span.length > 0]

    def document_start(self, token: int) -> int:
        """First token of the document that a token belongs to."""
        return self.cu_seqlens[bisect_right(self.cu_seqlens, token) - 1]

    def continues(self, chunk: int) -> bool:
        """Whether the chunk's first token goes on with a document that began before the chunk."""
        lo, hi = self.span(chunk)
        return lo < hi and self.document_start(lo) < lo

    def first_fragment(self, chunk: int) -> Span:
        """Tokens at the start of a chunk that belong to one document."""
        lo, hi = self.span(chunk)
        if lo == hi:
            return Span(lo, hi)
        return Span(lo, min(hi, self.cu_seqlens[bisect_right(self.cu_seqlens, lo)]))

    def last_fragment(self, chunk: int) -> Span:
        """Tokens at the end of a chunk that belong to one document."""
        lo, hi = self.span(chunk)
        return Span(lo, hi) if lo == hi else Span(max(lo, self.document_start(hi - 1)), hi)

    def fragments(self, chunk: int) -> list[Span]:
        """A chunk's parts of different documents, none empty."""
        lo, hi = self.span(chunk)
        inside = self.cu_seqlens[bisect_right(self.cu_seqlens, lo) :]
        cuts = [lo, *itertools.takewhile(lambda c: c < hi, inside), hi]
        return [Span(a, b) for a, b in itertools.pairwise(cuts) if b > a]

    def local_cu_seqlens(self, rank: int) -> Tensor:
        """Bounds of all fragments of a rank among its tokens, int32 on the CPU; [0, 0] for none.

        It is the same tensor in every call, since ops remember what they make of one.
        """
        if rank not in self._local_bounds:
            spans = [self.local(c, span) for c in self.chunks(rank) for span in self.fragments(c)]
            bounds = [0, *(span.stop for span in spans)] if spans else [0, 0]
            self._local_bounds[rank] = torch.tensor(bounds, dtype=torch.int32)
        return self._local_bounds[rank]

    @cached_property
    def _local_bounds(self) -> dict[int, Tensor]:
        return {}

    def positions(self, rank: int) -> Tensor:
        """Place in the pack of each of a rank's tokens, int64 on the CPU."""
        parts = [torch.arange(*self.span(chunk)) for chunk in self.chunks(rank)]
        return torch.cat([torch.empty(0, dtype=torch.int64), *parts])

    def document_positions(self, rank: int) -> Tensor:
        """Place in its document of each of a rank's tokens, as rotary angles need it."""
        places = self.positions(rank)
        starts = torch.tensor(self.cu_seqlens)
        return places - starts[torch.searchsorted(starts, places, right=True) - 1]

    def shard(self, x: Tensor, rank: int, dim: int = 0) -> Tensor:
        """A rank's part of a tensor that has the pack's T tokens along `dim`."""
        return x.index_select(dim, self.positions(rank).to(x.device))

    def join(self, parts: Sequence[Tensor], dim: int = 0) -> Tensor:
        """The whole from all ranks' parts: the inverse of `shard`."""
        order = torch.cat([self.positions(rank) for rank in range(self.world_size)]).argsort()
        return torch.cat(list(parts), dim).index_select(dim, order.to(parts[0].device))

    @cached_property
    def distances(self) -> Tensor:
        """Tokens that a state crosses between chunks, `[C, C]` int64: from column to row.

        It leaves chunk j at its end and enters chunk i at its start; `UNREACHED` where no document
        runs from one to the other, or j is empty.
        """
        bounds = torch.tensor(self.bounds)
        lo, hi = bounds[:-1], bounds[1:]
        number = torch.arange(self.num_chunks)
        starts = torch.tensor(
            [self.document_start(a) if a < b else a for a, b in itertools.pairwise(self.bounds)],
            dtype=torch.int64,
        )
        reached = (number[None, :] < number[:, None]) & (hi > lo)[None, :] & (hi > lo)[:, None]
        reached &= starts[:, None] < hi[None, :]  # chunk i's document began before j ended
        return torch.where(reached, lo[:, None] - hi[None, :], UNREACHED)

    @cached_property
    def crosses_chunks(self) -> bool:
        """Whether any document runs from one chunk to another."""
        return bool((self.distances != UNREACHED).any())

    @cached_property
    def crosses_ranks(self) -> bool:
        """Whether any document runs from one rank's chunk to another's."""
        owner = torch.tensor(self.owners)
        return bool(((self.distances != UNREACHED) & (owner[:, None] != owner[None, :])).any())

    def combination(self, log_decay: Sequence[float], rows: Sequence[int]) -> Tensor:
        """Weights with which each chunk's outgoing state enters chunks `rows`: `[rows, C, H]` float64.

        Rows are those of the matrix A of which a backward pass needs the columns: `absorption`.
        """
        return _powers(self.distances[list(rows)], log_decay)

    def absorption(self, log_decay: Sequence[float], columns: Sequence[int]) -> Tensor:
        """Weights with which the states of chunks `columns` enter each chunk: `[columns, C, H]`."""
        return _powers(self.distances[:, list(columns)].mT, log_decay)

    def rectangles(self, query_rank: int, key_rank: int) -> list[Rectangle]:
        """What one rank's queries see of another's keys: causal fragments, and whole rectangles."""
        pair = query_rank, key_rank
        if pair not in self._rectangles:
            self._rectangles[pair] = self._find_rectangles(*pair)
        return self._rectangles[pair]

    @cached_property
    def _rectangles(self) -> dict[tuple[int, int], list[Rectangle]]:
        return {}

    def _find_rectangles(self, query_rank: int, key_rank: int) -> list[Rectangle]:
        found = []
        for i, j in itertools.product(self.chunks(query_rank), self.chunks(key_rank)):
            if i == j:
                spans = [self.local(i, span) for span in self.fragments(i)]
                found += [Rectangle(span, span, True) for span in spans]
            elif self.distances[i, j] != UNREACHED:
                first = self.first_fragment(i)
                lo, hi = self.span(j)
                seen = Span(max(lo, self.document_start(first.start)), hi)
                found.append(Rectangle(self.local(i, first), self.local(j, seen), False))
        return found

    @cached_property
    def hops(self) -> int:
        """Steps around the ring after which every rank has met all keys that its queries see."""
        rows, columns = (self.distances != UNREACHED).nonzero().unbind(1)
        owner = torch.tensor(self.owners)
        apart = (owner[rows] - owner[columns]) % self.world_size
        return int(apart.max()) if apart.numel() else 0

    def num_pairs(self, rank: int) -> int:
        """Pairs of a query on this rank and a key that it sees: what its softmax layers cost."""
        return sum(
            self._pairs(span) for chunk in self.chunks(rank) for span in self.fragments(chunk)
        )

    def imbalance(self) -> float:
        """Pairs of the rank that has most over those of the mean rank, 1 at best."""
        pairs = [self.num_pairs(rank) for rank in range(self.world_size)]
        return max(pairs) * self.world_size / sum(pairs)

    def _pairs(self, span: Span) -> int:
        first = span.start - self.document_start(span.start) + 1
        return span.length * first + span.length * (span.length - 1) // 2

    @cached_property
    def fingerprint(self) -> int:
        """A number that differs between different plans, below 2^63."""
        digest = hashlib.sha256(repr(self).encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1


def pad_to_block(cu_seqlens: Sequence[int], block: int) -> tuple[tuple[int, ...], Tensor]:
    """Bounds of the documents padded to whole blocks, and where their own tokens go, `[T]` int64.

    MiniMax-01 pads so, to 256, before it packs; nothing here needs it. What is added has to have
    keys and values of zero, and is no token of the loss.
    """
    expect(block > 0, "block > 0", block)
    lengths = [b - a for a, b in itertools.pairwise(cu_seqlens)]
    padded = (0, *itertools.accumulate(-(-n // block) * block for n in lengths))
    places = [torch.arange(a, a + n) for a, n in zip(padded, lengths, strict=False)]
    return padded, torch.cat([torch.empty(0, dtype=torch.int64), *places])


def _powers(distances: Tensor, log_decay: Sequence[float]) -> Tensor:
    """exp(g distance) a head, `[..., H]` float64, zero where unreached."""
    g = torch.tensor(log_decay, dtype=torch.float64)
    power = torch.exp(distances.clamp(min=0)[..., None] * g)
    return torch.where(distances[..., None] == UNREACHED, 0.0, power)


def _even(num_tokens: int, parts: int, what: str) -> list[int]:
    expect(parts > 0, f"at least one of the {what}", parts)
    expect(num_tokens >= parts, f"at least {parts} tokens, one for each of the {what}", num_tokens)
    return [num_tokens * (n + 1) // parts - num_tokens * n // parts for n in range(parts)]


def _check_rising(name: str, bounds: tuple[int, ...]) -> None:
    expect(len(bounds) >= 2 and bounds[0] == 0, f"{name} that start at 0", bounds[:2])
    falls = [b for a, b in itertools.pairwise(bounds) if b < a]
    expect(not falls, f"{name} sorted", f"a fall to {falls[:1]}")
