"""The paper's claims of many ranks beside what was found here: README's table, notebook 05's.

A figure is counted, taken in virtual time (`bench.virtual`), modelled (`attnlab.distributed.costs`)
or published by others; nothing here was measured on a cluster.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from attnlab.distributed import anchors, balance, planning
from attnlab.distributed.costs import HARDWARE, Forward, Job, forward
from attnlab.distributed.streams import makespan
from bench.virtual import Run

LONG, BRIEF = 12.0, 3.0  # what all products take; the sending of all rows over ep takes 1
HARDWARE_NAME, PACKS = "H800", 8  # of a modelled step
RING_RANKS = 32
ROUTER_RANKS, EXPERTS, TOKENS, CAPACITY = 32, 32, 4096, 1.25
UNLIKE, ALIKE = 4.0, 64.0  # concentrations
CONCENTRATIONS = (1.0, UNLIKE, 16.0, ALIKE)
OVERLAP = "EP-ETP overlap halves the experts' communication that is seen"
CHAIN = "LASP+ takes down to 1/N of LASP's time on N ranks"
GATHER = "LASP+'s all-gather costs little"
PADDING = "Varlen ring attention spares padding"
ROUTER = "A global router drops fewer tokens at the same capacity"

Claim = tuple[str, str, str]  # what the paper says, what was found here, and how


@dataclass(frozen=True, kw_only=True)
class Drops:
    """Shares of the slots that are dropped if each rank counts its own, or all ranks together."""

    alone: float
    together: float


def totals(products: float) -> dict[str, float]:
    """Time of each stage of the experts' work."""
    return {"D": 1.0, "A": 2.0, "X": products, "R": 2.0, "Y": 1.0}


def seen(end: float, products: float) -> float:
    """Share of the experts' communication that is not hidden."""
    times = totals(products)
    return (end - products) / (sum(times.values()) - products)


def planned(gpus: int, pack_len: int) -> tuple[Job, Forward]:
    """The fastest modelled layout, and the parts of a mean layer there."""
    job = planning.best_job(gpus, pack_len, HARDWARE[HARDWARE_NAME], packs=PACKS)
    return job, forward(job)


def router_drops() -> dict[float, Drops]:
    """By the concentration of a Dirichlet distribution from which ranks' preferences are drawn."""
    draws = np.random.default_rng(0)
    found = {}
    for concentration in CONCENTRATIONS:
        shares = draws.dirichlet([concentration] * EXPERTS, ROUTER_RANKS)
        slots = [draws.multinomial(2 * TOKENS, share) for share in shares]
        counts = np.array(slots)  # [ranks, experts]
        room = CAPACITY * 2 * TOKENS / EXPERTS
        own = np.maximum(counts - room, 0).sum()
        together = np.maximum(counts.sum(0) - ROUTER_RANKS * room, 0).sum()
        total = counts.sum()
        found[concentration] = Drops(alone=own / total, together=together / total)
    return found


def imbalances(layout: str) -> str:
    """Slowest rank's work over the mean one's, from MiniMax's evenest mix to the least even."""
    found = [balance.mean_imbalance(mix, RING_RANKS, layout) for mix in balance.MIXES.values()]
    return f"{min(found):.1f} to {max(found):.1f}"


def readme_claims(runs: Mapping[tuple[float, int], Run]) -> list[Claim]:
    """In a few words; `runs` are those of `bench.virtual` with the products LONG in 2 groups."""
    left = seen(runs[LONG, 2][0], LONG)
    _, parts = planned(2048, 1 << 20)
    drops = router_drops()[UNLIKE]
    spread = f"the slowest of {RING_RANKS} ranks has {imbalances('zigzag')} times the mean work"
    dropped = f"{drops.together:.1%} in place of {drops.alone:.0%}"
    return [
        (OVERLAP, f"{left:.0%} is seen with two groups of tokens", "virtual time on 4 ranks"),
        (CHAIN, "2 collectives in place of 2 (N - 1) messages in turn", "counted"),
        (GATHER, f"{_in_layer(parts)} of a mean layer at 1M tokens on 2048 GPUs", "modelled"),
        (PADDING, f"exact without any; {spread}", "counted"),
        (ROUTER, f"{dropped} where ranks' tokens differ", "modelled"),
    ]


def notebook_claims(runs: Mapping[tuple[float, int], Run]) -> list[Claim]:
    """With what limits them; `runs` has LONG and BRIEF products in 2 and in 8 groups."""
    left = {(t, n): f"{seen(runs[t, n][0], t):.0%}" for t in (LONG, BRIEF) for n in (2, 8)}
    one_queue = seen(makespan(totals(BRIEF), 8, one_queue=True), BRIEF)
    lasp, plus = anchors.OPERATORS["LASP"], anchors.OPERATORS["LASP-2"]
    job, parts = planned(2048, 1 << 20)
    gathers = parts.gather, parts.gather_measured
    modelled, measured = (f"{x / (x + parts.lightning):.0%}" for x in gathers)
    zigzag, contiguous = imbalances("zigzag"), imbalances("contiguous")
    drops = router_drops()
    unlike, alike = (
        f"{drops[kind].together:.1%} in place of {drops[kind].alone:.1%}"
        for kind in (UNLIKE, ALIKE)
    )
    return [
        (
            OVERLAP,
            f"{left[LONG, 2]} is seen with two groups, {left[LONG, 8]} with eight; where products "
            f"take half as long as the communication {left[BRIEF, 2]} and {left[BRIEF, 8]} "
            f"(eight groups in one queue: {one_queue:.0%})",
            "virtual time",
        ),
        (
            CHAIN,
            "two collectives in place of 2 (N - 1) messages in turn (counted); "
            f"LASP-2, which gathers too, is {lasp[-1] / plus[-1]:.1f} times as fast as LASP "
            "on 128 GPUs (published, arXiv 2507.01004)",
            "counted, published",
        ),
        (
            GATHER,
            f"{modelled} of a lightning mixer at 1M tokens on {job.cp} cp ranks, {measured} "
            f"by published all-gathers; {_in_layer(parts)} of a mean layer",
            "modelled",
        ),
        (
            PADDING,
            f"no padding, exact for any documents; the slowest of {RING_RANKS} ranks has "
            f"{zigzag} times the mean work (contiguous chunks: {contiguous})",
            "counted",
        ),
        (
            ROUTER,
            f"{unlike} where ranks' tokens differ, {alike} where they are alike",
            "modelled",
        ),
    ]


def table(claims: Iterable[Claim]) -> str:
    """In Markdown."""
    lines = [f"| {claim} | {found} | {how} |" for claim, found, how in claims]
    return "\n".join(["| claim of arXiv 2501.08313 | here | how |", "|---|---|---|", *lines])


def _in_layer(parts: Forward) -> str:
    """Share of the gather in a mean layer: seven of eight have one."""
    return f"{7 / 8 * parts.gather / parts.layer:.0%}"
