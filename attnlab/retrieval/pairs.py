"""Random key-value pairs that never exist all at once: what the probe writes into the ops.

Legend: N tokens streamed, T tokens of a chunk, K key dim, V value dim, C entries of the codebook.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlab.checks import expect
from attnlab.retrieval.theory import CODEBOOK

READINGS = 64  # pairs that are asked for at a time


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What is written: pairs of which dims, how densely, how far.

    Raises:
        ValueError: for fewer tokens than a reading needs, or no writes.
    """

    num_tokens: int
    head_dim: int = 64
    write_gap: int = 1
    codebook: int = CODEBOOK
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the sizes."""
        least = 2 * READINGS * self.write_gap
        expect(self.write_gap >= 1, "write_gap >= 1", self.write_gap)
        expect(self.num_tokens >= least, f"at least {least} tokens", self.num_tokens)
        expect(self.codebook >= 2 and self.head_dim >= 2, "codebook and head_dim >= 2", self)


class Pairs:
    """The pairs of a stream, chunk by chunk; a chunk is the same whenever it is drawn."""

    def __init__(self, stream: Stream, device: torch.device | str, dtype: torch.dtype) -> None:
        """Draw the codebook `[C, V]`, float32."""
        self.stream, self.device, self.dtype = stream, torch.device(device), dtype
        entries = torch.randn(stream.codebook, stream.head_dim, **self._from(0))
        self.codebook = entries / entries.norm(dim=1, keepdim=True)  # [C, V]

    def _from(self, number: int) -> dict[str, Any]:
        seed = self.stream.seed * 1_000_003 + number
        return {
            "generator": torch.Generator(self.device).manual_seed(seed),
            "device": self.device,
            "dtype": torch.float32,
        }

    def chunk(self, start: int, stop: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys `[T, K]` and values `[T, V]` in the stream's dtype, and entries `[T]` of the codebook.

        Tokens between writes have zero keys.
        """
        flags = self._from(number)
        first = -start % self.stream.write_gap  # the first write in the chunk
        count = len(range(first, stop - start, self.stream.write_gap))
        drawn = torch.randn(count, self.stream.head_dim, **flags)
        drawn /= drawn.norm(dim=1, keepdim=True)
        ids = torch.randint(
            self.stream.codebook, (count,), generator=flags["generator"], device=self.device
        )
        keys = drawn
        entries = ids
        if self.stream.write_gap > 1:
            keys = drawn.new_zeros(stop - start, self.stream.head_dim)
            keys[first :: self.stream.write_gap] = drawn
            entries = ids.new_zeros(stop - start)
            entries[first :: self.stream.write_gap] = ids
        return keys.to(self.dtype), self.codebook[entries].to(self.dtype), entries

    def judge(self, outputs: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Whether `[..., V]` is nearest to its entry `[...]`, and the margin, both `[...]`."""
        products = outputs.float() @ self.codebook.T  # [..., C]
        own = products.gather(-1, entries[..., None])
        others = products.scatter(-1, entries[..., None], float("-inf")).amax(-1)
        margin = own[..., 0] - others
        return margin > 0, margin
