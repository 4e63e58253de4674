"""How a lightning kernel divides its work: whole sequences, or segments where heads are few.

A kernel runs one head of one sequence from end to end, so that few heads leave most of a GPU idle.
This planner then cuts sequences into segments (`attnlab.segments`), each head in the cheaper way:
with halos where it decays, in two passes where it doesn't.

Costs are counted in chunks of tokens. Pure Python; positions count from where a scan begins, so
that one plan serves scans in either direction.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import NamedTuple

from attnlab.segments import STATE_COST, Cut, chain_of, cut_into, cut_to_cost, halo_chunks

UNIT_COST = 2.0  # chunks that the start of a unit costs
ROW_COST = 4.0  # of a workspace row, which is written, replaced and read
TWO_PASS_COST = 8.0  # chunks that two more launches cost
WORTH = 0.9  # of the time of whole sequences, that segments must stay below
MAX_WAVES = 4
FOLLOWED = 1024  # units of a plan, one by one, to find how long it takes
PLANNED_FROM = 256  # chunks of the longest of unequal documents: see `_Work.best_cuts`
MODES = ("single", "halo", "two-pass")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a plan is for: programs that run at once, programs a unit takes, tokens a chunk.

    `num_scans`: how many scans `programs_per_unit` counts. A first pass runs one at a time, so that it has
    that many times the slots.
    """

    slots: int
    programs_per_unit: int
    chunk: int
    num_scans: int = 1


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


Cuts = dict[tuple[int, float], Cut]
"""Cuts by a sequence's chunks and a head's halo."""

Chains = dict[tuple[int, float], tuple[int, list[int]]]
"""What `chain_of` gives of the cuts in two passes, by the same."""


@dataclass(frozen=True)
class _Work:
    """How many sequences have how many chunks, how many heads which halo, and what runs them."""

    sequences: Counter[int]
    heads: Counter[float]
    machine: Machine

    def cuts(self, target: int, mode: str | None) -> Cuts | None:
        """Cuts of all heads of the sequences longer than `target`, so that no segment costs more.

        None if there is a head that can't be cut so.
        """
        found = Cuts()
        for n, halo in itertools.product((n for n in self.sequences if n > target), self.heads):
            cut = cut_to_cost(n, halo, target, mode)
            if cut is None:
                return None
            found[n, halo] = cut
        return found

    def count(self, n: int, halo: float) -> int:
        """How many heads of sequences are alike."""
        return self.sequences[n] * self.heads[halo]

    def chains(self, cuts: Cuts) -> Chains:
        """Rows of the heads in two passes: a first pass has few heads too, so it cuts finer."""
        segments = {key: len(cut.starts) for key, cut in cuts.items() if cut.two_pass}
        added = sum(self.count(*key) * (num - 1) for key, num in segments.items())
        machine = self.machine
        at_once = machine.slots * machine.num_scans // machine.programs_per_unit
        finer = max(1, at_once // max(1, added))
        return {key: chain_of(key[0], num, finer) for key, num in segments.items()}

    def first_pass(self, chains: Chains) -> float:
        """Chunks of time that the first of two passes and its rows take, spread over the machine."""
        if not chains:
            return 0.0
        time = sum(
            self.count(*key) * (STATE_COST * per_row * firsts[-1] + ROW_COST * (firsts[-1] + 1))
            for key, (per_row, firsts) in chains.items()
        )
        return time * self.machine.programs_per_unit / self.machine.slots + TWO_PASS_COST

    def unit_costs(self, cuts: Cuts, chains: Chains) -> Counter[float]:
        """How many units (of the second pass) take how many chunks of time."""
        costs = Counter[float]()
        for n in self.sequences.keys() - {n for n, _ in cuts}:
            costs[n + UNIT_COST] += self.sequences[n] * self.heads.total()
        for (n, halo), cut in cuts.items():
            if cut.two_pass:
                per_row, firsts = chains[n, halo]
                lengths = [float(per_row)] * firsts[-1] + [float(n - per_row * firsts[-1])]
            else:
                stops = (*cut.starts[1:], n)
                spans = zip(cut.starts, stops, cut.warms, strict=True)
                lengths = [stop - start + STATE_COST * warm for start, stop, warm in spans]
            for length in lengths:
                costs[length + UNIT_COST] += self.count(n, halo)
        return costs

    def makespan(self, cuts: Cuts, chains: Chains) -> float:
        """Chunks of time that the units take if each begins, longest first, as soon as it has room.

        Only the longest ones are followed one by one; the others fill what those leave.
        """
        machine, left, filling = self.machine, FOLLOWED, 0.0
        rooms = max(1, round(machine.slots / machine.programs_per_unit))
        busy = [0.0] * rooms
        for cost, count in sorted(self.unit_costs(cuts, chains).items(), reverse=True):
            for _ in range(min(count, left)):
                heapreplace(busy, busy[0] + cost)
            filling += max(0, count - left) * cost
            left = max(0, left - count)
        time = max(*busy, (sum(busy) + filling) / rooms)
        return time * rooms * machine.programs_per_unit / machine.slots

    def best_cuts(self, mode: str | None) -> Cuts:
        """Cuts for the shortest time, none if that is of whole sequences.

        Documents of unequal lengths are a pack, which often comes once: to plan it takes the host
        about as long as a kernel takes for hundreds of chunks, so short ones stay whole.
        """
        longest = max(self.sequences, default=0)
        if len(self.sequences) > 1 and longest < PLANNED_FROM:
            return Cuts()
        chunks = sum(n * count for n, count in self.sequences.items()) * self.heads.total()
        load = chunks * self.machine.programs_per_unit / self.machine.slots
        best, best_time = Cuts(), WORTH * self.makespan(Cuts(), Chains())
        modes = dict.fromkeys((mode or "halo", mode))
        for waves, tried in itertools.product(range(1, MAX_WAVES + 1), modes):
            low, high = max(1, int(load / waves)), longest
            if waves * (low + UNIT_COST) >= best_time:
                continue
            while low < high:  # towards the smallest target with which so many rounds do
                target = (low + high) // 2
                cuts = self.cuts(target, tried)
                if cuts is None:
                    low = target + 1
                    continue
                chains = self.chains(cuts)
                makespan = self.makespan(cuts, chains)
                time = makespan + self.first_pass(chains)
                if time < best_time:
                    best, best_time = cuts, time
                if makespan <= waves * (target + UNIT_COST):
                    high = target
                else:
                    low = target + 1
        return best


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
        num_segments: segments of the longest sequence, whatever the machine, and of the others in
            proportion (fewer where chunks are); None takes an estimate.

    Raises:
        ValueError: for an unknown mode.
    """
    if mode is not None and mode not in MODES:
        raise ValueError(f"expected a mode among {', '.join(MODES)}, got {mode!r}")
    sequences = Counter(-(-n // machine.chunk) for n in lengths)
    halos = [halo_chunks(g, machine.chunk) for g in log_decays]
    work, longest = _Work(sequences, Counter(halos), machine), max(sequences, default=0)
    cuts = Cuts()
    if mode != "single" and num_segments is not None:
        share = {n: -(-num_segments * n // max(1, longest)) for n in sequences}
        cuts = {(n, h): cut_into(n, h, share[n], mode) for n in sequences for h in work.heads}
    elif mode != "single":
        cuts = work.best_cuts(mode)
    if all(len(cut.starts) == 1 for cut in cuts.values()):
        units = [Unit(n, 0, 0, 0, tokens) for n, tokens in enumerate(lengths)]
        return Plan(sorted(units, key=lambda u: -u.tokens), len(log_decays), [], [])
    return _segmented(lengths, halos, work, cuts, num_segments is not None)


def _segmented(
    lengths: Sequence[int], halos: list[float], work: _Work, cuts: Cuts, forced: bool
) -> Plan:
    chunk, chains = work.machine.chunk, work.chains(cuts)
    result = Plan([], 1, [], [])
    for sequence, tokens in enumerate(lengths):
        num_chunks = -(-tokens // chunk)
        for head, halo in enumerate(halos):
            cut = cuts.get((num_chunks, halo)) or Cut((0,), (0,), False)
            if not cut.two_pass:
                result.units.extend(_halo_units(sequence, head, tokens, cut, chunk))
                continue
            per_row, rows = chains[num_chunks, halo]
            chain = Chain(sequence, head, result.num_workspace_rows, rows[-1] + 1, per_row)
            result.chains.append(chain)
            if not forced:  # a unit a row: short ones fill what others leave
                rows = list(range(chain.num_rows))
            result.units.extend(_second_pass_units(chain, tokens, rows, chunk))
            result.state_units.extend(_first_pass_units(chain, chunk))
    result.units.sort(key=lambda u: -(u.tokens + STATE_COST * chunk * u.warm))
    return result


def _halo_units(sequence: int, head: int, tokens: int, cut: Cut, chunk: int) -> list[Unit]:
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


def _second_pass_units(chain: Chain, tokens: int, rows: list[int], chunk: int) -> list[Unit]:
    starts = [row * chain.chunks_per_row * chunk for row in rows]
    return [
        Unit(
            chain.sequence,
            chain.head,
            start,
            0,
            stop - start,
            workspace_row=chain.first_row + row,
            from_initial=False,
            is_last=stop == tokens,
        )
        for row, start, stop in zip(rows, starts, [*starts[1:], tokens], strict=True)
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
