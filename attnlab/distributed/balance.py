"""How unevenly causal attention falls on ranks, by the mix of documents and the map of chunks.

A contiguous chunk near the end of a long document sees far more keys than one at its start. Zigzag
evens that out for one document over the whole pack, and only in part for packs of several. What is
counted are pairs of a query and a key that it sees; documents are drawn by MiniMax-01's classes of
length (arXiv 2501.08313, table 6), uniformly in the logarithm within a class.
"""

import random
from collections.abc import Sequence

from attnlab.distributed.pack import PackPlan

CLASSES = ((2**10, 2**15), (2**15, 2**17), (2**17, 2**20))
"""Shortest and longest documents of the short, medium and long class, in tokens."""
MIXES = {
    "short alone": (1.0, 0.0, 0.0),
    "30/70/0 %": (0.3, 0.7, 0.0),
    "35/35/30 %": (0.35, 0.35, 0.3),
    "30/30/40 %": (0.3, 0.3, 0.4),
}
"""Shares of documents of the three classes; the last three are those of MiniMax-01's stages."""
MAPS = {"contiguous": PackPlan.contiguous, "zigzag": PackPlan.zigzag}


def mean_imbalance(
    mix: Sequence[float], ranks: int, layout: str, *, pack_len: int = 2**20, draws: int = 20
) -> float:
    """Slowest rank's pairs over the mean rank's, the mean over so many packs of a fixed seed."""
    generator = random.Random(0)
    plans = [MAPS[layout](draw_documents(mix, pack_len, generator), ranks) for _ in range(draws)]
    return sum(plan.imbalance() for plan in plans) / draws


def draw_documents(
    mix: Sequence[float], pack_len: int, generator: random.Random
) -> tuple[int, ...]:
    """Bounds of documents that fill a pack, the last one cut off."""
    bounds = [0]
    while bounds[-1] < pack_len:
        shortest, longest = generator.choices(CLASSES, mix)[0]
        length = int(shortest * (longest / shortest) ** generator.random())
        bounds.append(min(bounds[-1] + length, pack_len))
    return tuple(bounds)
