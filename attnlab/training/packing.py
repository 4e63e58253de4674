"""Packs: pieces of documents end to end, in an order that a seed and an index determine.

Legend: T tokens of a pack, N pieces in it.

A piece is a run of at most `seq_len` tokens of one document. It sees nothing of its neighbours: the
model starts anew at each bound of `cu_seqlens`, and every target comes from the piece's own
document (the token that follows the piece there, or the end of text), so no position is wasted on
padding and none predicts across documents.

The pieces of all documents in a shuffled order make one long stream a pass over the corpus; pack k
of that pass is the stream's tokens k T to (k + 1) T, which may cut a piece in two. So any pack can
be made from its index alone: the position in the data is one number, and ranks may share it out.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnlab.training.data import Corpus

IGNORED = -100  # the target of a position that has none; cross_entropy's own value for it


class Pack(NamedTuple):
    """One forward pass.

    input_ids: `[1, T]` int64.
    targets: `[T]` int64, the token after each, `IGNORED` where none counts.
    cu_seqlens: `[N + 1]` int32, on the CPU always: reading it must not wait for a GPU.
    num_targets: how many targets count.
    """

    input_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    num_targets: int

    def to(self, device: torch.device) -> "Pack":
        """The pack with its ids on a device; a copy to a GPU does not wait."""
        if device.type == "cpu":
            return self
        ids, targets = (
            x.pin_memory().to(device, non_blocking=True) for x in (self.input_ids, self.targets)
        )
        return self._replace(input_ids=ids, targets=targets)

    def positions(self) -> Tensor:
        """Distance of each token from the start of its piece, `[T]` int64 on the CPU."""
        starts, lengths = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff().long()
        return torch.arange(self.targets.shape[0]) - starts.repeat_interleave(lengths)


class PackedCorpus:
    """Packs of `pack_len` tokens from the documents of a corpus, by index, without end."""

    def __init__(self, corpus: Corpus, *, pack_len: int, seq_len: int, seed: int) -> None:
        """Cut the documents into pieces.

        Raises:
            ValueError: if the corpus does not fill one pack.
        """
        if corpus.num_targets < pack_len:
            got = corpus.num_targets
            raise ValueError(f"expected a corpus of at least {pack_len} tokens (a pack), got {got}")
        self.corpus, self.pack_len, self.seed = corpus, pack_len, seed
        self.packs_per_pass = corpus.num_targets // pack_len
        self._cut(seq_len)
        self._shuffle(0)

    def pack(self, index: int) -> Pack:
        """Pack number `index`; those of a pass cover it once, but for a rest below one pack."""
        number, index = divmod(index, self.packs_per_pass)
        if number != self._pass:
            self._shuffle(number)
        ids = np.empty(self.pack_len, dtype=np.int64)
        targets = np.empty(self.pack_len, dtype=np.int64)
        begin, filled, bounds = index * self.pack_len, 0, [0]
        place = int(np.searchsorted(self._ends, begin, side="right"))
        while filled < self.pack_len:
            piece = self._order[place]
            left = int(self._ends[place]) - begin - filled  # of the piece, from here to its end
            count = min(left, self.pack_len - filled)
            start = int(self._starts[piece] + self._lengths[piece]) - left
            window = self.corpus.window(int(self._documents[piece]), start, count)
            ids[filled : filled + count], targets[filled : filled + count] = window[:-1], window[1:]
            filled += count
            bounds.append(filled)
            place += 1
        return Pack(
            torch.from_numpy(ids)[None],
            torch.from_numpy(targets),
            torch.tensor(bounds, dtype=torch.int32),
            self.pack_len,
        )

    def _cut(self, seq_len: int) -> None:
        """Document, start and length of each piece, `[pieces]` int64."""
        lengths = self.corpus.lengths
        counts = -(-lengths // seq_len)
        self._documents = np.repeat(np.arange(len(lengths)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self._starts = within * seq_len
        self._lengths = np.minimum(lengths[self._documents] - self._starts, seq_len)

    def _shuffle(self, number: int) -> None:
        """The order of pieces in a pass, and where in its stream each of them ends."""
        generator = np.random.default_rng([self.seed, number])
        self._order = generator.permutation(len(self._documents))
        self._ends = np.cumsum(self._lengths[self._order])
        self._pass = number
