"""Inputs of a measured call: queries, keys and values made from real bytes, or random ones.

From text, each token is a byte: the embeddings of it and of the two before it are added up and
projected, all with fixed random weights, so repeated words give repeated keys as in a real model.
Legend: B batch, H heads, T tokens, D head dim.
"""

import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

EMBEDDING_DIM = 128
CONTEXT = 3
BLOCK = 1 << 16


@cache
def corpus_bytes(path: str | None) -> np.ndarray:
    """All bytes of a file, of a folder's files, or by default of Python's standard library.

    Raises:
        ValueError: if there is nothing to read.
    """
    if path is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(f for f in library.rglob("*.py") if "site-packages" not in f.parts)
    else:
        root = Path(path)
        files = sorted(f for f in root.rglob("*") if f.is_file()) if root.is_dir() else [root]
    try:
        data = b"".join(f.read_bytes() for f in files)
    except OSError as error:
        raise ValueError(f"expected a readable corpus, got {path}: {error.strerror}") from None
    if not data:
        raise ValueError(f"expected a corpus with bytes in it, got {path}")
    return np.frombuffer(data, dtype=np.uint8)


def check_corpus(path: str | None, num_bytes: int) -> None:
    """Raise `ValueError` unless the corpus has that many bytes: it is never repeated."""
    have = len(corpus_bytes(path))
    if have < num_bytes:
        raise ValueError(f"expected a corpus of at least {num_bytes} bytes, got {have}")


@dataclass(frozen=True)
class Source:
    """Where inputs come from: "text" (of `corpus`) or "random", always the same for one seed."""

    kind: str
    corpus: str | None = None
    seed: int = 0

    def tensors(
        self,
        names: tuple[str, ...],
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: str,
        *,
        start: int = 0,
    ) -> list[Tensor]:
        """One `[B, H, T, D]` tensor of about unit variance a name; a name has its own weights.

        `start` is the first token's place in a longer sequence, of which this is a part (B = 1).
        """
        tensors = [torch.empty(shape, dtype=dtype, device=device) for _ in names]
        for name, x in zip(names, tensors, strict=True):
            seed = self.seed * 1000 + sum(name.encode())
            generator = torch.Generator(device).manual_seed(seed)
            if self.kind == "random":
                x.normal_(generator=generator.manual_seed(seed + (start << 20)))
            else:
                self._project(x, generator, start)
        return tensors

    def _project(self, x: Tensor, generator: torch.Generator, first: int) -> None:
        """Fill `x` block by block of tokens, so that no second tensor of its size is needed."""
        batch, heads, num_tokens, dim = x.shape
        check_corpus(self.corpus, first + batch * num_tokens)
        data = corpus_bytes(self.corpus)
        table_generator = torch.Generator(x.device).manual_seed(self.seed)
        tables = torch.randn(
            CONTEXT, 256, EMBEDDING_DIM, generator=table_generator, device=x.device
        )
        weight = torch.randn(EMBEDDING_DIM, heads * dim, generator=generator, device=x.device)
        weight /= (EMBEDDING_DIM * CONTEXT) ** 0.5
        for b in range(batch):
            for start in range(0, num_tokens, BLOCK):
                stop = min(start + BLOCK, num_tokens)
                embedded = self._embed(data, first + b * num_tokens + start, stop - start, tables)
                block = (embedded @ weight).view(stop - start, heads, dim)
                x[b, :, start:stop] = block.transpose(0, 1)

    @staticmethod
    def _embed(data: np.ndarray, offset: int, count: int, tables: Tensor) -> Tensor:
        embedded = torch.zeros(count, EMBEDDING_DIM, device=tables.device)
        for back in range(CONTEXT):
            index = np.arange(offset - back, offset - back + count).clip(min=0)
            embedded += tables[back][
                torch.from_numpy(data[index].astype(np.int64)).to(tables.device)
            ]
        return embedded
