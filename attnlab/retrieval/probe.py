"""How far back the ops recall, without any training: random pairs streamed into a state.

Legend: N tokens streamed, T tokens of a chunk, H heads, R readings, K key dim, V value dim, C entries
of the codebook.

A pair (random unit key, entry of a random codebook) is written every `write_gap` tokens, and a stored
key asks for its value; see `attnlab.retrieval.theory` for what is to be expected. The tokens never
exist all at once: a chunk is drawn from its own seed, goes through the very ops that models run, and
is forgotten, so that 4M tokens take the memory of one chunk.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab import functional
from attnlab.checks import expect
from attnlab.decay import minimax_log_decay
from attnlab.retrieval import theory
from attnlab.retrieval.pairs import READINGS, Pairs, Stream

CHUNK = 1 << 15
MINIMAX_HEADS, MINIMAX_LAYERS = 64, 80


@dataclass(frozen=True, kw_only=True)
class Head:
    """A lightning head: slope (0: no decay), and the layer and head of MiniMax-01 that has it."""

    slope: float
    layer: int | None = None
    head: int | None = None


@dataclass(frozen=True, kw_only=True)
class Recall:
    """How often one kind of head recalled: `correct` of `n` readings, and `predicted` of them.

    `distance` is None where it makes no difference. `margin` is the mean of the right entry's product
    with the output over the best other one's. `slope` and `layer`, `head` are lightning's;
    `logit_scale` is softmax's, `per_log_length` if it grows as ln N.
    """

    op: str
    num_tokens: int
    distance: int | None
    head_dim: int
    write_gap: int
    n: int
    correct: int
    margin: float
    predicted: float
    slope: float | None = None
    layer: int | None = None
    head: int | None = None
    logit_scale: float | None = None
    per_log_length: bool = False


def minimax_heads() -> list[Head]:
    """Heads of MiniMax-01 from fast to slow, and one without decay.

    Of layer 0 every 16th head, and of layers 40, 70 and 78 (the last lightning layer) the slowest.
    """
    chosen = [(0, 15), (0, 31), (0, 47), (0, 63), (40, 63), (70, 63), (78, 63)]
    slopes = [
        -float(minimax_log_decay(MINIMAX_HEADS, layer, MINIMAX_LAYERS)[head])
        for layer, head in chosen
    ]
    named = zip(slopes, chosen, strict=True)
    return [*(Head(slope=s, layer=layer, head=h) for s, (layer, h) in named), Head(slope=0.0)]


def probe_lightning(
    stream: Stream,
    heads: list[Head],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Iterator[Recall]:
    """Recall of each decaying head by distance, and of heads without decay by number of tokens.

    Distances double from the gap between writes to half the stream. A reading at a distance is one
    of 64 moments in the stream's second half; without decay all distances are alike, and 64 pairs
    are read whenever the number of tokens has doubled.
    """
    pairs = Pairs(stream, device, dtype)
    log_decay = torch.tensor([-head.slope for head in heads], dtype=torch.float32, device=device)
    gap = stream.write_gap
    step = stream.num_tokens // (2 * READINGS * gap) * gap
    distances = [gap << i for i in range((step * READINGS // gap).bit_length())]
    kept = _Kept(pairs, stream, distances, step)
    state, decaying, flat = None, [], []
    for number, (start, stop) in enumerate(_chunks(stream, step), start=1):
        keys, values, entries = pairs.chunk(start, stop, number)
        shape = (1, len(heads), stop - start, stream.head_dim)
        state = functional.lightning_state(
            keys.expand(shape),
            values.expand(shape),
            log_decay,
            initial_state=state,
            backend=backend,
        )
        kept.store(start, stop, keys, entries)
        seen = state[0] * log_decay.exp()[:, None, None]  # [H, K, V], by the token that asks
        if stop in kept.moments:
            decaying.append(kept.read(stop, seen))
        if stop in kept.doublings:
            flat.append((stop, *kept.read_any(stop, seen)))
    yield from _by_distance(stream, heads, distances, decaying)
    yield from _by_length(stream, heads, flat)


class _Kept:
    """Keys and entries that will be asked for, at their positions, until they are."""

    def __init__(self, pairs: Pairs, stream: Stream, distances: list[int], step: int) -> None:
        self.pairs, self.gap = pairs, stream.write_gap
        last = stream.num_tokens // step * step
        self.moments = set(range(last - (READINGS - 1) * step, last + 1, step))
        self.distances = distances
        self.doublings = set(_doublings(stream))
        wanted = {self._position(m, d) for m in self.moments for d in distances}
        wanted |= {p for m in self.doublings for p in self._spread(m)}
        self.positions = torch.tensor(sorted(wanted))
        size = len(self.positions), stream.head_dim
        self.keys = torch.zeros(size, device=pairs.device, dtype=pairs.dtype)
        self.entries = torch.zeros(size[0], device=pairs.device, dtype=torch.int64)

    def _position(self, moment: int, distance: int) -> int:
        """Position of the write that lies so far before a token; both are multiples of the gap."""
        return moment - distance

    def _spread(self, moment: int) -> list[int]:
        """64 writes evenly spread over the first `moment` tokens."""
        writes = moment // self.gap
        return [writes * i // READINGS * self.gap for i in range(READINGS)]

    def store(self, start: int, stop: int, keys: Tensor, entries: Tensor) -> None:
        """Keep what is wanted of a chunk."""
        low, high = torch.searchsorted(self.positions, torch.tensor([start, stop])).tolist()
        place = (self.positions[low:high] - start).to(keys.device)
        self.keys[low:high], self.entries[low:high] = keys[place], entries[place]

    def read(self, moment: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """Correct and margin `[H, distances]` of states `[H, K, V]` at a moment."""
        return self._ask([self._position(moment, d) for d in self.distances], states)

    def read_any(self, moment: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """Correct and margin `[H, 64]` of pairs all over the stream so far."""
        return self._ask(self._spread(moment), states)

    def _ask(self, positions: list[int], states: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.searchsorted(self.positions, torch.tensor(positions)).to(states.device)
        outputs = self.keys[index].float() @ states  # [Q, K] @ [H, K, V] -> [H, Q, V]
        return self.pairs.judge(outputs, self.entries[index].expand(outputs.shape[:2]))


def _chunks(stream: Stream, step: int) -> Iterator[tuple[int, int]]:
    """Bounds of chunks that end at every moment of a reading."""
    last = stream.num_tokens // step * step
    marks = {*range(0, last + 1, step), *_doublings(stream)}
    marks |= set(range(0, last + 1, CHUNK))
    bounds = sorted(marks)
    return itertools.pairwise(bounds)


def _doublings(stream: Stream) -> list[int]:
    """Numbers of tokens at which what doesn't depend on distance is read."""
    first = READINGS * stream.write_gap
    last = stream.num_tokens
    return [first << i for i in range((last // first).bit_length())]


def _by_distance(
    stream: Stream, heads: list[Head], distances: list[int], found: list[tuple[Tensor, Tensor]]
) -> Iterator[Recall]:
    correct = torch.stack([c for c, _ in found]).sum(0).tolist()  # [H, distances]
    margin = torch.stack([m for _, m in found]).mean(0).tolist()
    for i, head in enumerate(heads):
        for j, distance in enumerate(distances):
            if head.slope > 0:
                yield _recall(
                    stream,
                    head,
                    stream.num_tokens,
                    distance,
                    len(found),
                    correct[i][j],
                    margin[i][j],
                )


def _by_length(
    stream: Stream, heads: list[Head], found: list[tuple[int, Tensor, Tensor]]
) -> Iterator[Recall]:
    for i, head in enumerate(heads):
        for num_tokens, correct, margin in found:
            if head.slope == 0:
                hits = int(correct[i].sum())
                yield _recall(
                    stream, head, num_tokens, None, READINGS, hits, float(margin[i].mean())
                )


def _recall(
    stream: Stream,
    head: Head,
    num_tokens: int,
    distance: int | None,
    n: int,
    correct: int,
    margin: float,
) -> Recall:
    predicted = theory.lightning_recall(
        slope=head.slope,
        num_tokens=num_tokens,
        distance=distance or 0,
        key_dim=stream.head_dim,
        value_dim=stream.head_dim,
        write_gap=stream.write_gap,
        codebook=stream.codebook,
    )
    return Recall(
        op="lightning",
        num_tokens=num_tokens,
        distance=distance,
        head_dim=stream.head_dim,
        write_gap=stream.write_gap,
        n=n,
        correct=correct,
        margin=margin,
        predicted=predicted,
        slope=head.slope,
        layer=head.layer,
        head=head.head,
    )


def probe_softmax(
    stream: Stream,
    logit_scales: list[float],
    *,
    per_log_length: float | None = 1.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Iterator[Recall]:
    """Recall of softmax heads by number of keys, read whenever it has doubled.

    The first 64 keys ask. Heads have a fixed `logit_scale`, and one has `per_log_length` times ln N,
    N being the number of keys at the reading: it starts over for each N.
    """
    expect(
        stream.write_gap == 1, "write_gap 1: softmax has no use for empty keys", stream.write_gap
    )
    pairs = Pairs(stream, device, dtype)
    lengths = _doublings(stream)
    heads = [(scale, lengths, False) for scale in logit_scales]
    if per_log_length is not None:
        heads += [(per_log_length * math.log(n), [n], True) for n in lengths]
    bounds = sorted({0, *lengths, *range(0, lengths[-1], CHUNK)})
    merged: list[tuple[Tensor, Tensor] | None] = [None] * len(heads)
    for number, (start, stop) in enumerate(itertools.pairwise(bounds), start=1):
        keys, values, entries = pairs.chunk(start, stop, number)
        if start == 0:
            asking, asked = keys[:READINGS], entries[:READINGS]
        active = [i for i, (_, ends, _) in enumerate(heads) if ends[-1] >= stop]
        scales = torch.tensor([heads[i][0] for i in active], device=device)
        query = (asking.float() * scales[:, None, None]).to(dtype)[None]  # [1, H, R, K]
        shape = (1, len(active), stop - start, stream.head_dim)
        outputs, lse = functional.softmax_attention_with_lse(
            query, keys.expand(shape), values.expand(shape), scale=1.0, backend=backend
        )
        for place, i in enumerate(active):
            merged[i] = _merge(merged[i], outputs[0, place].float(), lse[0, place])
            scale, ends, grows = heads[i]
            if stop in ends:
                state = merged[i]
                assert state is not None
                correct, margin = pairs.judge(state[0], asked)
                yield _softmax_recall(stream, scale, grows, stop, correct, margin)


def _merge(
    before: tuple[Tensor, Tensor] | None, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from outputs `[R, V]` and logsumexps `[R]` over each."""
    if before is None:
        return output, lse
    total = torch.logaddexp(before[1], lse)
    shares = (before[1] - total).exp()[:, None], (lse - total).exp()[:, None]
    return before[0] * shares[0] + output * shares[1], total


def _softmax_recall(
    stream: Stream, scale: float, grows: bool, num_tokens: int, correct: Tensor, margin: Tensor
) -> Recall:
    return Recall(
        op="softmax",
        num_tokens=num_tokens,
        distance=None,
        head_dim=stream.head_dim,
        write_gap=1,
        n=READINGS,
        correct=int(correct.sum()),
        margin=float(margin.mean()),
        predicted=theory.softmax_recall(
            logit_scale=scale,
            num_tokens=num_tokens,
            key_dim=stream.head_dim,
            value_dim=stream.head_dim,
            codebook=stream.codebook,
        ),
        logit_scale=scale,
        per_log_length=grows,
    )
