"""How one head of one sequence is cut into segments, in the cheaper of two ways.

* halo: a segment starts with zero state some tokens early and only warms its state up there.
  What it misses is at most exp(g L) |S| for a halo of L tokens and the state S in front of it; with
  L >= HALO_EXPONENT / -g that is 2^-24 |S|, the rounding of the float32 state itself. A halo that
  reaches back to the start of the sequence misses nothing. (A segment's last state misses less
  still: what was in front of the halo has decayed over the segment, too.)
* two passes: a first pass computes what each segment adds to the state, a scan over segments makes
  of that the states that enter them, and the second pass starts from those. Exact for any decay.

All counts are in chunks of tokens; a chunk that only updates the state costs STATE_COST of one that
also gives outputs. Pure Python.
"""

import math
from functools import lru_cache
from typing import NamedTuple

HALO_EXPONENT = 24 * math.log(2)
STATE_COST = 0.5  # of a chunk that only updates the state: it reads half as much


class Cut(NamedTuple):
    """Where segments start, how many chunks before that each warms up, and whether in two passes."""

    starts: tuple[int, ...]
    warms: tuple[int, ...]
    two_pass: bool


def halo_chunks(log_decay: float, chunk: int) -> float:
    """Chunks after which what came before has decayed to 2^-24; infinite without decay."""
    return math.ceil(HALO_EXPONENT / -log_decay / chunk) if log_decay < 0 else math.inf


# Packs of training are planned anew each step, out of documents whose lengths come again and again.
@lru_cache(1 << 16)
def cut_to_cost(num_chunks: int, halo: float, target: float, mode: str | None) -> Cut | None:
    """The cheaper cut of which no segment costs more than `target`; None if there is none.

    `mode` is "halo", "two-pass", or None for either.
    """
    plain = _starts_at_cost(num_chunks, 0, target) or [0]
    starts = None if mode == "two-pass" else _starts_at_cost(num_chunks, halo, target)
    return _cheaper(halo, starts, plain, mode)


def cut_into(num_chunks: int, halo: float, num_segments: int, mode: str | None) -> Cut:
    """The cheaper cut into `num_segments` of about equal cost, or into `num_chunks` if that is less."""
    count = max(1, min(num_segments, num_chunks))
    plain = [i * num_chunks // count for i in range(count)]
    starts = None if mode == "two-pass" else _starts_of_equal_cost(num_chunks, halo, count)
    cut = _cheaper(halo, starts, plain, mode)
    assert cut is not None, "a halo that reaches back to the start serves any segment"
    return cut


def chain_of(num_chunks: int, num_segments: int, finer: int) -> tuple[int, list[int]]:
    """Rows of a chain of states: chunks that each spans, and the first row of each segment.

    The first pass cuts into rows, `finer` of them a segment where there are chunks enough. The last
    segment has one: what lies in front of it is all that a first pass has to read.
    """
    per_row = -(-num_chunks // (num_segments * finer))
    if -(-num_chunks // per_row) < num_segments:
        per_row = num_chunks // num_segments
    num_rows = -(-num_chunks // per_row)
    return per_row, [i * num_rows // num_segments for i in range(num_segments)]


def _cheaper(
    halo: float, starts: list[int] | None, plain: list[int], mode: str | None
) -> Cut | None:
    if starts is not None:
        warms = [int(min(halo, start)) for start in starts]
        if mode == "halo" or sum(warms) <= plain[-1]:
            return Cut(tuple(starts), tuple(warms), False)
    return None if mode == "halo" else Cut(tuple(plain), (0,) * len(plain), len(plain) > 1)


def _starts_at_cost(num_chunks: int, halo: float, target: float) -> list[int] | None:
    starts, position = [0], int(target)
    while position < num_chunks:
        starts.append(position)
        length = int(target - STATE_COST * min(halo, position))
        if length < 1:
            return None
        position += length
    return starts


def _starts_of_equal_cost(num_chunks: int, halo: float, count: int) -> list[int]:
    """Starts of `count` segments, for the smallest cost with which they reach the end."""
    low, high = 0.0, float(num_chunks)
    for _ in range(50):
        cost = (low + high) / 2
        ends = [0.0]
        for _ in range(count):
            ends.append(ends[-1] + max(0.0, cost - STATE_COST * min(halo, ends[-1])))
        low, high = (low, cost) if ends[-1] >= num_chunks else (cost, high)
    starts = [0]
    for i in range(1, count):  # a chunk each at least
        starts.append(min(max(round(ends[i]), starts[-1] + 1), num_chunks - (count - i)))
    return starts
