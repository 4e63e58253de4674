"""How a lightning kernel divides its work: whole sequences, or segments where heads are few.

A kernel runs one head of one sequence from end to end, so that few heads leave most of a GPU idle.
This planner then cuts sequences into segments, for each head in the cheaper of two ways:

* halo: a segment starts with zero state some tokens early and only warms its state up there.
  What it misses is at most exp(g L) |S| for a halo of L tokens and the state S in front of it; with
  L >= HALO_EXPONENT / -g that is 2^-24 |S|, the rounding of the float32 state itself. A halo that
  reaches back to the start of the sequence misses nothing.
* two passes: a first pass computes what each segment adds to the state, a scan over segments makes
  of that the states that enter them, and the second pass starts from those. Exact for any decay.

Costs are counted in chunks of tokens: a chunk that only updates the state reads half as much as one
that also gives outputs. Pure Python; positions count from where a scan begins, so that one plan
serves scans in either direction.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

HALO_EXPONENT = 24 * math.log(2)
STATE_COST = 0.5  # of a chunk that only updates the state
UNIT_COST = 2.0  # chunks that the start of a unit costs
TWO_PASS_COST = 8.0  # chunks that two more launches cost
MAX_WAVES = 4
MODES = ("single", "halo", "two-pass")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a plan is for: programs that run at once, programs a unit takes, tokens a chunk."""

    slots: int
    programs_per_unit: int
    chunk: int


class Unit(NamedTuple):
    """A stretch of one head of one sequence: `warm` chunks that only update the state, from
    position `start` on, then `tokens` tokens. It starts from the sequence's initial state, from a
    row of the workspace, or (-1) from zero; `is_last` says that its last state is the final one.
    """

    sequence: int
    head: int
    start: int
    warm: int
    tokens: int
    workspace_row: int = -1
    from_initial: bool = True
    is_last: bool = True


class Chain(NamedTuple):
    """Segments of a head in two passes: their states take `num_rows` rows of the workspace."""

    sequence: int
    head: int
    first_row: int
    num_rows: int
    chunks_per_row: int


@dataclass(frozen=True)
class Plan:
    """Units of the (second) pass, longest first; those of the first pass; its chains.

    With `heads_per_unit` > 1 each unit stands for all heads.
    """

    units: list[Unit]
    heads_per_unit: int
    state_units: list[Unit]
    chains: list[Chain]

    @property
    def num_workspace_rows(self) -> int:
        """Rows of the workspace of states."""
        return sum(chain.num_rows for chain in self.chains)


def halo_chunks(log_decay: float, chunk: int) -> float:
    """Chunks after which what came before has decayed to 2^-24; infinite without decay."""
    return math.ceil(HALO_EXPONENT / -log_decay / chunk) if log_decay < 0 else math.inf


def plan(
    lengths: Sequence[int],
    log_decays: Sequence[float],
    machine: Machine,
    *,
    mode: str | None = None,
    num_segments: int | None = None,
) -> Plan:
    """Divide sequences of `lengths` tokens with a head for each of `log_decays`.

    Args:
        lengths: tokens of each sequence, of which any may be 0.
        log_decays: natural logs <= 0; 0 where it is unknown, as it is exact for every decay.
        machine: what runs the plan.
        mode: one of `MODES` for all heads; None takes what is estimated to be fastest.
        num_segments: segments a sequence (fewer where chunks are), instead of an estimate.

    Raises:
        ValueError: for an unknown mode.
    """
    if mode is not None and mode not in MODES:
        raise ValueError(f"expected a mode among {', '.join(MODES)}, got {mode!r}")
    counts = Counter(-(-n // machine.chunk) for n in lengths)
    halos = [halo_chunks(g, machine.chunk) for g in log_decays]
    longest = max(counts, default=0)
    best, best_mode = 0, mode
    if mode != "single" and num_segments is not None:
        best = _smallest(1, longest, lambda c: _segments(counts, halos, c, mode) <= num_segments)
    elif mode != "single":
        best_time = 0.9 * _makespan(counts, len(halos), machine)
        load = len(halos) * machine.programs_per_unit * sum(n * counts[n] for n in counts)
        for waves, tried in itertools.product(range(1, MAX_WAVES + 1), (mode or "halo", mode)):
            fits = partial(_fits, counts, halos, machine, tried, waves)
            shortest = max(1, load // (waves * machine.slots))
            if shortest >= longest:
                continue
            target = _smallest(shortest, longest, fits)
            time = waves * (target + UNIT_COST)
            time += _first_pass(counts, halos, machine, target, tried)
            if time < best_time:
                best, best_mode, best_time = target, tried, time
    if not 0 < best < longest:
        return _whole(lengths, len(log_decays))
    return _segmented(lengths, halos, machine, best, best_mode)


class _Cut(NamedTuple):
    """Where segments start, in chunks, how many chunks before that each warms up, and the mode."""

    starts: list[int]
    warms: list[int]
    two_pass: bool


def _cut(num_chunks: int, halo: float, target: float) -> list[int] | None:
    """Starts of segments of which none costs more than `target`, None where the halo forbids it."""
    starts, position = [0], int(target)
    while position < num_chunks:
        starts.append(position)
        length = int(target - STATE_COST * min(halo, position))
        if length < 1:
            return None
        position += length
    return starts


def _choose(num_chunks: int, halo: float, target: float, mode: str | None) -> _Cut | None:
    """The cheaper way to cut a head so that no segment costs more than `target`, if there is one."""
    plain = _cut(num_chunks, 0, target) or [0]
    starts = None if mode == "two-pass" else _cut(num_chunks, halo, target)
    if starts is not None:
        warms = [int(min(halo, start)) for start in starts]
        if mode == "halo" or sum(warms) <= plain[-1]:
            return _Cut(starts, warms, False)
    return None if mode == "halo" else _Cut(plain, [0] * len(plain), len(plain) > 1)


def _smallest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """Smallest value in [low, high] that fits, if larger values fit wherever a smaller one does."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def _cuts(
    counts: Counter[int], halos: list[float], target: int, mode: str | None
) -> list[tuple[int, _Cut | None]]:
    """Cuts of all heads of the sequences longer than `target`, with how often they occur."""
    return [
        (count, _choose(n, halo, target, mode))
        for n, count in counts.items()
        if n > target
        for halo in halos
    ]


def _segments(counts: Counter[int], halos: list[float], target: int, mode: str | None) -> float:
    """Segments of the head that has most, infinite if a head can't be cut."""
    cuts = _cuts(counts, halos, target, mode)
    return max((len(cut.starts) if cut else math.inf for _, cut in cuts), default=1)


def _fits(
    counts: Counter[int],
    halos: list[float],
    machine: Machine,
    mode: str | None,
    waves: int,
    target: int,
) -> bool:
    """Whether all work is done in `waves` rounds of units that cost `target` chunks."""
    units = sum(n * count for n, count in counts.items() if n <= target) * len(halos) / target
    for count, cut in _cuts(counts, halos, target, mode):
        units += count * len(cut.starts) if cut else math.inf
    return units * machine.programs_per_unit <= waves * machine.slots


def _first_pass(
    counts: Counter[int], halos: list[float], machine: Machine, target: int, mode: str | None
) -> float:
    """Chunks of time that the first of two passes takes, spread over the machine."""
    cuts = _cuts(counts, halos, target, mode)
    chunks = sum(count * cut.starts[-1] for count, cut in cuts if cut and cut.two_pass)
    time = STATE_COST * chunks * machine.programs_per_unit / machine.slots
    return time + TWO_PASS_COST if chunks else 0.0


def _makespan(counts: Counter[int], num_heads: int, machine: Machine) -> float:
    """Chunks of time that whole sequences take, longest first (a bound that is nearly reached)."""
    programs, load, time = 0, 0.0, 0.0
    for n in sorted(counts, reverse=True):
        added = counts[n] * num_heads * machine.programs_per_unit
        programs, load = programs + added, load + added * (n + UNIT_COST)
        time = max(time, -(-programs // machine.slots) * (n + UNIT_COST))
    return max(time, load / machine.slots)


def _whole(lengths: Sequence[int], num_heads: int) -> Plan:
    units = [Unit(n, 0, 0, 0, tokens) for n, tokens in enumerate(lengths)]
    return Plan(sorted(units, key=lambda u: -u.tokens), num_heads, [], [])


def _segmented(
    lengths: Sequence[int],
    halos: list[float],
    machine: Machine,
    target: int,
    mode: str | None,
) -> Plan:
    chunk = machine.chunk
    counts = Counter(-(-n // chunk) for n in lengths)
    cuts = _cuts(counts, halos, target, mode)
    added = sum(count * (len(cut.starts) - 1) for count, cut in cuts if cut and cut.two_pass)
    # The first pass has few heads too, so it cuts finer: `finer` rows of the workspace a segment.
    finer = max(1, machine.slots // max(1, added * machine.programs_per_unit))
    per_row = -(-target // finer)
    result = Plan([], 1, [], [])
    for sequence, tokens in enumerate(lengths):
        num_chunks = -(-tokens // chunk)
        for head, halo in enumerate(halos):
            cut = _choose(num_chunks, halo, target, mode)
            assert cut is not None, "a target is taken only if every head can be cut for it"
            if cut.two_pass and num_chunks <= finer * per_row:
                cut = _Cut([0], [0], False)
            if not cut.two_pass:
                result.units.extend(_halo_units(sequence, head, tokens, cut, chunk))
                continue
            starts = range(0, num_chunks, finer * per_row)
            num_rows = (len(starts) - 1) * finer + 1
            chain = Chain(sequence, head, result.num_workspace_rows, num_rows, per_row)
            result.chains.append(chain)
            result.units.extend(_second_pass_units(chain, tokens, starts, chunk))
            result.state_units.extend(_first_pass_units(chain, chunk))
    result.units.sort(key=lambda u: -(u.tokens + STATE_COST * chunk * u.warm))
    return result


def _halo_units(sequence: int, head: int, tokens: int, cut: _Cut, chunk: int) -> list[Unit]:
    stops = [*(s * chunk for s in cut.starts[1:]), tokens]
    return [
        Unit(
            sequence,
            head,
            (start - warm) * chunk,
            warm,
            stop - start * chunk,
            from_initial=start == warm,
            is_last=stop == tokens,
        )
        for start, warm, stop in zip(cut.starts, cut.warms, stops, strict=True)
    ]


def _second_pass_units(chain: Chain, tokens: int, starts: Sequence[int], chunk: int) -> list[Unit]:
    stops = [*(s * chunk for s in starts[1:]), tokens]
    return [
        Unit(
            chain.sequence,
            chain.head,
            start * chunk,
            0,
            stop - start * chunk,
            workspace_row=chain.first_row + start // chain.chunks_per_row,
            from_initial=False,
            is_last=stop == tokens,
        )
        for start, stop in zip(starts, stops, strict=True)
    ]


def _first_pass_units(chain: Chain, chunk: int) -> list[Unit]:
    """Units of all rows but the last, whose workspace row is the one they write."""
    tokens = chain.chunks_per_row * chunk
    return [
        Unit(
            chain.sequence,
            chain.head,
            i * tokens,
            0,
            tokens,
            workspace_row=chain.first_row + i,
            from_initial=False,
            is_last=False,
        )
        for i in range(chain.num_rows - 1)
    ]
