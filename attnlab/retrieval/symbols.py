"""Symbols and random draws that the retrieval tasks are made of.

Legend: B rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.checks import expect

BEGIN, QUERY, TRACK, FREQUENT, ALL, LIST = range(6)
SPECIALS = 8  # ids before the keys: the six above and two that are free
MAX_HOPS = 4


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Sizes of the three kinds of symbols, whose ids follow the special ones in this order.

    Raises:
        ValueError: for a kind without symbols.
    """

    num_keys: int = 256
    num_values: int = 256
    num_noise: int = 256

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("num_keys", "num_values", "num_noise"):
            expect(getattr(self, name) >= 1, f"{name} >= 1", getattr(self, name))

    @property
    def first_value(self) -> int:
        """Id of the first value."""
        return SPECIALS + self.num_keys

    @property
    def first_noise(self) -> int:
        """Id of the first noise symbol."""
        return self.first_value + self.num_values

    @property
    def size(self) -> int:
        """Ids in all."""
        return self.first_noise + self.num_noise


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How much a task asks: questions a row, and hops where values are tracked."""

    num_questions: int = 8
    hops: int = MAX_HOPS


VOCABULARY, SHAPE = Vocabulary(), Shape()


class Draw:
    """Random draws of one batch: B rows on a device, from one seed."""

    def __init__(self, rows: int, seed: int, device: torch.device | str) -> None:
        """Seed the device's own generator."""
        self.rows, self.device = rows, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def uniform(self, *shape: int) -> Tensor:
        """`[B, *shape]` float64 in [0, 1)."""
        size, generator = (self.rows, *shape), self.generator
        return torch.rand(size, generator=generator, device=self.device, dtype=torch.float64)

    def integers(self, high: int, *shape: int) -> Tensor:
        """`[B, *shape]` int64 in [0, high)."""
        size, generator = (self.rows, *shape), self.generator
        return torch.randint(high, size, generator=generator, device=self.device)

    def distinct(self, high: int, count: int) -> Tensor:
        """`[B, count]` int64 in [0, high), none twice in a row."""
        return self.uniform(high).argsort(1)[:, :count]

    def pick(self, groups: int, size: int) -> Tensor:
        """`[B, groups]`: one of each of `groups` runs of `size` indices, in a random order of runs."""
        chosen = self.integers(size, groups) + torch.arange(groups, device=self.device) * size
        return chosen.gather(1, self.distinct(groups, groups))

    def strata(self, slots: int, count: int) -> Tensor:
        """`[B, count]` int64: one slot in each of `count` equal strata of [0, slots), ascending."""
        bounds = torch.arange(count + 1, device=self.device) * slots // count
        return bounds[:-1] + (self.uniform(count) * bounds.diff()).long()


def distinct_of_many(draw: Draw, high: int, count: int) -> Tensor:
    """`[B, count]` distinct int64 in [0, high) by a random bijection, without sorting `high` numbers.

    On n bits (2^n >= high) x -> (x xor c) a and x -> x xor (x >> s) are bijections for odd a; what
    falls outside [0, high) goes through again, as in cycle walking.
    """
    bits = max((high - 1).bit_length(), 2)
    mask = (1 << bits) - 1
    odd = draw.integers(mask // 2 + 1, 3, 1) * 2 + 1  # [B, 3, 1]
    flip = draw.integers(mask + 1, 3, 1)

    def mixed(x: Tensor) -> Tensor:
        for turn in range(3):
            x = ((x ^ flip[:, turn]) * odd[:, turn]) & mask
            x = x ^ (x >> (bits // 2))
        return x

    numbers = mixed(torch.arange(count, device=draw.device).expand(draw.rows, count))
    # Without numbers outside there is nothing to ask, which would wait for the device.
    while high <= mask and bool((outside := numbers >= high).any()):
        numbers = torch.where(outside, mixed(numbers), numbers)
    return numbers
